# SPDX-License-Identifier: Apache-2.0
"""The head of a .gguf file: what the package gguf reads, and no file that is not whole."""

from __future__ import annotations

from pathlib import Path

import gguf as package
import pytest
from deploy_harness import compressed, tiny
from serve_harness import little_file

from fleetune.deploy.export import export
from fleetune.errors import ModelError, UsageError
from fleetune.models.gguf import header


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    compressed(tiny(), folder / "m")
    return export(folder / "m", "gguf", folder / "x.gguf").path


def test_it_says_what_the_package_reads(file: Path) -> None:
    head, reader = header.check(file), package.GGUFReader(file)
    single = {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and field.types[0] != package.GGUFValueType.ARRAY
    }
    assert {key: value for key, value in head.values.items() if value is not None} == single
    assert head.tensors == len(reader.tensors)
    assert head.size == max(t.data_offset + t.n_bytes for t in reader.tensors)
    assert head.size == file.stat().st_size


def test_no_file_that_was_cut_anywhere_is_taken(file: Path, tmp_path: Path) -> None:
    whole, cut = file.read_bytes(), tmp_path / "cut.gguf"
    start = min(t.data_offset for t in package.GGUFReader(file).tensors)
    for length in [*range(0, start, 97), start, len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"is cut off|is not a GGUF file"):
            header.check(cut)
    cut.write_bytes(whole)
    header.check(cut)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04" + bytes(60), "is not a GGUF file"),
        (b"GGUF" + bytes(60), "its head cannot be read"),
        (b"GGUF\x00\x00\x00\x03" + bytes(60), "its head cannot be read"),  # big-endian
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 60, "its head cannot be read"),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), "holds no tensors"),
    ],
)
def test_what_is_no_such_file(raw: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(ModelError, match=why):
        header.check(tmp_path / "x.gguf")


def test_an_adapter_is_named_as_one(tmp_path: Path) -> None:
    header.check(little_file(tmp_path / "x.gguf"))
    with pytest.raises(UsageError, match="is an adapter, not a model") as caught:
        header.check(little_file(tmp_path / "y.gguf", "adapter"))
    assert "--lora" in (caught.value.hint or "")


def test_a_type_that_is_not_known_here_is_left_to_the_engine(tmp_path: Path) -> None:
    path = little_file(tmp_path / "x.gguf")
    raw = path.read_bytes()
    at = raw.index(b"token_embd.weight") + 17 + 4 + 16
    assert raw[at : at + 4] == bytes(4)  # F32
    path.write_bytes(raw[:at] + b"\xe7\x03\x00\x00" + raw[at + 4 :])
    header.check(path)
