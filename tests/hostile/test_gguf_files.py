"""Hostile GGUF files: damaged in every way, and with claims that nothing in the file stands for."""

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from deploy_harness import tiny

import hostile
from fault_report import Injected
from fleetune import models
from fleetune.deploy.export import write as export
from fleetune.deploy.serve import is_adapter
from fleetune.models.gguf import convert, header
from hostile import put, refusal

NAN = float("nan")


@pytest.fixture(scope="session")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a GGUF file, with quantised and plain tensors."""
    root = tmp_path_factory.mktemp("honest-gguf")
    tiny().save(root / "tiny")
    return export(root / "tiny", "gguf:q8_0", root / "tiny.gguf").path


def use(file: Path, work: Path) -> None:
    """What `tune` and `serve` do with the file first; the cache is left out."""
    header.check(file)
    folder = work / "converted"
    folder.mkdir(exist_ok=True)
    convert.convert(file, folder)
    models.load(str(folder), device="cpu", offline=True)


class File:
    """An honest file's bytes, and where its values are."""

    def __init__(self, path: Path) -> None:
        self.data = bytearray(path.read_bytes())
        self.reader = gguf.GGUFReader(path)

    def value(self, key: str, form: str, value: Any) -> None:
        """Overwrite the single value of a key, of the same width."""
        field = self.reader.fields[key]
        at = field.offset + 8 + len(key) + 4
        struct.pack_into("<I", self.data, at - 4, {"f": 6, "I": 4, "i": 5}[form])
        struct.pack_into(f"<{form}", self.data, at, value)

    def table(self, number: int, *, kind: int | None = None, offset: int | None = None) -> None:
        """Overwrite the type or the offset of a tensor."""
        field = self.reader.tensors[number].field
        at = field.offset + sum(part.nbytes for part in field.parts)
        if offset is not None:
            struct.pack_into("<Q", self.data, at - 8, offset)
        if kind is not None:
            struct.pack_into("<I", self.data, at - 12, kind)

    def weight(self, plain: bool, value: float) -> None:
        """Overwrite a value of an F32 tensor, or the scale of a Q8_0 block."""
        wanted = gguf.GGMLQuantizationType.F32 if plain else gguf.GGMLQuantizationType.Q8_0
        tensor = next(t for t in self.reader.tensors if t.tensor_type == wanted)
        struct.pack_into("<f" if plain else "<e", self.data, tensor.data_offset, value)


Change = Callable[[File], None]
A = "llama."
MUST_REFUSE: dict[str, Change] = {
    "2^31 blocks": lambda f: f.value(A + "block_count", "I", 2**31 - 1),
    "no block": lambda f: f.value(A + "block_count", "I", 0),
    "a width of 2^31": lambda f: f.value(A + "embedding_length", "I", 2**31 - 32),
    "a vocabulary of 2^31": lambda f: f.value(A + "vocab_size", "I", 2**31),
    "a NaN": lambda f: f.weight(True, NAN),
    "a scale of NaN": lambda f: f.weight(False, NAN),
    "an offset beyond the end": lambda f: f.table(1, offset=2**62),
    "an unknown type": lambda f: f.table(1, kind=999),
    "rows that are no whole blocks": lambda f: f.table(1, kind=gguf.GGMLQuantizationType.Q2_K),
    "2^60 tensors": lambda f: struct.pack_into("<Q", f.data, 8, 2**60),
    "2^60 keys": lambda f: struct.pack_into("<Q", f.data, 16, 2**60),
}


@pytest.mark.parametrize("case", list(MUST_REFUSE))
def test_a_file_that_an_attack_found_is_refused(honest, tmp_path, case):
    file = File(honest)
    MUST_REFUSE[case](file)
    put(tmp_path / "x.gguf", bytes(file.data))
    said = refusal(lambda: use(tmp_path / "x.gguf", tmp_path))
    assert said, f"{case}: accepted"
    assert "x.gguf" in said  # and not the folder that it would be converted to


def end(writer: gguf.GGUFWriter) -> None:
    """Add a tensor, and write the file."""
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("texts", [False, True])
def test_a_list_that_claims_to_be_longer_than_the_file_is_refused(tmp_path, texts):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("tokenizer.ggml.list", ["a", "b"] if texts else [1, 2])
    end(writer)
    raw = bytearray((tmp_path / "x.gguf").read_bytes())
    at = raw.index(b"tokenizer.ggml.list") + len("tokenizer.ggml.list") + 8
    struct.pack_into("<Q", raw, at, 2**40)
    put(tmp_path / "x.gguf", bytes(raw))
    assert "its head cannot be read" in str(refusal(lambda: use(tmp_path / "x.gguf", tmp_path)))


@pytest.mark.parametrize("alignment", [0.5, 0, -1, 33, "32", True])
def test_an_alignment_that_is_none_is_refused(tmp_path, alignment):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    kind = {float: "FLOAT32", int: "INT32", str: "STRING", bool: "BOOL"}[type(alignment)]
    writer.add_key_value("general.alignment", alignment, gguf.GGUFValueType[kind])
    end(writer)
    assert "its head cannot be read" in str(refusal(lambda: header.check(tmp_path / "x.gguf")))
    assert not is_adapter(tmp_path / "x.gguf")  # as serve looks through a folder


def test_the_honest_one_is_accepted(honest, tmp_path):
    assert refusal(lambda: use(honest, tmp_path)) is None


def sweep(honest: Path, work: Path, flips: int, every: int, injected: Injected) -> None:
    """Damage the file as a whole, and flip bits of its head, where all the claims are."""
    raw = honest.read_bytes()
    cases = hostile.mutants(raw, seed="gguf")
    rng = np.random.default_rng(7)
    head = gguf.GGUFReader(honest).data_offset
    for number in range(flips):
        flipped = bytearray(raw)
        at = int(rng.integers(head))
        flipped[at] ^= 1 << int(rng.integers(8))
        cases[f"bit of byte {at}"] = bytes(flipped)
        if number % 4 == 0:
            wide = bytearray(raw)
            wide[at : at + 4] = b"\xff" * 4
            cases[f"four bytes at {at}"] = bytes(wide)
    each = ((what, partial(put, work / "x.gguf", data)) for what, data in list(cases.items())[::every])
    hostile.survived("damaged GGUF files", each, lambda: use(work / "x.gguf", work), injected)


@pytest.mark.parametrize(
    ("count", "every"), [(24, 5), pytest.param(300, 1, marks=pytest.mark.faults)], ids=["a sample", "all"]
)
def test_damaged_files(honest, tmp_path, injected, count, every):
    sweep(honest, tmp_path, count, every, injected)
