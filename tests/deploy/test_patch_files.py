# SPDX-License-Identifier: Apache-2.0
"""Files of patches: which are read, and what is said of the others."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patch_harness import ledger_on
from safetensors import safe_open
from safetensors.numpy import save_file

from fleetune.deploy import patch, patch_make
from fleetune.errors import ModelError, VersionError

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_damaged_or_another_patch_is_named_as_such(file: Path, tmp_path: Path) -> None:
    ledger = ledger_on(file)[0]
    made = patch_make.of_ledger(file, ledger, inverse=True)
    patch.apply(file, patch_make.of_ledger(file, ledger))
    (tmp_path / "p").write_bytes(made.file)
    rewritten(tmp_path / "p", format=2)
    with pytest.raises(VersionError, match="p was written by another version of Fleetune"):
        patch.load(tmp_path / "p")
    raw = bytearray(made.file)
    raw[-40] ^= 4
    (tmp_path / "q").write_bytes(raw)
    with pytest.raises(ModelError, match=r"is damaged|would have SHA-256"):
        patch.apply(file, patch.load(tmp_path / "q"))
    with pytest.raises(ModelError, match="there is no patch"):
        patch.load(tmp_path / "nothing")


def test_a_file_that_is_no_patch_is_said_to_be_none(file: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a patch")
    save_file({"x": np.ones(2)}, tmp_path / "other", {"patch": "{"})
    for name in ("text", "other"):
        with pytest.raises(ModelError, match=f"{name} is no patch, or is damaged"):
            patch.load(tmp_path / name)


def rewritten(path: Path, **changed: object) -> Path:
    """A patch with other metadata, or with an array replaced."""
    with safe_open(str(path), framework="numpy") as opened:
        head = json.loads(opened.metadata()["patch"])
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    arrays |= {name: value for name, value in changed.items() if isinstance(value, np.ndarray)}
    head |= {name: value for name, value in changed.items() if not isinstance(value, np.ndarray)}
    save_file(arrays, path, {"patch": json.dumps(head)})
    return path


@pytest.mark.parametrize(
    "what",
    [
        {"K": 63},
        {"K": 1 << 40},
        {"places": None},
        {"run_key": 5},
        {"law": "none"},
        {"grid": "x"},
        {"run_key": "zz"},
        {"places": [[1, 2]]},
        {"places": [[0, "Q4_0", 1, 1, 0, 0]]},
        {"places": [[64, "Q9", 1, 1, 0, 0]]},
        {"places": [[64, "Q4_0", 5, 1, 2, 0]]},
        {"places": [[64, "Q4_0", 64, 2, 0, 0], [65, "Q4_0", 64, 2, 0, 0]]},
        {"id": np.arange(3, dtype=np.uint64)},
        {"coefficient": np.ones(40)},
        {"run_key": "f" * 40},
        {"run_key": "-5"},
        {"grid": float("nan")},
        {"grid": 1e400},
        {"grid": 1e39},
        {"K": "64"},
        {"base": None},
        {"result": "x" * 64},
        {"places": [[64, "Q4_0", 1 << 40, 1 << 40, 0, 0]]},
        {"law": "gaussian"},
        {"places": [[64, "Q4_0", 1, 1, 0, 1 << 80]]},
        {"places": []},
        {"places": [[True, "Q4_0", 1, 1, 0, 0]]},
        {"places": [[64, "Q4_0", 1, 1, 0, -4096]]},
    ],
)
def test_a_patch_that_states_what_cannot_be_is_refused(
    what: dict[str, object], file: Path, tmp_path: Path
) -> None:
    (tmp_path / "p").write_bytes(patch_make.of_ledger(file, ledger_on(file)[0]).file)
    with pytest.raises(ModelError):
        patch.load(rewritten(tmp_path / "p", **what))


@pytest.mark.parametrize(
    ("law", "K", "passes", "most", "said"),
    [
        (
            "rademacher",
            1,
            1,
            1 << 14,
            "16,385 passes with K = 1; at most 16,384 passes and 4,194,304 numbers",
        ),
        ("hashed", 2, 1 << 32, 1 << 14, "16,385 passes with K = 2; at most"),
        ("hashed", 1 << 20, 1 << 32, 4, "5 passes with K = 1,048,576; at most"),
        ("hashed", 1 << 24, 1 << 32, 0, "1 pass with K = 16,777,216; at most"),
    ],
)
def test_a_patch_that_asks_for_more_than_a_run_makes_is_refused_before_any_work(
    law: str, K: int, passes: int, most: int, said: str, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "p").write_bytes(patch_make.of_ledger(file, ledger_on(file)[0]).file)

    def asking(count: int) -> Path:
        ids = np.arange(count, dtype=np.uint64) * np.uint64(passes)
        return rewritten(tmp_path / "p", law=law, K=K, id=ids, coefficient=np.ones(count, np.int64))

    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=said):
            patch.load(asking(most + 1))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000, "the tables were made"
    finally:
        tracemalloc.stop()
    entries = patch.load(asking(most)).entries
    assert entries is not None
    assert entries.passes == most


def test_changes_that_unpack_to_more_or_less_are_refused(file: Path, tmp_path: Path) -> None:
    ledger = ledger_on(file)[0]
    made = patch_make.of_ledger(file, ledger, inverse=True)
    patch.apply(file, patch_make.of_ledger(file, ledger))
    before = file.read_bytes()
    for size in (0, 10, 10_000_000):
        (tmp_path / "p").write_bytes(made.file)
        packed = np.frombuffer(zlib.compress(bytes(size)), np.uint8)
        with pytest.raises(ModelError, match="its changes are not"):
            patch.apply(file, patch.load(rewritten(tmp_path / "p", changes=packed)))
    assert file.read_bytes() == before


@given(st.binary(max_size=3000), st.integers(0, 9), st.integers(1, 500), st.integers(1, 400))
def test_changes_unpack_in_any_pieces_without_the_rest_being_copied(
    raw: bytes, level: int, size: int, fed: int
) -> None:
    taken = list[int]()

    class Watched:
        def __init__(self) -> None:
            self.inner = zlib.decompressobj()

        def decompress(self, part: bytes, most: int) -> bytes:
            taken.append(len(part))
            return self.inner.decompress(part, most)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    packed = zlib.compress(raw, level)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patch, "FED", fed)
        patched.setattr(patch, "zlib", SimpleNamespace(decompressobj=Watched))
        unpack = patch._unpacker(memoryview(packed))
        for at in range(0, len(raw), size):
            part = raw[at : at + size]
            assert unpack(len(part), at + size >= len(raw)) == (part, True)
        assert max(taken, default=0) <= fed, "the rest is copied for each piece"
        for wrong in (packed[:-1], packed + b"x", zlib.compress(raw + b"x", level)):
            assert not patch._unpacker(memoryview(wrong))(len(raw), True)[1]
        assert not patch._unpacker(memoryview(packed))(len(raw) + 1, False)[1]
