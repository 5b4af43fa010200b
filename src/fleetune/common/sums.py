"""State the SHA-256 of a finished folder's files in `SHA256SUMS`, and compare them where they are used.

`sha256sum -c SHA256SUMS` reads the file.  README.md is left out, since people edit it.  A folder without SHA256SUMS is accepted.
"""

import hashlib
import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final

from fleetune.common.files import read_text, write_atomic
from fleetune.errors import ModelError

FILE: Final = "SHA256SUMS"
SIGNATURE: Final = f"{FILE}.sig"  # of a release
README: Final = "README.md"
PIECE: Final = 1 << 23  # bytes read at a time: other threads may keep this one waiting for each
LEFT_OUT: Final = (FILE, README)
LINE: Final = re.compile(r"([0-9a-f]{64})  ([^/\\\0]+(?:/[^/\\\0]+)*)")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file; one that has not changed since is read once in a process.  ModelError when it cannot be."""
    try:
        now = path.stat()
        return _sha256(path.absolute(), now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint="check the path") from error


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified: int, changed: int, inode: int) -> str:
    sha, buffer = hashlib.sha256(), memoryview(bytearray(min(size, PIECE) or 1))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            sha.update(buffer[:read])
    return sha.hexdigest()


def apart(*digests: str) -> list[str]:
    """Return unequal digests as a message names them: 16 characters, among which they differ."""
    start = max(
        0, next((i for i, pair in enumerate(zip(*digests, strict=False)) if len(set(pair)) > 1), 0) - 12
    )
    return [f"{'..' * (start > 0)}{each[start : start + 16]}.." for each in digests]


def write(folder: Path, names: Collection[str] = ()) -> None:
    """State the digests of these files of a folder; by default of all that lie in it now, and in its subfolders."""
    files = [folder / name for name in names] or [p for p in folder.rglob("*") if p.name not in LEFT_OUT]
    names = sorted(file.relative_to(folder).as_posix() for file in files if file.is_file())
    write_atomic(folder / FILE, "".join(f"{sha256(folder / name)}  {name}\n" for name in names))


def faults(folder: Path, only: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield (name, words) for each file of a folder (of those in `only`) that is missing, or not what the folder states of it."""
    try:
        lines = read_text(folder / FILE).splitlines() or [""]
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError):
        lines = [""]
    matches = [match for line in lines if (match := LINE.fullmatch(line)) and ".." not in match[2].split("/")]
    stated = {match[2]: match[1] for match in matches}
    if len(stated) < len(lines):  # a line is none, or a file is named twice
        yield FILE, f"{folder / FILE} is damaged: it is not a list of digests and files"
        return
    for name in [name for name in stated if not only or name in only]:
        if not (file := folder / name).is_file():
            yield name, f"{file} is missing; {FILE} names it"
        elif (found := sha256(file)) != stated[name]:
            now, then = apart(found, stated[name])
            yield name, f"{file} is not what was written: its SHA-256 is {now}, {FILE} states {then}"


def unlisted(folder: Path) -> list[str]:
    """Return what lies in a folder and is not named by its list; hidden files, such as a hub adds, are left out."""
    listed = {line[66:] for line in read_text(folder / FILE).splitlines()}
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    return sorted(name for name in there - listed - {FILE, SIGNATURE} if not name.startswith("."))


def check(folder: Path, *, remedy: str, only: Collection[str] = ()) -> None:
    """Raise ModelError for the first fault of a folder (`faults`); `remedy` is the command that mends it."""
    for _, words in faults(folder, only):
        raise ModelError(words, hint=remedy)
