"""Tune, measure and calibrate on real devices, in the rounds of a simulated fleet (`tuning/rounds/rounds.py`)."""

from typing import Final

PORT: Final = 8470  # where a server listens for devices
