"""Tune a model, from a recipe to a finished run: the round loop, the methods and the fleets."""
