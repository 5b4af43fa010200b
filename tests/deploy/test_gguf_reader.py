# SPDX-License-Identifier: Apache-2.0
"""Our reader of .gguf files: it says what the package's says, and transformers takes it instead of parsing again."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from deploy_harness import tiny

from fleetune import models
from fleetune.deploy.export import export
from fleetune.models.gguf import convert
from fleetune.models.gguf.reader import Reader, lent


def written(path: Path, endianess: package.GGUFEndian) -> Path:
    """A file with a value of every kind, lists of texts and numbers, and two tensors."""
    file = package.GGUFWriter(path, "llama", endianess=endianess)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(file, f"add_{kind}")(f"of.{kind}", 100)
    file.add_float32("of.float32", 0.1)
    file.add_float64("of.float64", 0.1)
    file.add_bool("of.bool", True)
    file.add_string("of.text", "blé")
    file.add_array("of.texts", ["a", "", "語", "d" * 300])
    file.add_array("of.numbers", [3, 1, -2])
    file.add_tensor("a.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    file.add_tensor("b.weight", np.arange(5, dtype=np.float16))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def owner(array: Any) -> Any:
    """What an array's bytes belong to."""
    while isinstance(array, np.ndarray | memoryview):
        array = array.base if isinstance(array, np.ndarray) else array.obj
    return array


@pytest.mark.parametrize("endianess", package.GGUFEndian)
def test_it_reads_what_the_package_reads(endianess: package.GGUFEndian, tmp_path: Path) -> None:
    path = written(tmp_path / "x.gguf", endianess)
    theirs, ours = package.GGUFReader(path), Reader(path)
    assert list(theirs.fields) == list(ours.fields)
    for key, field in theirs.fields.items():
        other = ours.fields[key]
        assert (other.offset, other.types, other.data) == (field.offset, field.types, field.data)
        assert [p.tolist() for p in other.parts] == [p.tolist() for p in field.parts]
        assert other.contents() == field.contents()
    assert ours.fields["of.texts"].contents() == ["a", "", "語", "d" * 300]
    for one, two in zip(theirs.tensors, ours.tensors, strict=True):
        assert (one.name, one.data_offset, one.tensor_type) == (two.name, two.data_offset, two.tensor_type)
        assert one.data.dtype == two.data.dtype
        assert one.data.tobytes() == two.data.tobytes()
        assert not isinstance(two.data, np.memmap)
        assert isinstance(owner(two.data), mmap.mmap)  # nothing was read into memory


def test_a_file_is_parsed_once_for_weights_configuration_and_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    models.save(model.net, model.tokenizer, tmp_path / "m")
    path = export(tmp_path / "m", "gguf", tmp_path / "x.gguf").path
    parsed, parse = list[Any](), package.GGUFReader.__init__

    def counted(self: Any, file: Any, mode: Any = "r") -> None:
        parsed.append((type(self), file))
        parse(self, file, mode)

    monkeypatch.setattr(package.GGUFReader, "__init__", counted)
    (tmp_path / "back").mkdir()
    convert.convert(path, tmp_path / "back")
    assert parsed == [(Reader, path)]


def test_only_the_file_that_is_lent_is_not_parsed_and_only_meanwhile(tmp_path: Path) -> None:
    path = written(tmp_path / "x.gguf", package.GGUFEndian.LITTLE)
    (tmp_path / "link.gguf").symlink_to(path)
    other = written(tmp_path / "y.gguf", package.GGUFEndian.LITTLE)
    theirs, reader = package.GGUFReader, Reader(path)
    with pytest.raises(KeyError), lent(reader):
        assert package.GGUFReader(str(path)) is reader
        assert package.GGUFReader(tmp_path / "link.gguf") is reader
        assert package.GGUFReader(other).path == other
        raise KeyError
    assert package.GGUFReader is theirs


def test_two_threads_that_lend_leave_the_package_as_it_was(tmp_path: Path) -> None:
    """The second waits for the first: ending in the order in which they began, they would leave the first one's."""
    reader = Reader(written(tmp_path / "x.gguf", package.GGUFEndian.LITTLE))
    theirs, lending, end = (
        package.GGUFReader,
        [threading.Event() for _ in "ab"],
        [threading.Event() for _ in "ab"],
    )

    def lend(number: int) -> None:
        with lent(reader):
            lending[number].set()
            end[number].wait(30)

    threads = [threading.Thread(target=lend, args=(number,)) for number in range(2)]
    threads[0].start()
    assert lending[0].wait(30)
    threads[1].start()
    assert not lending[1].wait(0.2)
    end[0].set()
    threads[0].join(30)
    assert lending[1].wait(30)
    end[1].set()
    threads[1].join(30)
    assert package.GGUFReader is theirs
