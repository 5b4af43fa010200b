# SPDX-License-Identifier: Apache-2.0
"""Tell a folder with an artefact of codes by its file; nothing heavy is imported for that."""

from __future__ import annotations

from pathlib import Path
from typing import Final

FILE: Final = "master.safetensors"


def is_master(path: Path) -> bool:
    """Return whether this is the folder of an artefact."""
    return (path / FILE).is_file()
