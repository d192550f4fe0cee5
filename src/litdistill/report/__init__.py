"""The report as a page: what is collected from run folders, drawn, and written as HTML and as Markdown."""
