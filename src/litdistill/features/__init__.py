"""Where in a network features are taken, and how they are read."""
