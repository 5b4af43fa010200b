# SPDX-License-Identifier: Apache-2.0
"""Atomic files: whatever goes wrong, and whenever, a file is the old one or the new one."""

from __future__ import annotations

import errno
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

from fleetune.common.files import default_mode, read_bytes, read_text, regular, storage_error, write_atomic
from fleetune.errors import StorageError


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
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, step, code, what, hint
):
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
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"going\n"
            time.sleep(wait)
            writer.send_signal(signal.SIGKILL)
        assert writer.returncode == -signal.SIGKILL
        content = path.read_bytes()
        assert content in (b"a" * 400_000, b"b" * 400_000)


# --- regular files alone ------------------------------------------------------------------------------------


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
def test_a_pipe_or_a_device_in_a_files_place_is_an_error_and_is_not_waited_for(
    kind: str, tmp_path: Path
) -> None:
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
