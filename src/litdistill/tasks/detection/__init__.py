"""Object detection: boxes with a class each."""
