"""The master artefact: golden bytes, exact weights, damage."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fleetune import compression, models
from fleetune.common import sums
from fleetune.compression.layerwise import driver
from fleetune.errors import ModelError, VersionError
from fleetune.models.artefact import ArtefactHead, Master, pack, unpack, write
from fleetune.models.cache.names import MASTER, is_master

HEAD = ArtefactHead("rtn", {"bits": 4}, "a" * 64, "b" * 64)


def made(folder: Path, **values: object) -> tuple[models.Model, Master]:
    model = models.tiny_llama()
    solver = compression.make("rtn", {"group": 8, **values})
    assert isinstance(solver, compression.Solver)
    parts = driver.run(model, solver, None, folder / "parts")
    write(folder / "model", model, parts, HEAD)
    return model, Master(folder / "model")


def test_codes_are_packed_from_the_lowest_bit_on() -> None:
    codes = torch.tensor([[1, 2, 3, 15], [0, 8, 7, 4]], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [[0x21, 0xF3], [0x80, 0x47]]
    assert pack(codes % 4, 2).tolist() == [[0b11111001], [0b00110000]]
    assert pack(torch.tensor([[1, 7, 4]], dtype=torch.uint8), 3).tolist() == [[0b00111001, 0b1]]
    assert pack(codes, 8).tolist() == codes.tolist()


@given(st.sampled_from([2, 3, 4, 5, 8]), st.integers(1, 5), st.integers(1, 40), st.integers(0, 1 << 30))
def test_packing_and_back(bits: int, R: int, C: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (R, C), generator=g, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (R, -(-C * bits // 8))
    assert torch.equal(unpack(packed, bits, C), codes)


@pytest.mark.parametrize("bits", [3, 8])
def test_an_artefact_holds_every_parameter_once(bits: int, tmp_path: Path) -> None:
    model, master = made(tmp_path, bits=bits)
    want = dict(models.named_tensors(model.net))
    assert master.names == list(want)
    linears = {f"{n}.weight" for _, found in driver.linears_of(model) for n in found}
    for name, weight in master.items():
        q = master.quantised(name)
        assert (q is not None) == (name in linears)
        assert weight.shape == want[name].shape
        assert torch.equal(weight, want[name]) == (q is None)
    grids = dict.fromkeys(sorted(linears), (bits, 8))
    assert master.head == replace(HEAD, grids=grids, shapes=master.head.shapes)


def test_a_configuration_of_more_blocks_than_tensors_is_refused(tmp_path: Path) -> None:
    made(tmp_path)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 600}))
    with pytest.raises(ModelError, match="600 blocks, but"):
        models.load_artefact(config.parent)


def test_damage_is_said(tmp_path: Path) -> None:
    _, master = made(tmp_path)
    path = tmp_path / "model" / MASTER
    assert is_master(path.parent)
    assert not is_master(tmp_path)
    with pytest.raises(ModelError, match="no compressed model"):
        Master(tmp_path)
    tensors, head = load_file(path), json.loads(master.head.to_json())

    def changed(more: dict[str, torch.Tensor], **into: object) -> None:
        meta = {"format": "pt", "master": json.dumps({**head, **into})}
        save_file(tensors | more, path, metadata=meta)

    def refused(said: str, error: type[Exception] = ModelError) -> None:
        with pytest.raises(error, match=said):
            Master(path.parent).quantised(name)

    (path.parent / sums.FILE).unlink()
    name = next(iter(master.head.grids))
    changed({f"{name}.scale": torch.zeros(1, 1, dtype=torch.float16)})
    refused(f"the parts of {name} do not fit")
    changed({}, version=2)
    refused("the artefact was written by another version of Fleetune", VersionError)
    for more in ({"grids": [1]}, {"surprise": 1}):
        changed({}, **more)
        refused("head is damaged")
    del tensors[f"{name}.zero"]
    changed({})
    refused(f"lacks parts of {name}")
    path.write_bytes(path.read_bytes()[:50])
    refused("is damaged")


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "forged",
    [
        {"method": ["a"]},
        {"shapes": {}},
        {"grids": {Q: [1e999, 32]}},
        {"experts": {"another": 2}},
        {"transposed": [Q]},  # and not of experts
    ],
    ids=str,
)
def test_a_head_with_other_fields_is_damaged(forged: dict[str, object], tmp_path: Path) -> None:
    head = json.loads(made(tmp_path)[1].head.to_json())
    with pytest.raises(ModelError, match="head is damaged"):
        ArtefactHead.from_json(json.dumps({**head, **forged}).replace("Infinity", "1e999"))


def test_a_head_that_is_nested_without_end_is_damaged() -> None:
    with pytest.raises(ModelError, match="head is damaged"):
        ArtefactHead.from_json("[" * 200_000)


@pytest.mark.parametrize(("part", "dtype"), [("zero", torch.float32), ("scale", None)])
def test_scales_of_other_types_or_not_finite_are_refused(part: str, dtype: Any, tmp_path: Path) -> None:
    _, master = made(tmp_path)
    file = tmp_path / "model" / MASTER
    tensors = load_file(file)
    (tmp_path / "model" / sums.FILE).unlink()
    name = f"{Q}.{part}"
    tensors[name] = torch.full_like(tensors[name], float("nan")) if dtype is None else tensors[name].to(dtype)
    save_file(tensors, file, metadata={"format": "pt", "master": master.head.to_json()})
    with pytest.raises(ModelError, match="no finite numbers"):
        Master(tmp_path / "model").quantised(Q)
