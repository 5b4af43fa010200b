"""Measure models: losses, generated answers, scores, objectives."""
