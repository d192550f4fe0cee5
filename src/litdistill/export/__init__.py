"""Export of students to files that run without this project."""
