"""The folder that a run leaves, and the report made from it."""
