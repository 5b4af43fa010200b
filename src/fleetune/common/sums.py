# SPDX-License-Identifier: Apache-2.0
"""State the SHA-256 of a folder's files in `SHA256SUMS`, and compare the folder with what it states.

The file is that of coreutils: `sha256sum -c SHA256SUMS` reads it.  README.md is left out: people write in it.  A folder
without such a file states nothing and is taken as it is; so are folders that earlier versions wrote.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Final

from fleetune.common.files import write_atomic
from fleetune.errors import ModelError

FILE: Final = "SHA256SUMS"
LEFT_OUT: Final = (FILE, "README.md")
LINE: Final = re.compile(r"([0-9a-f]{64})  ([^/\\\0]+)")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces; a file that has not changed since is read once in a process.

    ModelError when it cannot be read.
    """
    try:
        now = path.stat()
        return _sha256(path.absolute(), now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {error.strerror}", hint="check the path and its permissions"
        ) from error


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified: int, changed: int, inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path) -> None:
    """State the digests of all files that lie in a folder now."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in LEFT_OUT)
    write_atomic(folder / FILE, "".join(f"{sha256(folder / name)}  {name}\n" for name in names))


def stated(folder: Path, *, remedy: str) -> dict[str, str]:
    """Return name -> SHA-256 as the folder states them, {} when it states none; ModelError when that file is damaged."""
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        found = [
            LINE.fullmatch(line) for line in file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        ]
    except (OSError, ValueError):
        found = [None]
    sums = {match[2]: match[1] for match in found if match}
    if len(sums) < len(found):
        raise ModelError(f"{file} is damaged: it is not a list of digests and files", hint=remedy)
    return sums


def check(folder: Path, *, remedy: str, skip: Collection[str] = ()) -> None:
    """Raise ModelError, with both digests, for the first file of a folder that is not what the folder states.

    `remedy` is the command that mends it; files named in `skip` are not read.
    """
    for name, expected in stated(folder, remedy=remedy).items():
        file = folder / name
        if not file.is_file():
            raise ModelError(f"{file} is missing; {FILE} names it", hint=remedy)
        if name not in skip and (found := sha256(file)) != expected:
            raise ModelError(differs(file, found, expected, FILE), hint=remedy)


def differs(file: Path, found: str, expected: str, who: str) -> str:
    """Return the words for a file whose digest is not the one that `who` states."""
    return f"{file} is not what was written: its SHA-256 is {found[:16]}.., {who} states {expected[:16]}.."
