"""Read tables (.csv, .tsv, .xlsx): the first row that is not empty names the columns."""

import csv
import io
import itertools
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fleetune.common.shell import pip_install
from fleetune.data.rows import FileRow, Note, Problem, decode
from fleetune.errors import DataError
from fleetune.models.families.foreign import short_error

SEPARATORS: Final[Mapping[str, str]] = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
LINES: Final = 50  # that a separator is found by


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

    yield from _named(rows(), fix)


def separator(text: str) -> str:
    """Return what separates the columns: what gives nearly all, or most, of the first lines as many of them as the header."""
    keys = {}
    for mark in SEPARATORS:
        try:
            lines = csv.reader(io.StringIO(text[: 1 << 20], newline=""), delimiter=mark)
            counts = [_filled(cells) for cells in itertools.islice(filter(any, lines), LINES)]
        except csv.Error:  # a field of many kilobytes
            counts = []
        columns = counts[0] if counts else 0
        equal = counts.count(columns) / max(1, len(counts))
        level = (equal >= 0.5) + (equal >= 0.9) if columns > 1 else 0
        keys[mark] = level, columns * bool(level), equal
    return max(keys, key=lambda mark: keys[mark])


def _filled(cells: Sequence[str]) -> int:
    """Return how many cells there are up to the last that is not empty."""
    return max(number for number, cell in enumerate(cells, 1) if cell)


def _named(rows: Iterable[tuple[str, Sequence[str]] | Problem], fix: str) -> Iterator[FileRow | Problem]:
    """Yield rows under the names of the header; empty ones, and columns without a name and a value, are left out."""
    header: list[str] = []
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        where, cells = row
        if not any(cells):
            continue
        if not header:
            header = [name.strip() for name in cells]
            twice = [name for name, times in Counter(header).items() if times > 1 and name]
            if twice:
                what = f"column {twice[0][:40]!r} is there twice"
                yield Problem(where, what, "rename one of the columns", whole=True)
                return
        elif any(cells[len(header) :]):
            what = f"has {len(cells)} values for the header's {len(header)} columns"
            yield Problem(where, what, fix)
        else:
            found = itertools.zip_longest(header, cells[: len(header)], fillvalue="")
            yield FileRow(where, {name: cell for name, cell in found if name or cell})


def excel(path: Path, shown: str, note: Note) -> Iterator[FileRow | Problem]:
    """Read the first sheet of an Excel file that has any cell; formulas count by the value that was saved with them."""
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(f"{shown}: Excel files need openpyxl", hint=pip_install("xlsx")) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles that it does not know
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            sheets = [sheet for sheet in book.worksheets if any(map(any, _rows(sheet)))]  # to the first cell
            rows = list(_rows(sheets[0])) if sheets else []
            names = [repr(sheet.title) for sheet in sheets]
            book.close()
    except (MemoryError, OSError):
        raise
    except Exception as error:  # openpyxl's own, zipfile's, and those of XML
        what = "no Excel file" if isinstance(error, zipfile.BadZipFile) else short_error(error)
        raise DataError(
            f"{shown}: cannot be read: {what}", hint="save it again as .xlsx without a password, or as CSV"
        ) from error
    if len(names) > 1:
        note(f"the sheet {names[0]} of {shown} is read, not {', '.join(names[1:])}")
    yield from _named(((f"{shown}:row {n}", cells) for n, cells in enumerate(rows, 1)), "name the column")


def _rows(sheet: Any) -> Iterator[list[str]]:
    return ([_cell(value) for value in cells] for cells in sheet.iter_rows(values_only=True))


def _cell(value: object) -> str:
    """Return a cell as text: 3.0 as 3, true and false as JSON writes them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)
