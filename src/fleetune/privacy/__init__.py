"""Differential privacy: the mechanism that releases a sum, and the accountant of many releases."""
