# SPDX-License-Identifier: Apache-2.0
"""Read data sets of instructions and answers into one shape, `Example`, or say which row is wrong and why.

A source is a file (.jsonl, .json, .csv, .parquet), "demo" (the set that comes with Fleetune), or a data
set on the Hugging Face hub: "owner/name", or "owner/name:file" for one file of it.  The first row's fields
tell the form, and every row must have that form:

    Dolly          instruction, context (may be empty or absent), response
    Alpaca         instruction, input (may be empty or absent), output
    ShareGPT       conversations: a list of {from: human|gpt|system, value}
    chat messages  messages: a list of {role: user|assistant|system, content}

A context is joined to its instruction in one user turn: "{instruction}\\n{context}" for Dolly and
"{instruction}\\n\\n### Input:\\n{input}", as in its own training prompt, for Alpaca
(tatsu-lab/stanford_alpaca, train.py).  Of a
conversation the last turn, the assistant's, is the answer; the turns before it are the prompt.  Text is
kept as it is.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from fleetune.errors import DataError

log = logging.getLogger(__name__)
T = TypeVar("T")

SHOWN = 5  # bad rows reported at once
PAIRS = {  # name: prompt field, context field, answer field, what joins the context
    "Dolly": ("instruction", "context", "response", "\n"),
    "Alpaca": ("instruction", "input", "output", "\n\n### Input:\n"),
}
CHATS = {"ShareGPT": ("conversations", "from", "value"), "chat messages": ("messages", "role", "content")}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
NOT_READ = (".txt", ".tsv", ".ndjson", ".xlsx", ".gz", ".zip", ".zst")  # files, not hub ids, all the same
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[^:]+)?")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?(?=\.\w+$)")
SPLIT = re.compile(r"(?<![a-z])(train|test|valid|validation|val|eval|dev)(?![a-z])")
NOT_DATA = re.compile(r"(^|/)(\.[^/]*|dataset_infos?\.json|dataset_dict\.json|state\.json)$")


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its answer."""

    messages: tuple[tuple[str, str], ...]  # (role, content); system|user|assistant, the last is user
    response: str  # the assistant's answer: the loss is on this alone
    meta: Mapping[str, str] = field(default_factory=dict)  # the row's other fields that are single values


class Row(NamedTuple):
    """One row as it stands in its file."""

    where: str  # "file:line"
    fields: dict[str, object]


class Problem(NamedTuple):
    """One row that cannot be used."""

    where: str
    what: str
    fix: str


class _BadRow(Exception):
    """(what is wrong, how to put it right), raised and caught within this module."""


def read(source: str, *, limit: int | None = None, offline: bool = False) -> list[Example]:
    """Read `source` (see the module), at most the first `limit` rows; `offline` uses the hub's cache alone.

    DataError names file, line and field of the first bad rows (up to 5), or says why the source is not
    there, not readable, or empty.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit of rows must be at least 1, got {limit}", hint="leave it out to read all")
    form, first = "", ""

    def make(row: Row) -> list[Example]:
        nonlocal form, first
        own = _form(row.fields)
        if form and own and own != form:
            raise _BadRow(f"is in {own} form, but {first} is in {form} form", "keep one form per data set")
        if not form:
            form, first = own or _no_form(row.fields), row.where
        return [_pair(row.fields, form) if form in PAIRS else _chat(row.fields, form)]

    files = _files(source, offline)
    rows = itertools.chain.from_iterable(_rows(path, shown) for path, shown in files)
    return _collect(rows, make, limit, source)


def read_text(path: str | Path) -> list[str]:
    """Read plain text for perplexity: a list of texts.

    A file of rows (.jsonl, .json, .csv, .parquet) gives the field `text` of each row where it is not blank;
    any other file is one text.  DataError as for `read`.
    """
    shown = str(path)
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):
        raise _no_file(shown)
    if file.suffix.lower() in READERS:
        return _collect(_rows(file, shown), _blank_or_text, None, shown)
    try:
        text = _decode(file.read_bytes(), shown)
    except OSError as error:
        raise _unreadable(shown, error) from error
    return _collect([Row(shown, {"text": text})], _blank_or_text, None, shown)


def _blank_or_text(row: Row) -> list[str]:
    """The field `text` of a row in a list, or an empty list where it is blank."""
    text = _text(row.fields, "text", may_lack="text" in row.fields)
    return [text] if text.strip() else []


def _collect(
    rows: Iterable[Row | Problem], make: Callable[[Row], list[T]], limit: int | None, source: str
) -> list[T]:
    """What `make` makes of each row, joined; DataError with the bad rows, or when there is nothing."""
    found: list[T] = []
    problems: list[Problem] = []
    for row in itertools.islice(rows, limit):
        try:
            if isinstance(row, Problem):
                raise _BadRow(row.what, row.fix)
            found += make(row)
        except _BadRow as bad:
            problems.append(Problem(row.where, *bad.args))
            if len(problems) == SHOWN:
                break
    if problems:
        many = f"the first {SHOWN} bad rows" if len(problems) == SHOWN else f"{len(problems)} bad row(s)"
        lines = [f"{problem.where}: {problem.what}" for problem in problems]
        fixes = dict.fromkeys(problem.fix for problem in problems)
        raise DataError("\n  ".join([f"{many} in {source}", *lines]), hint="; ".join(fixes))
    if not found:
        raise DataError(f"{source} has no rows", hint="check that the file was written or downloaded in full")
    return found


# Files: each reader gives the rows one by one, and a Problem in place of a row that is not one.


def _files(source: str, offline: bool) -> list[tuple[Path, str]]:
    """The files of a source, each with the name to show for it."""
    if source == "demo":
        return [(Path(__file__).with_name("demo.jsonl"), "demo")]
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        return [(path, source)]
    like_a_file = Path(source.partition(":")[0]).suffix.lower() in (*READERS, *NOT_READ)
    if os.path.isdir(path) or like_a_file or not HUB_ID.fullmatch(source):
        raise _no_file(source)
    return _hub(source, offline)


def _rows(path: Path, shown: str) -> Iterator[Row | Problem]:
    """The rows of one file by the reader of its suffix."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{shown}: no reader for {path.suffix or 'a file without a suffix'!r}",
            hint=f"instructions and answers are read from {', '.join(READERS)}",
        )
    try:
        yield from reader(path, shown)
    except OSError as error:
        raise _unreadable(shown, error) from error


def _row(where: str, value: object) -> Row | Problem:
    """A JSON value as a row."""
    if isinstance(value, dict):
        return Row(where, value)
    return Problem(where, f"is {_seen(value)}, not an object", "write each row as {...}")


def _jsonl(path: Path, shown: str) -> Iterator[Row | Problem]:
    """One JSON object a line; blank lines are skipped."""
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


def _json(path: Path, shown: str) -> Iterator[Row | Problem]:
    """A JSON list of objects; a file that starts with an object is read as JSON lines, as the hub does."""
    text = _decode(path.read_bytes(), shown)
    blank = re.compile(r"[ \t\r\n]*")
    decoder = json.JSONDecoder()

    def skip(start: int) -> int:
        return blank.match(text, start).end()  # type: ignore[union-attr]  # it matches the empty string

    at = skip(0)
    if text[at : at + 1] != "[":
        yield from _one_object(text, shown) or _jsonl(path, shown)
        return
    line, counted, after, fix = 1, 0, "[", "make the file one JSON list of objects: [{...}, {...}]"
    while after in ("[", ","):
        at = skip(at + 1)
        if after == "[" and text[at : at + 1] == "]":
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else at
            yield Problem(f"{shown}:{line + text.count(chr(10), counted, at)}", _json_fault(error), fix)
            return
        yield _row(f"{shown}:{line}", value)
        at = skip(end)
        after = text[at : at + 1]
    if text[at : at + 1] != "]" or skip(at + 1) != len(text):
        where = f"{shown}:{1 + text.count(chr(10), 0, at)}"
        yield Problem(where, "not JSON: the list does not end where it should", fix)


def _one_object(text: str, shown: str) -> list[Row | Problem]:
    """The problem of a file that is a single object over several lines; empty for anything else."""
    try:
        value = json.loads(text) if "\n" in text.strip() else None
    except (ValueError, RecursionError):
        return []
    if not isinstance(value, dict):
        return []
    lists = [key for key, rows in value.items() if isinstance(rows, list)]
    fix = f"take the rows out of it, for example: jq .{lists[0]}" if lists else "put [ and ] around it"
    return [Problem(f"{shown}:1", f"one object, not a list of rows (it has: {_names(value)})", fix)]


def _csv(path: Path, shown: str) -> Iterator[Row | Problem]:
    """Comma-separated values with a header line; a row's line is the one it starts on."""
    reader = csv.reader(io.StringIO(_decode(path.read_bytes(), shown), newline=""), strict=True)
    fix = 'give every row the header\'s columns; put values that hold commas, quotes or line breaks in "..."'
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
            header = cells
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                yield Problem(where, f"column {twice[0]!r} is there twice", "rename one of the columns")
                return
        elif cells and len(cells) != len(header):
            yield Problem(where, f"has {len(cells)} values for the header's {len(header)} columns", fix)
        elif cells:
            yield Row(where, dict(zip(header, cells, strict=True)))


def _parquet(path: Path, shown: str) -> Iterator[Row | Problem]:
    """Parquet, in batches; there are no lines, so a row is named by its number."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{shown}: Parquet needs pyarrow", hint="pip install 'fleetune[parquet]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{shown}:row {number}", value)
    except pyarrow.ArrowException as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{shown}: not Parquet: {first}", hint="download or write the file again") from error


READERS: Mapping[str, Callable[[Path, str], Iterator[Row | Problem]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


# Forms: a row's fields become an Example.


def _form(fields: Mapping[str, object]) -> str:
    """The form that the fields tell, "" if none."""
    for name, (turns, _, _) in CHATS.items():
        if turns in fields:
            return name
    fits = [name for name, (prompt, _, answer, _) in PAIRS.items() if prompt in fields and answer in fields]
    if len(fits) > 1:
        raise _BadRow("has both field 'response' (Dolly) and field 'output' (Alpaca)", "keep one of them")
    return fits[0] if fits else ""


def _no_form(fields: Mapping[str, object]) -> NoReturn:
    """The problem of a first row that is in no form."""
    if "instruction" in fields:
        what = "field 'response' (Dolly) or 'output' (Alpaca) is missing"
    else:
        what = "field 'instruction', 'messages' or 'conversations' is missing"
    raise _BadRow(
        f"{what} (the row has: {_names(fields)})",
        "name the fields instruction, context, response (Dolly); instruction, input, output (Alpaca); "
        "conversations (ShareGPT); or messages (chat)",
    )


def _pair(fields: Mapping[str, object], form: str) -> Example:
    """A Dolly or Alpaca row."""
    ask, given, answer, join = PAIRS[form]
    for other, (_, other_given, _, _) in PAIRS.items():
        if other != form and other_given in fields and given not in fields:
            raise _BadRow(
                f"field {other_given!r} is of the {other} form, the others are of the {form} form",
                f"rename {other_given!r} to {given!r}",
            )
    instruction = _text(fields, ask)
    context = _text(fields, given, may_lack=True)
    prompt = instruction + join + context if context.strip() else instruction
    return Example((("user", prompt),), _text(fields, answer), _meta(fields, (ask, given, answer)))


def _chat(fields: Mapping[str, object], form: str) -> Example:
    """A ShareGPT or chat-messages row."""
    key, speaker, says = CHATS[form]
    turns = fields.get(key)
    if not isinstance(turns, list) or not turns:
        what = f"is {_seen(turns)}" if key in fields else "is missing"
        raise _BadRow(
            f"field {key!r} {what}", f"make {key!r} a list of {{{speaker}, {says}}}, question first"
        )
    messages: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        label = f"{key}[{number}]"
        if not isinstance(turn, dict):
            raise _BadRow(f"field {label!r} is {_seen(turn)}", f"write each turn as {{{speaker}, {says}}}")
        role = ROLES.get(_text(turn, speaker, label=label))
        if role is None or (role == "system" and number > 0):
            roles = "system (first turn only), user (or human), assistant (or gpt)"
            raise _BadRow(f"field '{label}.{speaker}' is {_seen(turn[speaker])}", f"the roles are {roles}")
        messages.append((role, _text(turn, says, label=label, may_lack=role == "system")))
    *prompt, (last, response) = messages
    if last != "assistant":
        raise _BadRow(
            f"field {key!r}: the last turn is from the {last}", "end each row with the assistant's answer"
        )
    if not prompt or prompt[-1][0] != "user":
        before = f"from the {prompt[-1][0]}" if prompt else "missing"
        raise _BadRow(
            f"field {key!r}: the turn before the answer is {before}", "put the user's turn before it"
        )
    return Example(tuple(prompt), response, _meta(fields, (key,)))


def _text(fields: Mapping[str, object], name: str, *, label: str = "", may_lack: bool = False) -> str:
    """The text of field `name`; `may_lack` lets it be absent, null or empty."""
    path = f"{label}.{name}" if label else name
    value = fields.get(name)
    if value is None and may_lack:
        return ""
    if name not in fields:
        raise _BadRow(
            f"field {path!r} is missing (there are: {_names(fields)})", f"add {name!r} to these rows"
        )
    if not isinstance(value, str):
        raise _BadRow(f"field {path!r} is {_seen(value)}, not text", f"write {name!r} as text")
    if not value.strip() and not may_lack:
        raise _BadRow(f"field {path!r} is empty", f"fill in {name!r}, or delete these rows")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise _BadRow(f"field {path!r} holds {half}, half a character", "write the text out again") from error
    return value


def _meta(fields: Mapping[str, object], used: Iterable[str]) -> dict[str, str]:
    """The fields besides `used` that are single values, as text (true and false as JSON writes them)."""
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in fields.items()
        if name not in used and value is not None and not isinstance(value, list | dict)
    }


def _seen(value: object) -> str:
    """A wrong value in few words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    kind = "text" if isinstance(value, str) else "number" if isinstance(value, int | float) else "value"
    written = repr(value)
    return f"the {kind} {written if len(written) <= 40 else written[:37] + '...'}"


def _names(fields: Mapping[str, object]) -> str:
    return ", ".join(map(str, itertools.islice(fields, 12))) or "no fields"


# What can be wrong with a file as a whole.


def _decode(raw: bytes, shown: str) -> str:
    """UTF-8 text, without a byte-order mark; DataError names the line that is not."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{shown}:{raw.count(10, 0, error.start) + 1}"
        raise DataError(
            f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x})", hint=_utf8_fix(shown)
        ) from error


def _utf8_fix(shown: str) -> str:
    return f"save it as UTF-8, for example: iconv -f latin1 -t utf-8 {shown}"


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return f"not JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}"


def _unreadable(shown: str, error: OSError) -> DataError:
    return DataError(
        f"cannot read {shown}: {error.strerror or error}", hint="check the file and its permissions"
    )


def _no_file(source: str) -> DataError:
    """Why `source` is no file, with the neighbours that it may have meant."""
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        inside = [name for name in _listing(path) if Path(name).suffix.lower() in READERS]
        hint = f"give one file of it, such as {path / inside[0]}" if inside else "give a file"
        return DataError(f"{source} is a folder, not a file", hint=hint)
    if not os.path.isdir(path.parent):
        return DataError(f"no file {source}: there is no folder {path.parent}", hint="check the path")
    data = [name for name in _listing(path.parent) if Path(name).suffix.lower() in READERS][:5]
    there = f"data files there: {', '.join(data)}" if data else "check the path"
    return DataError(f"no file {source}", hint=_meant(source) or there)


def _meant(source: str) -> str:
    """A question with the files whose names are close to `source`, "" if there are none."""
    path = Path(os.path.expanduser(source))
    near = difflib.get_close_matches(path.name, [*_listing(path.parent), "demo"], n=3, cutoff=0.5)
    meant = [name if name == "demo" else str(path.parent / name) for name in near]
    return f"did you mean {' or '.join(meant)}?" if meant else ""


def _listing(folder: Path) -> list[str]:
    """The names of the files in a folder, sorted; none of a folder that may not be listed."""
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError:
        return []


# The hub.


def _hub(source: str, offline: bool) -> list[tuple[Path, str]]:
    """The training files of a hub data set, fetched into the hub's own cache."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    repo, _, wanted = source.partition(":")
    cached = _hub_cache(Path(constants.HF_HUB_CACHE), repo)
    offline = offline or constants.HF_HUB_OFFLINE
    reason = "working offline"
    if not offline:
        try:
            info = hub.HfApi().dataset_info(repo, timeout=15)
            names = _train_files([file.rfilename for file in info.siblings or []], repo, wanted)
            return [
                (Path(hub.hf_hub_download(repo, name, repo_type="dataset")), f"{repo}:{name}")
                for name in names
            ]
        except errors.GatedRepoError as error:
            hint = f"accept its terms at https://huggingface.co/datasets/{repo}, then: hf auth login"
            raise DataError(f"the data set {repo!r} is gated", hint=hint) from error
        except errors.RepositoryNotFoundError as error:
            hint = (
                _meant(source) or "check the name, or give a file's path; a private set needs `hf auth login`"
            )
            raise DataError(f"{repo!r} is no file here and no data set on the hub", hint=hint) from error
        except DataError:
            raise
        except Exception as error:  # the hub library's transports raise types of their own, by version
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if cached is None:
        raise DataError(
            f"{repo!r} is no file here, and the hub cannot be asked for it: {reason}",
            hint=_meant(source)
            or "check the path or the connection, or download the data elsewhere and give the file's path; "
            "the set `demo` is always there",
        )
    log.log(
        logging.INFO if offline else logging.WARNING, "data set %s comes from the cache: %s", repo, reason
    )
    there = [p.relative_to(cached).as_posix() for p in sorted(cached.rglob("*")) if p.is_file()]
    return [(cached / name, f"{repo}:{name}") for name in _train_files(there, repo, wanted)]


def _hub_cache(cache: Path, repo: str) -> Path | None:
    """The folder of `repo`'s cached main revision, if there is one."""
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return snapshot if snapshot.is_dir() else None


def _train_files(names: Sequence[str], repo: str, wanted: str) -> list[str]:
    """The files, in parts or one, of `wanted` or else of the training split.

    That is the one set named train, or the only one not named as another split; of several file types the
    first of `READERS`.
    """
    if wanted in names:
        return [wanted]
    sets: dict[str, list[str]] = {}
    for name in sorted(names):
        if Path(name).suffix.lower() in READERS and not NOT_DATA.search(name):
            sets.setdefault(SHARD.sub("", name), []).append(name)
    if wanted:
        best = [wanted] if wanted in sets else []
        what = f"no file {wanted!r}"
    else:
        split = {name: SPLIT.findall(name.lower())[-1:] for name in sets}
        fits = [name for name in sets if split[name] == ["train"]] or [
            name for name in sets if not split[name]
        ]
        rank = {name: list(READERS).index(Path(name).suffix.lower()) for name in fits}
        best = [name for name in fits if rank[name] == min(rank.values())]
        what = "several training files" if best else "no training file"
    if len(best) != 1:
        some = ", ".join(list(sets)[:8]) or "none that can be read"
        raise DataError(f"data set {repo!r} has {what}", hint=f"name one, as {repo}:FILE; data files: {some}")
    parts = sets[best[0]]
    shard = SHARD.search(parts[0])
    if shard and int(shard[2]) != len(parts):
        raise DataError(
            f"data set {repo!r}: {len(parts)} of the {int(shard[2])} parts of {best[0]} are there",
            hint="fetch it again with a connection",
        )
    return parts
