"""Ours against the papers' way, each pair measured in one process on one machine (`python -m benchmarks`)."""
