"""Where images come from, how they are split, ordered and augmented."""
