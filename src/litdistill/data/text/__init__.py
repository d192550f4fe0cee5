"""Texts: reading files of them, tokenizing them, and data sets of them. `reading` and `tokenizing` need no torch."""
