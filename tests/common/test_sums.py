# SPDX-License-Identifier: Apache-2.0
"""The list of a folder's digests: that of sha256sum; what differs from it, and a damaged list, are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fleetune.common import sums
from fleetune.errors import FleetuneError


def test_the_list_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b c", "a", "README.md", "in/d"):
        (tmp_path / name).write_text(name)
    sums.write(tmp_path)
    assert [line[64:] for line in (tmp_path / sums.FILE).read_text().splitlines()] == [
        "  a",
        "  b c",
        "  in/d",
    ]
    assert (tmp_path / sums.FILE).read_text().startswith(hashlib.sha256(b"a").hexdigest())
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
