"""Read data sets as `Example`s, and report the rows that are wrong.

A source is a file, a folder with one file per client (its name becomes the rows' field `client`), "demo", or a data set of the
Hugging Face hub ("owner/name", or "owner/name:file").  Every row must have the form of the first (`forms.py`); what is not, or
is empty, is left out as long as it is little.
"""

import functools
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from fleetune.common import sums
from fleetune.common.display import counted
from fleetune.common.hearing import heard
from fleetune.data import columns as named
from fleetune.data import forms, sources
from fleetune.data.forms import BadRow
from fleetune.data.forms import Example as Example
from fleetune.data.forms import row_of as row_of
from fleetune.data.readers import (
    READERS,
    TEXT,
    FileRow,
    Note,
    Problem,
    decode,
    names_in,
    names_of,
    no_file,
    rows_of,
    unreadable,
)
from fleetune.errors import DataError, closest

log = logging.getLogger(__name__)

T = TypeVar("T")

SHOWN = 5  # bad rows reported at once
FIRST = 50  # rows that the columns are found by
BAD_SHARE = 0.1  # of the rows at most may be left out
NOT_READ = (".ndjson", ".xls", ".ods", ".gz", ".zip", ".zst")  # files, not hub ids, all the same
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[^:]+)?")
WINDOWS: Final = re.compile(r"[A-Za-z]:[\\/]")  # a drive: no data set of the hub with a file


def check_columns(spec: str) -> None:
    """Check the spelling of `columns` without any data; RecipeError says what is wrong with it."""
    named.parse(spec)


def read(
    source: str,
    *,
    limit: int | None = None,
    offline: bool = False,
    columns: str | Mapping[str, str] = "",
    strict: bool = False,
    note: Note = log.warning,
) -> list[Example]:
    """Read `source` (see the module), at most the first `limit` rows, of a folder evenly over its files.

    `offline` uses the hub's cache alone.

    `columns` renames fields: {"prompt": "question"}, or "prompt=question,response=answer".  `note` is told what of the rows was
    left out, and what was assumed.  DataError names file, line and field of the first bad rows (up to 5) where they are more
    than a tenth of the rows, or any with `strict`; or says why the source is not there, not readable, or empty.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit of rows must be at least 1, got {limit}", hint="leave it out to read all")
    once = functools.cache(note)
    found = _rows_of_files(source, offline, limit, once)
    first = list(itertools.islice(found, FIRST))
    mapped, assumed = _settled(columns, first, source)
    if assumed:
        once(assumed)
    rows = _Rows(mapped, first)
    examples = _collect(
        itertools.chain(first, found), rows.make, limit, sources.shown_of(source), once, strict
    )
    rows.check()
    if text := forms.left_out_text(rows.left_out):
        once(text)
    return examples


def settled_columns(source: str, columns: str, note: Note, *, offline: bool = False) -> str:
    """Return `columns` as the first rows of a source have them; DataError where they cannot be read."""
    first = list(itertools.islice(_rows_of_files(source, offline, None, lambda text: None), FIRST))
    mapped, assumed = _settled(columns, first, source)
    if assumed:
        note(assumed)
    return named.spec_of(mapped)


def _settled(
    columns: str | Mapping[str, str], first: Sequence[FileRow | Problem], source: str
) -> tuple[dict[str, str], str]:
    fields = [row.fields for row in first if isinstance(row, FileRow)]
    return named.settled(named.parse(columns), fields, sources.shown_of(source))


class _Rows:
    """Make examples of rows, all in the form of the first that has any."""

    def __init__(self, mapped: dict[str, str], first: Sequence[FileRow | Problem]) -> None:
        self.system = named.sentence(mapped)
        self.mapped = mapped = {n: c for n, c in mapped.items() if n != forms.SYSTEM or self.system is None}
        self.unseen = set(mapped.values())
        self.fields: set[str] = set()
        self.left_out: Counter[str] = Counter()
        self.form = self.where = ""
        for row in first:
            if isinstance(row, FileRow) and (form := named.form_under(mapped, row.fields)):
                self.form, self.where = form, row.where
                break

    def make(self, row: FileRow) -> list[Example]:
        """Return the row's example, or none where nothing is left of it."""
        if self.mapped and not self.fields:
            self.fields = set(itertools.islice(row.fields, 100))
        self.unseen -= row.fields.keys()
        fields = named.renamed(row.fields, self.mapped) if self.mapped else row.fields
        own = forms.form_of(fields, self.mapped)
        if not self.form:
            self.form, self.where = own, row.where
        if not self.form:
            there = names_of(row.fields)
            raise BadRow(f"has the fields of no form (the row has: {there})", forms.COLUMNS_HINT)
        if own and own != self.form and not (own == forms.TEXT and self.form in forms.LABELLED):
            raise BadRow(
                f"is in {own} form, but {self.where} is in {self.form} form",
                f"keep one form per data set, or {forms.COLUMNS_HINT}",
            )
        try:
            made = forms.example_of(fields, self.form, self.mapped, self.left_out)
        except BadRow as bad:
            raise BadRow(*map(self._in_its_words, bad.args)) from bad
        if made and self.system is not None and made.messages and made.messages[0][0] != forms.SYSTEM:
            made = replace(made, messages=((forms.SYSTEM, self.system), *made.messages))
        return [replace(made, where=row.where)] if made else []

    def _in_its_words(self, text: str) -> str:
        """Return what is wrong with a row, with the columns that the data have."""
        for name, column in self.mapped.items():
            text = text.replace(f"field {name!r}", f"column {column!r}").replace(repr(name), repr(column))
        return text

    def check(self) -> None:
        """Raise DataError for a mapped column that no row has."""
        for name, column in self.mapped.items():
            if column in self.unseen:
                near = closest(column, map(str, self.fields))
                raise DataError(
                    f"no row has a column {column!r} to read as {name}"
                    + (f"; did you mean {near!r}?" if near else ""),
                    hint=f"the first row has: {', '.join(sorted(map(str, self.fields))[:12])}",
                )


def digests(source: str, *, offline: bool = False) -> dict[str, str]:
    """Return the SHA-256 of every file of a source as they lie on the disk, by the name that is shown for it."""
    files = sources.folder_files(source) if is_folder(source) else _files(source, offline)
    return {shown: sums.sha256(path) for path, shown in files}


def is_folder(source: str) -> bool:
    """Whether a source is a folder, whose files are the clients."""
    return source != "demo" and os.path.isdir(os.path.expanduser(source))


def looks_like_rows(name: str) -> bool:
    """Whether a name is that of rows: a file of rows, there or not, a folder of such files, or the built-in set."""
    if os.path.isdir(path := Path(os.path.expanduser(name))):
        return not looks_like_model(name) and any(Path(n).suffix.lower() in READERS for n in names_in(path))
    return name == "demo" or path.suffix.lower() in READERS


def looks_like_model(name: str) -> bool:
    """Whether a name is that of a model in a file or folder."""
    path = Path(os.path.expanduser(name))
    return path.suffix.lower() == ".gguf" or os.path.isfile(path / "config.json")


def read_text(path: str | Path) -> list[str]:
    """Read plain text for perplexity: a list of texts.

    A file of rows gives the field `text` of each row where it is not blank; any other file, a .txt too, is one text.
    DataError as for `read`.
    """
    shown = str(path)
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):
        raise no_file(shown)
    note = functools.cache(log.warning)
    rows: Iterable[FileRow | Problem] = rows_of(file, shown, note)
    if file.suffix.lower() not in READERS or file.suffix.lower() == TEXT:
        try:
            rows = [FileRow(shown, {"text": decode(file.read_bytes(), shown, note)})]
        except OSError as error:
            raise unreadable(shown, error) from error
    return _collect(rows, _blank_or_text, None, shown, note)


def _blank_or_text(row: FileRow) -> list[str]:
    text = forms.text_of(row.fields, "text", may_lack="text" in row.fields)
    return [text] if text.strip() else []


def _collect(
    rows: Iterable[FileRow | Problem],
    make: Callable[[FileRow], list[T]],
    limit: int | None,
    source: str,
    note: Note,
    strict: bool = False,
) -> list[T]:
    """Make every row with `make` and join the results; DataError with the bad rows where they are many, or when there is nothing.

    Where they are few, `note` is told how many are left out.
    """
    found: list[T] = []
    problems: list[Problem] = []
    count = 0
    for row in itertools.islice(rows, limit):
        heard()
        count += 1
        try:
            if isinstance(row, Problem):
                problems.append(row)
            else:
                found += make(row)
        except BadRow as bad:
            problems.append(Problem(row.where, *bad.args))
    bad_rows = f"{len(problems):,} of {counted(count, 'row')}"
    few = len(problems) <= BAD_SHARE * count and not any(problem.whole for problem in problems)
    if problems and (strict or not few):
        first = f", the first {SHOWN}:" if len(problems) > SHOWN else ":"
        lines = [f"{problem.where}: {problem.what}" for problem in problems[:SHOWN]]
        fixes = dict.fromkeys(problem.fix for problem in problems[:SHOWN])
        head = f"{bad_rows} of {source} cannot be used{first}"
        raise DataError("\n  ".join([head, *lines]), hint="; ".join(fixes))
    if problems:
        note(f"{bad_rows} {'is' if len(problems) == 1 else 'are'} left out: {_told(problems)}")
    if not found:
        raise DataError(f"{source} has no rows", hint="check that the file was written or downloaded in full")
    return found


def _told(problems: Sequence[Problem]) -> str:
    """Say what is wrong with rows, each kind once with its first places."""
    places: dict[str, list[str]] = {}
    for problem in problems:
        places.setdefault(problem.what, []).append(problem.where)
    kinds = [f"{what} ({_first(where)})" for what, where in itertools.islice(places.items(), SHOWN)]
    return "; ".join(kinds) + "; .." * (len(places) > SHOWN)


def _first(places: Sequence[str]) -> str:
    return ", ".join(places[:SHOWN]) + ", .." * (len(places) > SHOWN)


def _rows_of_files(source: str, offline: bool, limit: int | None, note: Note) -> Iterator[FileRow | Problem]:
    """Return the rows of a source; those of a folder with the client that has them, evenly over the clients up to `limit`."""
    if is_folder(source):
        yield from sources.folder_rows(source, limit, note)
        return
    for path, name in _files(source, offline):
        yield from rows_of(path, sources.shown_of(name), note)


def _files(source: str, offline: bool) -> list[tuple[Path, str]]:
    if source == "demo":
        return [(Path(__file__).with_name("demo.jsonl"), "demo")]
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        return [(path, source)]
    name = Path(source.partition(":")[0])
    like_a_file = name.suffix.lower() in (*READERS, *NOT_READ) or (name.suffix and "/" not in source)
    if like_a_file or WINDOWS.match(source) or not HUB_ID.fullmatch(source):
        raise no_file(source)
    return sources.hub_files(source, offline)
