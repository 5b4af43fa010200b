"""Find the files of a data set (on the hub, in its cache, in a folder), and store rows from standard input for a later resume."""

import hashlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Final

from fleetune.common.display import counted
from fleetune.common.files import PRIVATE, write_atomic
from fleetune.data.forms import CLIENT
from fleetune.data.readers import (
    READERS,
    TEXT,
    FileRow,
    Note,
    Problem,
    names_in,
    rows_of,
    suggest_files,
    whole,
)
from fleetune.errors import DataError, called

log = logging.getLogger(__name__)

SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?(?=\.\w+$)")
SPLIT = re.compile(r"(?<![a-z])(train|test|valid|validation|val|eval|dev)(?![a-z])")
VALIDATION = ("valid", "validation", "val", "eval", "dev")
NOT_DATA = re.compile(r"(^|/)(\.[^/]*|dataset_infos?\.json|dataset_dict\.json|state\.json)$")


def hub_files(source: str, offline: bool) -> list[tuple[Path, str]]:
    """Fetch the training files of a hub data set into the hub's own cache."""
    from huggingface_hub import constants

    repo, _, wanted = source.partition(":")
    cached = _hub_cache(Path(constants.HF_HUB_CACHE), repo)
    offline = offline or constants.HF_HUB_OFFLINE
    reason = "working offline"
    if not offline:
        try:
            return _download(source, repo, wanted)
        except DataError:
            raise
        except Exception as error:  # the hub library's transports raise types of their own, by version
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if cached is None:
        raise DataError(
            f"{repo!r} is no file here, and the hub cannot be asked for it: {reason}",
            hint=suggest_files(source)
            or "check the path or the connection, or download the data elsewhere and give the file's path; "
            "the set `demo` is always there",
        )
    log.log(
        logging.INFO if offline else logging.WARNING, "data set %s comes from the cache: %s", repo, reason
    )
    there = [p.relative_to(cached).as_posix() for p in sorted(cached.rglob("*")) if p.is_file()]
    return [(cached / name, f"{repo}:{name}") for name in _train_files(there, repo, wanted)]


def _download(source: str, repo: str, wanted: str) -> list[tuple[Path, str]]:
    """Download the files; DataError when the hub refuses, the hub library's errors when it cannot be reached."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        info = hub.HfApi().dataset_info(repo, timeout=15)
        names = _train_files([file.rfilename for file in info.siblings or []], repo, wanted)
        return [
            (Path(hub.hf_hub_download(repo, name, repo_type="dataset")), f"{repo}:{name}") for name in names
        ]
    except errors.GatedRepoError as error:
        hint = f"accept its terms at https://huggingface.co/datasets/{repo}, then: hf auth login"
        raise DataError(f"the data set {repo!r} is gated", hint=hint) from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the name, or give a file's path; a private set needs `hf auth login`"
        raise DataError(
            f"{repo!r} is no file here and no data set on the hub", hint=suggest_files(source) or hint
        ) from error


def _hub_cache(cache: Path, repo: str) -> Path | None:
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return snapshot if snapshot.is_dir() else None


def _train_files(names: Sequence[str], repo: str, wanted: str) -> list[str]:
    """Return the files (one or several parts) of `wanted`, or else of the training split.

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


def folder_rows(
    source: str, limit: int | None = None, note: Note = lambda text: None
) -> Iterator[FileRow | Problem]:
    """Yield the rows of all files of a folder, in the order of their names, each with the field `client`.

    With a `limit`, every client gives its first rows, as many as the others where it has them; `note` is told when some
    clients give none.  DataError for a folder without such files, with two of one client, or with the splits of one data set.
    """
    found = folder_files(source)
    shares = (
        _shares([sum(1 for _ in islice(rows_of(*one), limit)) for one in found], limit) if limit else None
    )
    if shares and (without := shares.count(0)):
        note(
            f"the limit of {counted(limit, 'row')} leaves {without:,} of {counted(len(found), 'client')} without any"
        )
    for at, (file, name) in enumerate(found):
        for row in islice(rows_of(file, name, note), shares[at] if shares else None):
            yield row if isinstance(row, Problem) else FileRow(row.where, {**row.fields, CLIENT: file.stem})


def _shares(sizes: Sequence[int], limit: int) -> list[int]:
    shares, left = [0] * len(sizes), limit
    while left and (open_ := [at for at, size in enumerate(sizes) if shares[at] < size]):
        each = max(1, min(left // len(open_), min(sizes[at] - shares[at] for at in open_)))
        for at in open_[: left // each]:
            shares[at] += each
            left -= each
    return shares


def folder_files(source: str) -> list[tuple[Path, str]]:
    """Return the files of a folder's clients, in the order of their names, each with the name to show for it."""
    folder = Path(os.path.expanduser(source))
    return [(file, whole(f"{source.rstrip('/')}/{file.name}")) for file in _checked(folder, source)]


def _checked(folder: Path, source: str) -> list[Path]:
    files = _files(folder)
    if not files:
        raise DataError(
            f"{source} is a folder without a file of rows ({', '.join(READERS)})",
            hint="give a file, or a folder with one file per client",
        )
    if (folder / "config.json").is_file():
        raise DataError(f"{source} is the folder of a model, not of rows", hint="fleetune tune MODEL DATA")
    if by_split := _by_split(files):
        raise DataError(
            f"{source} has the splits of one data set, not a file per client: {', '.join(f.name for f in files[:5])}",
            hint=f"give one of them, such as {by_split['train'][0]}",
        )
    stems = [file.stem for file in files]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise DataError(
            f"{source} has two files of client {twice[0]!r}", hint="keep one file per client in the folder"
        )
    return files


def _files(folder: Path) -> list[Path]:
    """Return the files of rows in a folder; plain texts only where there is nothing else, since others may explain the rows."""
    files = [
        folder / n for n in names_in(folder) if Path(n).suffix.lower() in READERS and not NOT_DATA.search(n)
    ]
    return [file for file in files if file.suffix.lower() != TEXT] or files


def _by_split(files: Sequence[Path]) -> dict[str, list[str]]:
    """Return the files of each split where all files have one, and one is for training; {} for others."""
    found: dict[str, list[str]] = {}
    for file in files:
        split = SPLIT.findall(file.stem.lower())[-1:] or [""]
        found.setdefault("valid" if split[0] in VALIDATION else split[0], []).append(str(file))
    return found if "train" in found and "" not in found else {}


def splits(source: str) -> tuple[str, str] | None:
    """Return (training file, validation file) of a folder with the splits of one data set, as mlx-lm has it; None for others.

    The second is "" where there is none: a test set is for the end.
    """
    found = _by_split(_files(Path(os.path.expanduser(source))))
    train, valid = found.get("train", []), found.get("valid", [])
    return (train[0], "".join(valid)) if len(train) == 1 and len(valid) <= 1 else None


def shown_of(source: str) -> str:
    """Return what a source is called in messages: rows from a DataFrame and the like lie in a file that nobody has named."""
    return "the given data" if Path(source).match(f"objects/data-{'?' * 16}.jsonl") else source


STDIN: Final = "-"
STDIN_SHOWN: Final = "standard input"
PIPED: Final = "pipe them in, one JSON object a line: cat rows.jsonl | fleetune tune MODEL -"


def store_stdin(folder: Path) -> Path:
    """Read standard input to its end, and return the JSONL file in `folder` that holds it.

    DataError where nothing came.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("- stands for rows from standard input, and none are piped into it", hint=PIPED)
    raw = sys.stdin.buffer if hasattr(sys.stdin, "buffer") else sys.stdin
    content = raw.read()
    content = content if isinstance(content, bytes) else content.encode()
    if not content.strip():
        raise DataError(f"no row came from {STDIN_SHOWN}", hint=PIPED)
    folder.mkdir(parents=True, exist_ok=True)
    return store_rows(content, folder)


def store_rows(content: bytes, folder: Path) -> Path:
    """Write rows as JSONL into a private file named by their digest, once."""
    file = folder / f"data-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    if not file.is_file() or file.read_bytes() != content:
        write_atomic(file, content, mode=PRIVATE)
    return file


@contextmanager
def borrowed(source: str) -> Iterator[str]:
    """Yield the name of a source that is read and then forgotten: rows from standard input lie in a file meanwhile.

    An error in the block names standard input in place of that file, which is gone by then.
    """
    if source != STDIN:
        yield source
        return
    with (
        tempfile.TemporaryDirectory(prefix="fleetune-rows-") as folder,
        called(file := store_stdin(Path(folder)), STDIN_SHOWN),
    ):
        yield str(file)
