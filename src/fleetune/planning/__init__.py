"""Estimate memory, traffic and time of tuning and compression, before any work is done."""
