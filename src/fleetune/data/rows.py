"""What a reader yields: rows with their place, and those that cannot be used; and text from the bytes of a file."""

import codecs
from collections.abc import Callable
from typing import NamedTuple

from fleetune.errors import DataError

Note = Callable[[str], None]


class FileRow(NamedTuple):
    """One row of a file, with its place."""

    where: str  # "file:line"
    fields: dict[str, object]


class Problem(NamedTuple):
    """One row that cannot be used; of `whole` ones nothing that follows can be, either."""

    where: str
    what: str
    fix: str
    whole: bool = False


def decode(raw: bytes, shown: str, note: Note = lambda text: None) -> str:
    """Decode text: UTF-8, UTF-16 with a byte-order mark, else cp1252, as Windows writes it, of which `note` is told.

    DataError names the line that is none of them.
    """
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as first:
        if encoding == "utf-8-sig":
            try:
                text = raw.decode("cp1252")
            except UnicodeDecodeError:
                pass
            else:
                note(f"{shown} is not UTF-8: it is read as cp1252 (Windows)")
                return text
        where = f"{shown}:{raw.count(10, 0, first.start) + 1}"
        raise DataError(
            f"{where}: neither UTF-8 nor cp1252 (byte 0x{raw[first.start]:02x})",
            hint="save the file as UTF-8",
        ) from first
