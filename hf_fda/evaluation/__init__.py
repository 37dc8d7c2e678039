"""Scores of merged models on rows with labels.

Nothing is imported here: a card needs `scores` and `published` alone, and the metrics' library is slow to import.
"""
