# SPDX-License-Identifier: Apache-2.0
"""The file that takes a patch back (`fleetune patch apply` leaves it), and the command to name where it is there."""

from __future__ import annotations

from pathlib import Path

from fleetune.common.shell import command


def undo_file(path: Path) -> Path:
    """Return the name of the file that undoes a patch."""
    return path.with_name(path.name + ".undo")


def take_back(path: Path | str) -> str:
    """Return "take its patch back: fleetune patch undo FILE" where a patch was applied to a file in its place, else ""."""
    file = Path(path).expanduser()
    if not (file.is_file() and undo_file(file.resolve()).is_file()):
        return ""
    return f"take its patch back: {command('patch', 'undo', path)}"


def hint_with_undo(path: Path | str, otherwise: str) -> str:
    """Return a hint for a file that is another than it was: `otherwise`, or to take its patch back where there is one."""
    return "; or ".join(filter(None, (otherwise, take_back(path))))
