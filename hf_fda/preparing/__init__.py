"""What methods find out before tensors are written, each method's in a file of its own."""
