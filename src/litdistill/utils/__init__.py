"""What every room may use: errors, files, hashes, processes."""
