# SPDX-License-Identifier: Apache-2.0
"""Find the files of a run or a compression again from another folder than the one that it was started in.

A recipe names its files as the user typed them, often relative to the folder of that moment.  A run notes that folder as a
path relative to its own, such as `../..`: a project that is moved or copied as a whole keeps working, and no name of a user's
folders is written down for the usual `--out runs`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

KEY: Final = "started_in"  # in env.json and compress.json


def note(folder: Path, earlier: Mapping[str, Any]) -> dict[str, str]:
    """Return what the record of `folder` says of its start folder: as it says `earlier`, else this process's folder."""
    if isinstance(stated := earlier.get(KEY), str):
        return {KEY: stated}
    try:
        return {KEY: Path(os.path.relpath(os.getcwd(), folder.resolve())).as_posix()}
    except (OSError, ValueError):  # the folder is gone, or on another drive of Windows
        return {}


def of(folder: Path, record: Mapping[str, Any]) -> Path | None:
    """Return the folder in which a run was started; None where that is this one, is not known, or is gone."""
    stated = record.get(KEY)
    if not isinstance(stated, str):
        return None
    start = Path(os.path.normpath(folder.resolve() / stated))
    try:
        return start if start.is_dir() and not start.samefile(os.getcwd()) else None
    except OSError:
        return None


def find(name: str, start: Path | None) -> str:
    """Return a file's name as it is found from here: that in the start folder if there is one, else `name` itself."""
    if not name or start is None or Path(name).expanduser().is_absolute():
        return name
    try:
        return shown(start / name) if (start / name).exists() else name
    except (OSError, ValueError):  # too long, or a character that no path has
        return name


def shown(path: Path) -> str:
    """Return a path as seen from this process's folder."""
    try:
        return os.path.relpath(path)
    except ValueError:  # another drive of Windows
        return str(path)
