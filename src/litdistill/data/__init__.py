"""Image data: sources, splits, order, augmentation and loading."""
