# SPDX-License-Identifier: Apache-2.0
"""The head of a .gguf file: what the package gguf reads, and no file that is not whole."""

from __future__ import annotations

from pathlib import Path

import gguf as package
import numpy as np
import pytest
from deploy_harness import compressed, tiny

from fleetune import models
from fleetune.deploy.export import write as export
from fleetune.errors import ModelError
from fleetune.models.cache import cache
from fleetune.models.gguf import header


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    compressed(tiny(), folder / "m")
    return export(folder / "m", "gguf", folder / "x.gguf").path


def test_it_says_what_the_package_reads(file: Path) -> None:
    head, reader = header.check(file), package.GGUFReader(file)
    fields = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    assert head.values == fields
    assert [(t.name, t.kind, t.shape, t.offset, t.size) for t in head.tensors] == [
        (t.name, t.tensor_type.name, tuple(t.shape[::-1].tolist()), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    for ours, theirs in zip(head.tensors, reader.tensors, strict=True):
        assert head.bytes(ours).tobytes() == theirs.data.tobytes()


def made(path: Path, **values: str | int) -> Path:
    """A file with one tensor and these values, a dot for each __."""
    writer = package.GGUFWriter(path, "llama")
    for key, value in values.items():
        name = key.replace("__", ".")
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint16(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("base", ["memory", "mapped"])
def test_a_part_of_a_split_model_is_said_to_be_one_before_it_is_hashed(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.sums, "sha256", lambda path: pytest.fail("hashed"))
    path = made(tmp_path / "m-00002-of-00003.gguf", split__no=1, split__count=3)
    with pytest.raises(ModelError, match=r"is a part of a split model"):
        models.load(str(path), base=base)
    with pytest.raises(ModelError, match=r"is a part of a split model"):
        models.load_config(str(path))
    header.check(path)  # llama.cpp finds the others
    header.check_whole(made(tmp_path / "one.gguf", split__no=0, split__count=1))
