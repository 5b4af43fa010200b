"""Read the rows of a file (`READERS`) each with its place; a `Problem` stands for an invalid row."""

import codecs
import csv
import difflib
import io
import itertools
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from fleetune.common.display import pip_install
from fleetune.errors import DataError, FleetuneError, UsageError
from fleetune.models.families.foreign import short_error

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

    DataError names the line that is not one of them.
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


def rows_of(path: Path, shown: str, note: Note = lambda text: None) -> Iterator[FileRow | Problem]:
    """Read one file by the reader of its suffix; `note` is told what is assumed of it."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{shown}: no reader for {path.suffix or 'a file without a suffix'!r}",
            hint=f"rows are read from {', '.join(READERS)}; save it as "
            + (".xlsx" if path.suffix.lower() in SHEETS else "one of these"),
        )
    try:
        yield from reader(path, shown, note)
    except OSError as error:
        raise unreadable(shown, error) from error


def _row(where: str, value: object) -> FileRow | Problem:
    if isinstance(value, dict):
        return FileRow(where, value)
    return Problem(where, f"is {value_text(value)}, not an object", "write each row as {...}")


def _jsonl(path: Path, shown: str, note: Note) -> Iterator[FileRow | Problem]:
    """Read one JSON object a line; blank lines are skipped."""
    with path.open("rb") as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        lines = (file.read().decode("utf-16", "replace").encode().splitlines(),) if wide else (file,)
        for number, raw in enumerate(itertools.chain(*lines), 1):
            where = f"{shown}:{number}"
            if not raw.strip():
                continue
            try:
                if line := decode(raw, shown, note).strip():
                    yield _row(where, json.loads(line))
            except DataError as error:
                yield Problem(where, error.message.rpartition(": ")[2], error.hint or "")
            except (ValueError, RecursionError) as error:
                yield Problem(where, _json_fault(error), "write one JSON object per line, in full")


def _json(path: Path, shown: str, note: Note) -> Iterator[FileRow | Problem]:
    """Read a JSON list of objects, which may lie in an object; a file of several objects is read as JSON lines."""
    text = decode(path.read_bytes(), shown, note)
    fix = "make the file one JSON list of objects: [{...}, {...}]"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            where = f"{shown}:{getattr(error, 'lineno', 1)}"
            yield Problem(where, _json_fault(error), fix, whole=True)
        else:
            yield from _jsonl(path, shown, note)
        return
    if isinstance(value, dict):
        lists = [found for found in value.values() if _are_rows(found)]
        if not lists and "\n" in text.strip():
            what = f"one object, not a list of rows (it has: {names_of(value)})"
            yield Problem(f"{shown}:1", what, "take the list of rows out of it, or put [ and ] around it")
            return
        value = lists[0] if len(lists) == 1 else [value]
    if isinstance(value, list):
        yield from (_row(f"{shown}:row {number}", row) for number, row in enumerate(value, 1))
    else:
        yield _row(f"{shown}:1", value)


def _are_rows(value: object) -> bool:
    """Whether a value is a list of objects that are no turns of a conversation."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return not {"role", "from"} & value[0].keys()


def _text(path: Path, shown: str, note: Note) -> Iterator[FileRow | Problem]:
    """Read plain text: a row is a paragraph where blank lines divide the text, else a line."""
    text = io.StringIO(decode(path.read_bytes(), shown, note), newline=None)
    lines = [(number, line.rstrip("\n")) for number, line in enumerate(text, 1)]
    blocks = [
        list(block) for full, block in itertools.groupby(lines, lambda line: bool(line[1].strip())) if full
    ]
    for block in blocks if len(blocks) > 1 else [[line] for line in itertools.chain(*blocks)]:
        yield FileRow(f"{shown}:{block[0][0]}", {"text": "\n".join(line for _, line in block)})


def _parquet(path: Path, shown: str, note: Note) -> Iterator[FileRow | Problem]:
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


SEPARATORS: Final[Mapping[str, str]] = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
LINES: Final = 50  # that a separator and a title are found by
TITLE: Final = 10  # lines that a title has at most
NUMBER: Final = 20  # characters of a date or a number at most
SHEETS: Final = (".xls", ".xlsm", ".xlsb", ".ods")  # what a spreadsheet program writes, and is not read


def delimited(path: Path, shown: str, note: Note) -> Iterator[FileRow | Problem]:
    """Read a table in text; a row's line is the one it starts on."""
    text = decode(path.read_bytes(), shown, note)
    first, mark = 1, separator(text)
    if text[:4].lower() == "sep=" and text[4:5] in SEPARATORS:  # Excel's own line
        first, mark, text = 2, text[4], text.partition("\n")[2]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    fix = f'give every row the header\'s columns; put values that hold {SEPARATORS[mark]}, quotes or line breaks in "..."'

    def rows() -> Iterator[tuple[str, Sequence[str]] | Problem]:
        while True:
            where = f"{shown}:{reader.line_num + first}"
            try:
                yield where, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Problem(where, f"not CSV: {error}", fix, whole=True)
                return

    yield from _named(rows(), fix, shown, note)


def separator(text: str) -> str:
    """Return what separates the columns: what gives nearly all, or most, of the first lines as many of them as the header."""
    keys = {}
    for mark in SEPARATORS:
        try:
            lines = csv.reader(io.StringIO(text[: 1 << 20], newline=""), delimiter=mark)
            found = list(itertools.islice(lines, LINES))
            at = header_at(found)
            bare = at > 0 and len(next(filter(any, found))) == 1  # a title without separators of empty cells
            if bare and any(cell != cell.strip() or len(cell.split()) > 3 for cell in found[at]):
                at = 0  # a row of sentences is no header
            rows = [cells for cells in found[at:] if any(cells)]
        except csv.Error:  # a field of many kilobytes
            rows = []
        counts = [
            list(map(count, rows)) for count in (_filled, len)
        ]  # a column may have no name, a row no last cells
        equal, columns = max((own.count(own[0]) / len(own), own[0]) for own in counts) if rows else (0.0, 0)
        level = (equal >= 0.5) + (equal >= 0.9) - bare if columns > 1 else 0
        keys[mark] = level, columns * bool(level), equal
    return max(keys, key=lambda mark: keys[mark])


def _filled(cells: Sequence[str]) -> int:
    """Return how many cells there are up to the last that is not empty."""
    return max((number for number, cell in enumerate(cells, 1) if cell), default=0)


def header_at(rows: Sequence[Sequence[str]]) -> int:
    """Return how many rows of the first ones are a title: less full than the header below, one cell or before a blank row."""
    filled = [sum(map(bool, cells)) for cells in rows]
    for at, header in enumerate(rows[:TITLE]):
        if _goes_on(rows[at:LINES]):
            return at + 1
        below = [number for number in range(at + 1, len(rows)) if filled[number]]
        within = sum(_filled(rows[number]) <= _filled(header) for number in below)
        full = sum(filled[number] > 1 for number in below)
        columns = list(itertools.zip_longest(header, *(rows[number] for number in below), fillvalue=""))
        names = filled[at] > 1 and not any(_is_value(*column) for column in columns)
        if names and below and within >= 0.9 * len(below) and full >= 0.5 * len(below):
            above = [cells for cells in rows[:at] if any(cells)]
            alone = not filled[at - 1] and filled[at + 1]  # the header, below a blank row
            stands_apart = above and (sum(map(bool, above[0])) == 1 or alone)
            # a header may lack the first name (of a counter), and texts may have remarks beside them
            header_too = any(_first(c) > _first(header) or "text" in map(str.lower, c) for c in above)
            return at if stands_apart and not header_too and max(filled[:at]) < filled[at] else 0
    return 0


def _goes_on(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first two rows name the columns together, as under merged cells: each has names where the other has none."""
    over, under, *rest = *rows, (), ()
    pairs = list(itertools.zip_longest(over, under, fillvalue=""))
    lower = [n for n, (name, below) in enumerate(pairs) if name and not below]
    filled = [all(n < len(cells) and cells[n] for n in lower) for cells in rest if any(cells)]
    each = lower and any(below and not name for name, below in pairs) and sum(map(bool, over)) > 1
    return bool(each) and sum(filled) > 0.5 * len(filled)


def _is_value(cell: str, *below: str) -> bool:
    """Whether a cell is a number above others; a year is one above years."""
    return cell.isdigit() and any(c.isdigit() and (len(cell) != 4 or len(c) == 4) for c in below)


def _first(cells: Sequence[str]) -> int:
    return next(number for number, cell in enumerate(cells) if cell)


def _named(
    rows: Iterable[tuple[str, Sequence[str]] | Problem], fix: str, shown: str, note: Note
) -> Iterator[FileRow | Problem]:
    """Yield rows under the names of the header; a title, empty rows, and columns without a name and a value are left out."""
    header: list[str] = []
    rows = iter(rows)
    first = list(itertools.islice(rows, LINES))
    tables = [row for row in first if not isinstance(row, Problem)]
    if at := header_at([cells for _, cells in tables]):
        title = next(n for n, (_, cells) in enumerate(tables) if any(cells))
        top, over, names = (tables[n][0].rpartition(":")[2].removeprefix("row ") for n in (title, at - 1, at))
        if _goes_on([cells for _, cells in tables[at - 1 :]]):
            pairs = itertools.zip_longest(tables[at][1], tables[at - 1][1], fillvalue="")
            first[at] = tables[at][0], [name or above for name, above in pairs]
            note(f"the header of {shown} is rows {over} and {names}")
        else:
            note(f"row {top} of {shown} is a title: the header is row {names}")
    for row in itertools.chain(first[at:], rows):
        if isinstance(row, Problem):
            yield row
            continue
        where, cells = row
        if not any(cells):
            continue
        if not header:
            given = [name.strip() for name in cells]
            places = dict[str, int]()
            own = [not name or places.setdefault(name, n) == n for n, name in enumerate(given)]
            header = [
                n if o else f"{n} (column {c})" for c, (n, o) in enumerate(zip(given, own, strict=True), 1)
            ]
            if not all(own):
                note(
                    f"a column of {shown} has the name of another, and is called {header[own.index(False)]!r}"
                )
        elif any(cells[len(header) :]):
            what = f"has {len(cells)} values for the header's {len(header)} columns"
            yield Problem(where, what, fix)
        else:
            found = itertools.zip_longest(header, cells[: len(header)], fillvalue="")
            yield FileRow(where, {name: cell for name, cell in found if name or cell})


def excel(path: Path, shown: str, note: Note) -> Iterator[FileRow | Problem]:
    """Read a sheet of an Excel file: the first one with a tenth of the text of another; formulas count by their saved value."""
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(f"{shown}: Excel files need openpyxl", hint=pip_install("xlsx")) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles that it does not know
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            sheets = [sheet for sheet in book.worksheets if any(map(any, _rows(sheet)))]  # to the first cell
            heads = [itertools.chain(*itertools.islice(_rows(sheet), LINES)) for sheet in sheets]
            texts = [sum(len(cell) for cell in cells if len(cell) > NUMBER) for cells in heads]
            at = next((n for n, size in enumerate(texts) if 10 * size >= max(texts)), 0)
            rows = list(_rows(sheets[at])) if sheets else []
            names = [repr(sheet.title) for sheet in sheets]
            book.close()
    except (MemoryError, OSError):
        raise
    except Exception as error:  # openpyxl's own, zipfile's, and those of XML
        what, hint = short_error(error), "save it again as .xlsx without a password, or as CSV"
        if isinstance(error, zipfile.BadZipFile):
            with path.open("rb") as file:
                head = file.read(1024)
            what = "no Excel file" if head else "the file is empty"
            if head and all(byte > 31 or byte in b"\t\r\n" for byte in head):
                what, hint = "it is text, not Excel", "rename it to .csv"
        raise DataError(f"{shown}: cannot be read: {what}", hint=hint) from error
    if len(names) > 1:
        note(f"the sheet {names.pop(at)} of {shown} is read, not {', '.join(names)}")
    table = ((f"{shown}:row {n}", cells) for n, cells in enumerate(rows, 1))
    yield from _named(table, "name the column", shown, note)


def _rows(sheet: Any) -> Iterator[list[str]]:
    return ([_cell(value) for value in cells] for cells in sheet.iter_rows(values_only=True))


def _cell(value: object) -> str:
    """Return a cell as text: 3.0 as 3, true and false as JSON writes them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)


TEXT: Final = ".txt"
READERS: Final[Mapping[str, Callable[[Path, str, Note], Iterator[FileRow | Problem]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": delimited,
    ".tsv": delimited,
    ".parquet": _parquet,
    ".xlsx": excel,
    TEXT: _text,
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


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' starting at')} at column {error.colno}"
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
