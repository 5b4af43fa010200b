# SPDX-License-Identifier: Apache-2.0
"""State the SHA-256 of a folder's files in `SHA256SUMS`, and compare the folder with what it states.

The file is that of coreutils: `sha256sum -c SHA256SUMS` reads it.  README.md is left out: people write in it.  A folder
without such a file states nothing and is taken as it is, unless a record states the list's own digest (`Seal`).

A list names every file that lay there.  Where `check` is told which names are read, a file of such a name that the list
does not have was added later, or its line was lost, and is refused.  Other files may lie there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

from fleetune.common.files import write_atomic
from fleetune.errors import ModelError

FILE: Final = "SHA256SUMS"
PIECE: Final = 1 << 22  # bytes that are read at a time
LEFT_OUT: Final = (FILE, "README.md")
TEMPLATES: Final = "additional_chat_templates"  # the only folder in which transformers looks as well
LINE: Final = re.compile(rf"([0-9a-f]{{64}})  ((?:{TEMPLATES}/)?[^/\\\0]+)")


class Seal(NamedTuple):
    """The digest of a folder's list, as a record states it."""

    digest: str  # "" in a record of an earlier version
    record: str  # name of the record's file


def sha256(path: Path, told: Callable[[int, int], None] | None = None) -> str:
    """Return the SHA-256 of a file, read in pieces; a file that has not changed since is read once in a process.

    With `told`, which is given the bytes that are read and the file's size after each piece, it is read anyway.
    ModelError when it cannot be read.
    """
    try:
        now = path.stat()
        if told is not None:
            return _told_sha256(path, now.st_size, told)
        return _sha256(path.absolute(), now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {error.strerror}", hint="check the path and its permissions"
        ) from error


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified: int, changed: int, inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _told_sha256(path: Path, size: int, told: Callable[[int, int], None]) -> str:
    found, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(PIECE):
            found.update(part)
            done += len(part)
            told(done, size)
    return found.hexdigest()


def write(folder: Path) -> None:
    """State the digests of all files that lie in a folder now."""
    names = [name for name in _files(folder) if name not in LEFT_OUT]
    write_atomic(folder / FILE, "".join(f"{sha256(folder / name)}  {name}\n" for name in names))


def _files(folder: Path) -> list[str]:
    """Return the names of a folder's files, sorted; of its subfolders only that of the chat templates counts."""
    files = [p for place in (folder, folder / TEMPLATES) if place.is_dir() for p in place.iterdir()]
    return sorted(p.relative_to(folder).as_posix() for p in files if p.is_file())


def sealed(folder: Path, record: str) -> str:
    """Return the digest of a folder's list, for a record to state; the line of the record itself is left out.

    ModelError when there is no list, or it cannot be read.
    """
    file = folder / FILE
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ModelError(
            f"cannot read {file}: {error.strerror}", hint="check the path and its permissions"
        ) from error
    own = f"  {record}".encode()
    return hashlib.sha256(b"".join(line for line in lines if line.rstrip()[64:] != own)).hexdigest()


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


def check(
    folder: Path,
    *,
    remedy: str,
    skip: Collection[str] = (),
    read: Collection[str] = (),
    seal: Seal | None = None,
) -> None:
    """Raise ModelError, with both digests, for the first file of a folder that is not what the folder states.

    `remedy` is the command that mends it; files named in `skip` are not read; those whose names fit a pattern in `read` must
    be in the list; `seal` is what a record states of the list itself.
    """
    listed = stated(folder, remedy=remedy)
    if listed:
        _check_complete(folder, listed, read, remedy)
    for name, expected in listed.items():
        file = folder / name
        if not file.is_file():
            raise ModelError(f"{file} is missing; {FILE} names it", hint=remedy)
        if name not in skip and (found := sha256(file)) != expected:
            raise ModelError(differs(file, found, expected, FILE), hint=remedy)
    if seal and seal.digest:
        _check_seal(folder, seal, remedy)


def _check_complete(folder: Path, listed: Collection[str], read: Collection[str], remedy: str) -> None:
    for name in _files(folder):
        last = name.rpartition("/")[2]
        if name not in listed and not last.startswith(".") and any(fnmatchcase(last, one) for one in read):
            raise ModelError(
                f"{folder / name} is not named in {FILE}: it was added, or its line was removed", hint=remedy
            )


def _check_seal(folder: Path, seal: Seal, remedy: str) -> None:
    file = folder / FILE
    if not file.is_file():
        raise ModelError(f"{file} is missing; {seal.record} states its SHA-256", hint=remedy)
    if (found := sealed(folder, seal.record)) != seal.digest:
        raise ModelError(differs(file, found, seal.digest, seal.record), hint=remedy)


def differs(file: Path, found: str, expected: str, who: str) -> str:
    """Return the words for a file whose digest is not the one that `who` states."""
    return f"{file} is not what was written: its SHA-256 is {found[:16]}.., {who} states {expected[:16]}.."
