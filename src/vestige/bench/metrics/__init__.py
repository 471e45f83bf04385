"""Scores of answers, and bytes of caches."""
