"""From a config to objects."""
