"""Write files and folders atomically, lock them against other processes, and turn the system's errors into clear ones.

A folder is made under a hidden name beside its place, locked by its process, and renamed.  What a killed process leaves is
unlocked, and `sweep` removes it.
"""

import errno
import importlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from fleetune.errors import FleetuneError, StorageError, UsageError

log = logging.getLogger(__name__)

WRITABLE: Final = "choose a place that you can write to"
FULL: Final = "free some space, then repeat the command"
PRIVATE: Final = 0o600  # the mode of a file that holds rows of people, or what was learned from them
# numpy's words where the disk takes less than it is given, without the system's number
SHORT: Final = re.compile(r"\d+ requested and \d+ written")


def default_mode() -> int:
    """Return the mode that a plain `open` would give a new file under the current umask."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def regular(path: str, flags: int, mode: int = 0o666) -> int:
    """Open a file, as the `opener` of `open`; OSError for a pipe or a device, which would be waited for without end."""
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), mode)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # `open` itself refuses a folder
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, "it is not a regular file", path)


def regular_private(path: str, flags: int) -> int:
    """Open a file as `regular` does; one that is made is the owner's alone."""
    return regular(path, flags, PRIVATE)


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file; OSError as the system gives."""
    with open(path, "rb", opener=regular) as file:
        return file.read()


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Return the text of a regular file in UTF-8; OSError as the system gives, UnicodeDecodeError for other bytes."""
    with open(path, encoding="utf-8", errors=errors, opener=regular) as file:
        return file.read()


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Return the JSON object in a file; StorageError, with `hint`, when it is missing or damaged."""
    try:
        found = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise StorageError(f"{path} is gone", hint=hint) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged ({error})", hint=hint) from error
    if not isinstance(found, dict):
        raise StorageError(f"{path} is damaged (it holds a {type(found).__name__}, not a table)", hint=hint)
    return found


def read_openssh_key(
    path: Path,
    load: Callable[[bytes], Any],
    kind: type[Any],
    of: str,
    hint: str,
    error: type[FleetuneError] = UsageError,
) -> Any:
    """Return a key that `load` makes of the file, of this kind (`of`: in words); the error, with a hint, where it has none."""
    try:
        key = load(path.read_bytes())
    except OSError as fault:
        raise error(f"cannot read the key {path}: {fault.strerror}", hint=hint) from fault
    except Exception as fault:
        raise error(f"{path} is not an OpenSSH key {of} without a password ({fault})", hint=hint) from fault
    if not isinstance(key, kind):
        raise error(f"{path} is not an OpenSSH key {of}", hint=hint)
    return key


def json_text(content: Mapping[str, Any]) -> str:
    """Return an object as the text of a JSON file."""
    return json.dumps(dict(content), indent=1, ensure_ascii=False) + "\n"


def finite(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content as strict JSON holds it: a number that is not finite is None, as it is in an event."""
    text = json.dumps(
        dict(content), default=lambda value: value.item() if hasattr(value, "item") else str(value)
    )
    found: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return found


def write_atomic(path: Path, data: bytes | str | Iterable[bytes], *, mode: int | None = None) -> None:
    """Write `data`, whole or in pieces, to a temporary file beside `path`, flush it to the disk, and rename it into place.

    `mode` is the file's mode (default: by the umask).  StorageError when the disk is full, read-only or
    the folder is missing, or where `path` is a device, a pipe or a folder, which renaming would replace; then `path`
    is what it was.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise StorageError(f"{path} is not a regular file", hint="give the name of a file")
    raw = data.encode() if isinstance(data, str) else data
    pieces = [raw] if isinstance(raw, bytes | bytearray) else raw
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, default_mode() if mode is None else mode)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that a rename survives a power loss; not on Windows, which cannot open folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """Let a full disk's hint name the command that goes on with the job in the block."""
    try:
        yield
    except StorageError as error:
        if error.hint == FULL:
            error.hint = f"free some space, then: {command}   (nothing written before is lost)"
        raise


def storage_error(error: OSError, path: Path) -> StorageError:
    """Return the StorageError for an operating-system error met while writing `path`."""
    reasons = {
        errno.ENOSPC: ("the disk is full", FULL),
        errno.EDQUOT: ("the disk quota is used up", FULL),
        errno.EROFS: ("the file system is read-only", WRITABLE),
        errno.EACCES: ("permission denied", WRITABLE),
        errno.EPERM: ("not permitted", WRITABLE),
        errno.ENOENT: ("the folder is gone", "choose a folder that exists"),
        errno.ENOTDIR: ("a file stands where a folder is needed", "choose another place"),
    }
    number = errno.ENOSPC if error.errno is None and SHORT.fullmatch(str(error)) else error.errno
    what, hint = reasons.get(number or 0, (error.strerror or str(error), "check the disk and the folder"))
    return StorageError(f"cannot write {path}: {what}", hint=hint)


LOCK_RETRY: Final = 0.1  # between two tries, where the system does not wait for us


def lock(handle: int, *, wait: bool = False) -> bool:
    """Lock an open file descriptor; False where another process has the lock.  With `wait`, wait for it instead.

    OSError where the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_byte(handle, wait)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def still_names(path: Path, handle: int) -> bool:
    """Tell whether `path` still names the open file: who had its lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _lock_byte(handle: int, wait: bool) -> bool:
    msvcrt = importlib.import_module("msvcrt")
    while True:
        os.lseek(handle, 0, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            if not wait:
                return False
            time.sleep(LOCK_RETRY)
        else:
            return True


# how a file is opened to be flushed: Windows wants it open for writing
FLUSH: Final = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY
HIDDEN: Final = ".fleetune.tmp"  # of a hidden folder that is being written


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Give a new hidden folder `.NAME.*.fleetune.tmp` in `parent`, which goes when the block ends; sweep `parent` first.

    A killed process leaves it behind, until another one makes a hidden folder there.  OSError as the system gives.
    """
    sweep(parent)
    folder, handle = _held(parent, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def sweep(parent: Path) -> int:
    """Remove the hidden folders in `parent` that killed processes left, and count them; one that a process still holds stays."""
    swept = 0
    for folder in parent.glob(f".*{HIDDEN}"):
        try:
            handle = _lock_folder(folder)
        except OSError as error:  # gone meanwhile, or folders cannot be locked here
            log.debug("%s is left alone: %s", folder, error)
            continue
        if handle is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)
            swept += 1
    return swept


def _held(parent: Path, name: str) -> tuple[Path, int | None]:
    """Make a hidden folder and lock it: (folder, open handle); without a handle where folders cannot be locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=HIDDEN, dir=parent))
        try:
            handle = _lock_folder(folder)
        except OSError:
            if folder.exists():
                return folder, None
            continue  # swept before it was locked
        if handle is not None:
            return folder, handle


def _lock_folder(folder: Path) -> int | None:
    """Lock a folder and return its open handle; None where another process has it.  OSError where it cannot be locked."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if lock(handle) and still_names(folder, handle):
            return handle
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return None


@contextmanager
def staged(target: Path, *, replace: str | None = None, private: bool = False) -> Iterator[Path]:
    """Give a hidden folder beside `target` that becomes `target` when the block ends without an error.

    Files and folders get the mode that the umask gives (`private`: the owner's alone) and are flushed to the disk before
    the rename.  An existing `target` stays: StorageError (another process was faster).  With `replace`, a file's
    name, a target that is empty or holds that file is replaced; StorageError if it is something else.  An
    operating-system error in the block becomes a StorageError; `target` is as it was.
    A killed process leaves at most a folder that the next `scratch` there removes.
    """
    _check_replace(target, replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch(target.parent, target.name) as temporary:
            yield temporary
            _flush_tree(temporary, PRIVATE if private else default_mode())
            _rename(temporary, target, replace)
    except OSError as error:
        raise storage_error(error, target) from error


def _check_replace(target: Path, replace: str | None) -> None:
    if replace is None or not target.exists() or (target / replace).is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise StorageError(
            f"{target} exists and holds something else; it is left alone",
            hint="choose a new folder with --out",
        )


def _flush_tree(folder: Path, mode: int) -> None:
    """Give files this mode and folders the one that goes with it, and flush them to the disk."""
    enter = mode | (mode & 0o444) >> 2  # who may read a folder may enter it
    for path in [*folder.rglob("*"), folder]:
        path.chmod(enter if path.is_dir() else mode)
        if path.is_dir() and sys.platform == "win32":
            continue  # folders cannot be flushed there
        handle = os.open(path, FLUSH)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rename(temporary: Path, target: Path, replace: str | None) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    if replace is None:
        raise appeared(target)
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def appeared(target: Path) -> StorageError:
    """Return the error for a place that was free when the work began, and is taken at its end."""
    return StorageError(
        f"{target} has appeared meanwhile; it is left alone, and what was to be written there is dropped",
        hint="choose a new place",
    )


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold `target`'s lock file, waiting for another process; remove what a killed process left behind.

    The lock's file goes at the end, whatever became of the block; one that a kill leaves behind is nobody's.
    Where the system has no file locks the block runs without one: `staged` alone is already safe.
    """
    place = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, alone = _acquired(place, target)
    except OSError as error:
        raise storage_error(error, target) from error
    try:
        if alone:
            for stale in target.parent.glob(f".{target.name}.*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
        yield
    finally:
        if alone:
            with suppress(OSError):  # Windows removes no file that is open
                place.unlink()
        os.close(handle)


def _acquired(place: Path, target: Path) -> tuple[int, bool]:
    """Open a lock file and take its lock, waiting for it: (open handle, whether the file system has locks)."""
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock(handle):
                log.info("another process is preparing %s; waiting for it", target)
                lock(handle, wait=True)
        except OSError as error:
            log.debug("no file lock for %s (%s)", target, error)
            return handle, False
        if still_names(place, handle):
            return handle, True
        os.close(handle)  # who had it has removed it meanwhile
