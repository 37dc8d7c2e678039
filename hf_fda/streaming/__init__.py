"""Merging by parameter-space methods, tensor by tensor: parts read ahead, computed side by side, written in order."""
