# SPDX-License-Identifier: Apache-2.0
"""Tuning from a recipe to a finished run: the round loop, the methods and the fleets."""
