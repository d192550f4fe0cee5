"""A student as a file that runs without this project."""
