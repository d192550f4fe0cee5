"""Comparisons of techniques, and published tables."""
