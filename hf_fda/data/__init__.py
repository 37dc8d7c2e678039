"""Rows of real data, for the methods that look at them."""
