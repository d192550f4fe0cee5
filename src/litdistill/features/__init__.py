"""Taps: names of the features to read from a network, and the hooks that read them."""
