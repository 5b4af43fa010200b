"""Read the rows of a file (.jsonl, .json, .csv, .parquet) each with its place; a `Problem` stands for an invalid row."""

import csv
import difflib
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fleetune.common.shell import pip_install, quoted
from fleetune.errors import DataError, FleetuneError, UsageError
from fleetune.models.families.foreign import short_error


class FileRow(NamedTuple):
    """One row of a file, with its place."""

    where: str  # "file:line"
    fields: dict[str, object]


class Problem(NamedTuple):
    """One row that cannot be used."""

    where: str
    what: str
    fix: str


def rows_of(path: Path, shown: str) -> Iterator[FileRow | Problem]:
    """Read one file by the reader of its suffix."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{shown}: no reader for {path.suffix or 'a file without a suffix'!r}",
            hint=f"instructions and answers are read from {', '.join(READERS)}",
        )
    try:
        yield from reader(path, shown)
    except OSError as error:
        raise unreadable(shown, error) from error


def _row(where: str, value: object) -> FileRow | Problem:
    if isinstance(value, dict):
        return FileRow(where, value)
    return Problem(where, f"is {value_text(value)}, not an object", "write each row as {...}")


def _jsonl(path: Path, shown: str) -> Iterator[FileRow | Problem]:
    """Read one JSON object a line; blank lines are skipped."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{shown}:{number}"
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not line.strip():
                continue
            try:
                yield _row(where, json.loads(line.decode()))
            except UnicodeDecodeError as error:
                yield Problem(where, f"not UTF-8 (byte 0x{line[error.start]:02x})", _utf8_fix(shown))
            except (ValueError, RecursionError) as error:
                yield Problem(where, _json_fault(error), "write one JSON object per line, in full")


def _json(path: Path, shown: str) -> Iterator[FileRow | Problem]:
    """Read a JSON list of objects; a file that starts with an object is read as JSON lines, as the hub does."""
    text = decode(path.read_bytes(), shown)
    fix = "make the file one JSON list of objects: [{...}, {...}]"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            yield Problem(f"{shown}:{getattr(error, 'lineno', 1)}", _json_fault(error), fix)
        else:
            yield from _jsonl(path, shown)
        return
    if isinstance(value, list):
        yield from (_row(f"{shown}:row {number}", row) for number, row in enumerate(value, 1))
    elif isinstance(value, dict) and "\n" in text.strip():
        what = f"one object, not a list of rows (it has: {names_of(value)})"
        yield Problem(f"{shown}:1", what, "take the list of rows out of it, or put [ and ] around it")
    else:
        yield _row(f"{shown}:1", value)


def _csv(path: Path, shown: str) -> Iterator[FileRow | Problem]:
    """Read a table with a header line, whose columns are separated as in that line; a row's line is the one it starts on."""
    text = decode(path.read_bytes(), shown)
    mark = _separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    kind = SEPARATORS[mark]
    fix = f'give every row the header\'s columns; put values that hold {kind}, quotes or line breaks in "..."'
    header: list[str] | None = None
    while True:
        where = f"{shown}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Problem(where, f"not CSV: {error}", fix)
            return
        if header is None:
            header = [name.strip() for name in cells]
            twice = [name for name, times in Counter(header).items() if times > 1]
            if twice:
                what = f"column {twice[0][:40]!r} is there twice"
                yield Problem(where, what, "rename one of the columns")
                return
        elif cells and len(cells) != len(header):
            yield Problem(where, f"has {len(cells)} values for the header's {len(header)} columns", fix)
        elif cells:
            yield FileRow(where, dict(zip(header, cells, strict=True)))


SEPARATORS: Mapping[str, str] = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # of columns


def _separator(text: str) -> str:
    """Return what separates the columns of a header line: a comma where there is one, else what gives most columns."""
    columns = {}
    for mark in SEPARATORS:
        try:
            columns[mark] = len(next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), ()))
        except csv.Error:  # a field of many kilobytes
            columns[mark] = 0
    return "," if columns[","] > 1 else max(columns, key=lambda mark: columns[mark])


def _parquet(path: Path, shown: str) -> Iterator[FileRow | Problem]:
    """Read Parquet in batches; there are no lines, so a row is named by its number."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{shown}: Parquet needs pyarrow", hint=pip_install("parquet")) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for value in batch.to_pylist():
                    number += 1
                    yield FileRow(f"{shown}:row {number}", value)
    except (FleetuneError, MemoryError, OSError):
        raise
    except Exception as error:  # pyarrow's own, and what its values raise on their way to Python
        raise DataError(
            f"{shown}: not Parquet: {short_error(error)}", hint="download or write the file again"
        ) from error


READERS: Mapping[str, Callable[[Path, str], Iterator[FileRow | Problem]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def value_text(value: object) -> str:
    """Describe a wrong value in few words: null, a list, an object, "the text"."""
    if isinstance(value, list | dict):
        return ("a list" if value else "an empty list") if isinstance(value, list) else "an object"
    written = json.dumps(value, ensure_ascii=False, default=str)
    return written if len(written) <= 40 else f"{written[:37]}..."


def whole(text: str) -> str:
    """Return a text that can be written down: half a character, and a byte of a file's name that is no UTF-8, as \\udcff."""
    return text.encode("utf-8", "backslashreplace").decode()


def names_of(fields: Mapping[str, object]) -> str:
    """List the names of the first twelve fields."""
    names = ", ".join(str(name)[:40] for name in itertools.islice(fields, 12)) or "no fields"
    return "".join(c if c.isprintable() else "?" for c in names)


# What can be wrong with a file as a whole.


def decode(raw: bytes, shown: str) -> str:
    """Decode UTF-8 text, without a byte-order mark; DataError names the line that is not UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{shown}:{raw.count(10, 0, error.start) + 1}"
        raise DataError(
            f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x})", hint=_utf8_fix(shown)
        ) from error


def require_text(source: str, hint: str, flag: str = "--text") -> None:
    """Raise UsageError for a file of rows without a field `text`, given as the plain text of `flag`; `hint` gives rows instead.

    The first row is looked at; what cannot be read is told where it is read.
    """
    path = Path(os.path.expanduser(source))
    first = next(rows_of(path, source), None) if path.suffix.lower() in READERS and path.is_file() else None
    if isinstance(first, FileRow) and "text" not in first.fields:
        there = names_of(first.fields)
        raise UsageError(
            f"{source} holds rows without a field 'text' (there are: {there}), and {flag} is plain text",
            hint=hint,
        )


def _utf8_fix(shown: str) -> str:
    return f"save it as UTF-8, for example: iconv -f cp1252 -t utf-8 {quoted(shown)} (or -f utf-16)"


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return f"not JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}"


def unreadable(shown: str, error: OSError) -> DataError:
    """Return the error for a file that the system does not let us read."""
    return DataError(
        f"cannot read {shown}: {error.strerror or error}", hint="check the file and its permissions"
    )


def no_file(source: str) -> DataError:
    """Return why `source` is no file, with the neighbours that it may have meant."""
    path = Path(os.path.expanduser(source))
    if source == "-":
        return DataError(
            "- stands for rows from standard input, which cannot be read here", hint="write them into a file"
        )
    if os.path.isdir(path):
        inside = [name for name in names_in(path) if Path(name).suffix.lower() in READERS]
        hint = f"give one file of it, such as {path / inside[0]}" if inside else "give a file"
        return DataError(f"{source} is a folder, not a file", hint=hint)
    if not os.path.isdir(path.parent):
        return DataError(f"no file {source}: there is no folder {path.parent}", hint="check the path")
    data = [name for name in names_in(path.parent) if Path(name).suffix.lower() in READERS][:5]
    there = f"data files there: {', '.join(data)}" if data else "check the path"
    return DataError(f"no file {source}", hint=suggest_files(source) or there)


def suggest_files(source: str) -> str:
    """Return a question with the files whose names are close to `source`, "" if there are none."""
    path = Path(os.path.expanduser(source))
    near = difflib.get_close_matches(path.name, [*names_in(path.parent), "demo"], n=3, cutoff=0.5)
    meant = [name if name == "demo" else str(path.parent / name) for name in near]
    return f"did you mean {' or '.join(meant)}?" if meant else ""


def names_in(folder: Path) -> list[str]:
    """Return the names of the files in a folder, sorted; none of a folder that cannot be listed."""
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError:
        return []
