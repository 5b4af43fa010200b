# SPDX-License-Identifier: Apache-2.0
"""Locks of folders that are made by one process."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.common import folders

COUNT = """
import sys
from pathlib import Path
from fleetune.common.folders import locked
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


def test_a_lock_that_its_holder_has_removed_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before it was removed, locked after: whoever makes the file anew would have the target as well."""
    real, opened, file = folders.lock, list[int](), tmp_path / ".m.lock"

    def lock(handle: int) -> bool:
        opened.append(handle)
        if len(opened) == 1:
            file.unlink()
        return real(handle)

    monkeypatch.setattr(folders, "lock", lock)
    with folders.locked(tmp_path / "m"):
        assert len(opened) == 2
        assert file.is_file()
    assert not list(tmp_path.iterdir())


def test_a_file_whose_lock_is_not_had_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks are not to be had now, another process may have it."""

    def lock(handle: int) -> bool:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(folders, "lock", lock)
    with folders.locked(tmp_path / "m"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".m.lock"]
