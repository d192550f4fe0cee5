"""The report page: measures the runs of folders, draws figures, and writes HTML and Markdown."""
