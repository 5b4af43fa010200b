"""Compression from a request to a finished folder, for each kind of method."""
