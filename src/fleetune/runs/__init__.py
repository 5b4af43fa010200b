"""The folder that a run or a compression leaves, its metrics, listeners and trackers."""
