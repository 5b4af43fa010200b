"""Text of several kinds to calibrate on where none is given, written for Fleetune (68 thousand tokens).

A line `%%` parts the documents of a file.
"""

from pathlib import Path
from typing import Final

# how many of 16 windows are of each file
SHARES: Final = {"prose": 4, "knowledge": 4, "chats": 3, "code": 3, "german": 1, "spanish": 1}


def documents(kind: str) -> list[str]:
    """Return the documents of a file."""
    return (Path(__file__).parent / f"{kind}.txt").read_text(encoding="utf-8").split("\n%%\n")
