"""Atomic files: whatever goes wrong, and whenever, a file is the old one or the new one."""

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fleetune.common import files, sums
from fleetune.common.files import default_mode, read_bytes, read_text, regular, storage_error, write_atomic
from fleetune.deploy.again import tensors_of
from fleetune.deploy.verify import Parents, links
from fleetune.errors import FleetuneError, StorageError


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_writes_bytes_and_text_and_replaces(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    write_atomic(path, "äß\n")
    assert path.read_bytes() == "äß\n".encode()
    write_atomic(path, b"")
    assert path.read_bytes() == b""
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_the_mode_follows_the_umask_unless_it_is_given(tmp_path, mask):
    with umask(mask):
        assert default_mode() == 0o666 & ~mask
        write_atomic(tmp_path / "usual", b"x")
        write_atomic(tmp_path / "secret", b"x", mode=0o600)
        assert os.umask(mask) == mask  # left as it was
    assert mode(tmp_path / "usual") == 0o666 & ~mask
    assert mode(tmp_path / "secret") == 0o600


def test_the_new_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        fact = os.fstat(handle)
        order.append(("fsync folder", 0) if stat.S_ISDIR(fact.st_mode) else ("fsync", fact.st_size))
        fsync(handle)

    def replaced(source: str, target: Path) -> None:
        order.append(("replace", os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomic(tmp_path / "file", b"12345")
    assert order == [("fsync", 5), ("replace", 5), ("fsync folder", 0)]


REASONS = [
    (errno.ENOSPC, "the disk is full", "free some space, then repeat the command"),
    (errno.EROFS, "read-only", "can write to"),
    (errno.ENOENT, "folder is gone", "a folder that exists"),
    (errno.EIO, os.strerror(errno.EIO), "check the disk"),
]


@pytest.mark.parametrize(("code", "what", "hint"), REASONS)
@pytest.mark.parametrize("step", ["tempfile.mkstemp", "os.fsync", "os.chmod", "os.replace"])
def test_a_failure_at_any_step_leaves_the_old_file_alone(tmp_path, monkeypatch, step, code, what, hint):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr({"tempfile": tempfile, "os": os}[step.split(".")[0]], step.split(".")[1], fail)
    with pytest.raises(StorageError) as caught:
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert str(path) in caught.value.message
    assert what in caught.value.message
    assert hint in (caught.value.hint or "")
    assert "--" not in (caught.value.hint or "")  # not every command has that option
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_numpy_s_words_for_a_full_disk_are_understood(tmp_path):
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="written") as caught:
        np.zeros(1 << 16).tofile(full)
    told = storage_error(caught.value, tmp_path / "x.gguf")
    assert "the disk is full" in told.message
    assert "free some space" in (told.hint or "")


WRITER = """
import itertools, sys
from pathlib import Path
from fleetune.common.files import write_atomic
for i in itertools.count():
    write_atomic(Path(sys.argv[1]), b"ab"[i % 2 : i % 2 + 1] * 400_000)
    if i == 1:
        print("going", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file"
    for wait in (0.0, 0.003, 0.011, 0.029, 0.05):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline() == b"going\n"
            time.sleep(wait)
            writer.send_signal(signal.SIGKILL)
        assert writer.returncode == -signal.SIGKILL
        assert path.read_bytes() in (b"a" * 400_000, b"b" * 400_000)


@contextmanager
def at_once() -> Iterator[None]:
    """What takes ten seconds waits without end."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(10)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_a_pipe_or_a_device_in_a_files_place_is_an_error_not_waited_for(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "status"
    os.mkfifo(place) if kind == "pipe" else place.symlink_to("/dev/zero")
    for read in (read_bytes, read_text):
        with at_once(), pytest.raises(OSError, match="not a regular file"):
            read(place)
    if kind == "pipe":
        with at_once(), pytest.raises(OSError, match=r"No such device|not a regular file"):
            open(place, "ab", opener=regular)  # noqa: SIM115


def test_regular_files_and_folders_are_opened_as_ever(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with umask(0o027), open(file, "ab", opener=regular) as opened:
        opened.write("ü\r\n\xff".encode("latin-1"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert read_bytes(file) == b"\xfc\r\n\xff"
    assert read_text(file, errors="replace") == "\ufffd\n\ufffd"
    with pytest.raises(UnicodeDecodeError):
        read_text(file)
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(StorageError, match="is not a regular file"):
        write_atomic(pipe, b"x")
    assert pipe.is_fifo()
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_the_list_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b c", "a", "README.md", "in/d"):
        (tmp_path / name).write_text(name)
    sums.write(tmp_path)
    text = (tmp_path / sums.FILE).read_text()
    assert [line[64:] for line in text.splitlines()] == ["  a", "  b c", "  in/d"]
    known = hashlib.sha256(b"a").hexdigest()
    assert text.startswith(known)
    (tmp_path / sums.FILE).write_text(known[:60] + "0" * 4 + text[64:])
    assert all(f"{end}.." in next(sums.faults(tmp_path))[1] for end in (known[48:], "0000"))
    (tmp_path / sums.FILE).write_text(text)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "more").write_text("mine")
    sums.check(tmp_path, remedy="")
    (tmp_path / "a").write_text("b")
    sums.check(tmp_path, remedy="", only=["in/d"])
    (tmp_path / "in" / "d").unlink()
    assert [name for name, _ in sums.faults(tmp_path)] == ["a", "in/d"]


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\xff", b"abc  a\n", b"0" * 64 + b"  ../a\n", b"0" * 64 + b"  /a\n"]
)
def test_a_damaged_list_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / sums.FILE).write_bytes(content)
    with pytest.raises(FleetuneError, match=sums.FILE) as caught:
        sums.check(tmp_path, remedy="do it again")
    assert caught.value.hint == "do it again"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_a_pipe_in_the_place_of_the_list_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / sums.FILE)
    with at_once(), pytest.raises(FleetuneError, match="is damaged"):
        sums.check(tmp_path, remedy="")
    with at_once(), pytest.raises(FleetuneError, match="is damaged"):
        list(links(str(tmp_path), Parents(tmp_path)))
    os.mkfifo(tmp_path / "model.safetensors")
    with at_once(), pytest.raises(OSError, match="not a regular file"):
        list(tensors_of(tmp_path / "model.safetensors"))


COUNT = """
import sys
from pathlib import Path
from fleetune.common.files import locked
count = Path(sys.argv[1])
for _ in range(150):
    with locked(count):
        before = int(count.read_text())
        count.write_text(str(before + 1))
"""


def test_a_lock_is_had_by_one_though_its_file_goes_each_time(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    several = [subprocess.Popen([sys.executable, "-c", COUNT, str(count)]) for _ in range(4)]
    assert [one.wait(timeout=120) for one in several] == [0] * 4
    assert count.read_text() == "600"
    assert [p.name for p in tmp_path.iterdir()] == ["count"]


def test_a_lock_that_its_holder_removed_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before it was removed, locked after: whoever makes the file anew would have the target as well."""
    real, opened, file = files.lock, list[int](), tmp_path / ".m.lock"

    def lock(handle: int) -> bool:
        opened.append(handle)
        if len(opened) == 1:
            file.unlink()
        return real(handle)

    monkeypatch.setattr(files, "lock", lock)
    with files.locked(tmp_path / "m"):
        assert len(opened) == 2
        assert file.is_file()
    assert not list(tmp_path.iterdir())


def test_a_file_whose_lock_is_not_had_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks are not to be had now, another process may have it."""

    def lock(handle: int) -> bool:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files, "lock", lock)
    with files.locked(tmp_path / "m"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".m.lock"]
