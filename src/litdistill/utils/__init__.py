"""Shared utilities: errors, files, hashes, processes, logging."""
