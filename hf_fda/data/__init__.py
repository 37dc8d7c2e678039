"""Rows of real data, for the methods that look at them.

Nothing is imported here: a command line needs `request` alone.
"""
