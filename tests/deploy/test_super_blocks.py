# SPDX-License-Identifier: Apache-2.0
"""GGUF's super-blocks: their bytes, the artefact that holds them, files in llama.cpp, and what other targets say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from deploy_harness import LAYER, changed, on_grid, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fleetune
from fleetune import adapters, compression, models
from fleetune.adapters.scales import Scales
from fleetune.common import sums
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.blocks import FinishedBlocks
from fleetune.compression.layerwise.grids import Grid
from fleetune.compression.layerwise.groups import rounded
from fleetune.compression.layerwise.sums import block_message, weights_of
from fleetune.deploy.export import export
from fleetune.deploy.formats import _ggml_blocks
from fleetune.deploy.measure import harness, llamacpp
from fleetune.errors import MessageError, ModelError, UsageError
from fleetune.models import Model, artefact
from fleetune.models.artefact import ArtefactHead, Master, Quantised, SuperBlocks
from fleetune.models.cache.names import MASTER
from fleetune.models.families.number_types import SUPER_TYPES, SUPER_WIDTH
from fleetune.seeds import scale_view
from fleetune.tuning.exchange.messages import Payload, decode

TYPES = sorted(SUPER_TYPES)
needs_engine = pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp is not installed")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for what the importer converts."""
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))


def drawn(kind: str, seed: int, R: int = 3, blocks: int = 2) -> Quantised:
    """Any codes, any multiples that the type has, and d and dmin of either sign, some of them 0 or subnormal."""
    of, rng = SUPER_TYPES[kind], np.random.default_rng(seed)
    C = blocks * SUPER_WIDTH

    def halves(columns: int) -> torch.Tensor:
        size = 2.0 ** rng.integers(-26, 4, (R, columns))
        return torch.from_numpy((rng.standard_normal((R, columns)) * size).astype(np.float16))

    def whole(low: int, columns: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(low, of.high + 1, (R, columns)).astype(np.int8))

    of_minimum = (blocks, C // of.group) if of.minimum else (0, 0)
    parts = SuperBlocks(
        kind, halves(blocks), whole(of.low, C // of.group), halves(of_minimum[0]), whole(0, of_minimum[1])
    )
    codes = torch.from_numpy(rng.integers(0, 1 << of.bits, (R, C), dtype=np.uint8))
    return Quantised.of_blocks(codes, parts)


def in_super_blocks(
    folder: Path, kind: str, model: Model | None = None
) -> tuple[Model, dict[str, Quantised]]:
    """Write the artefact of a model 256 wide with the matrices of its layers on a grid, which the model takes over."""
    model = model or tiny(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    found = {}
    for name, tensor in models.named_tensors(model.net):
        if name.split(".")[-2] in LAYER and tensor.dim() == 2:
            found[name] = rounded(tensor * 0.3, Grid(kind, SUPER_TYPES[kind].bits), 32)
    artefact.write(folder, model, found, ArtefactHead("rtn", {}, model.digest, model.tokenizer_digest))
    for name, tensor in models.named_tensors(model.net):
        if name in found:
            tensor.copy_(found[name].dense())
    return model, found


# --- bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_all_that_a_type_can_hold_is_read_as_the_same_weights(kind: str, seed: int) -> None:
    q = drawn(kind, seed)
    assert _ggml_blocks.misfit(q, kind.upper()) is None
    raw = _ggml_blocks.PACKERS[kind.upper()](q)
    type_ = gguf.GGMLQuantizationType[kind.upper()]
    assert raw.shape == (3, 2 * gguf.GGML_QUANT_SIZES[type_][1])
    read = gguf.quants.dequantize(raw, type_)
    assert np.array_equal(read.view(np.int32), q.dense().numpy().view(np.int32))


def test_a_super_block_goes_into_its_own_type_alone() -> None:
    for kind in TYPES:
        q = drawn(kind, 1)
        for other in _ggml_blocks.PACKERS:
            why = _ggml_blocks.misfit(q, other)
            if other == kind.upper():
                assert why is None
            elif other.lower() in TYPES:
                assert why == f"its codes are not those of the grid {other.lower()}"
            else:
                assert why == f"its scales are those of {kind}'s super-blocks, which {other} has not"
        plain = on_grid(torch.randn(2, SUPER_WIDTH), 4, 32)
        assert _ggml_blocks.misfit(plain, kind.upper()) == f"its codes are not those of the grid {kind}"


# --- the artefact ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_an_artefact_holds_the_file_s_own_numbers(kind: str, tmp_path: Path) -> None:
    """Finished blocks, a block's message to devices, the artefact: the same numbers, and weights to the bit."""
    of = SUPER_TYPES[kind]
    model = tiny(hidden_size=256, intermediate_size=256, num_attention_heads=4, head_dim=64)
    solver = compression.make("rtn", {"grid": kind})
    parts = driver.run(model, solver, None, tmp_path / "parts")
    artefact.write(tmp_path / "model", model, parts, ArtefactHead("rtn", {}, "a" * 64, "b" * 64))
    master, again = Master(tmp_path / "model"), FinishedBlocks(tmp_path / "parts")
    assert again.open(0)
    sent = weights_of(decode(block_message(tmp_path / "parts", 0, b"\0" * 8)).payload)
    assert parts
    for name, part in parts.items():
        assert isinstance(part, Quantised)
        others = [master.quantised(name)]
        if name in again:
            others += [again[name], sent[name]]
        for q in others:
            assert isinstance(q, Quantised)
            assert q.blocks is not None
            assert part.blocks is not None
            assert (q.bits, q.group, q.codebook, q.blocks.kind) == (of.bits, of.group, of.codebook, kind)
            assert torch.equal(q.codes, part.codes)
            for own, other in zip(part.blocks[1:], q.blocks[1:], strict=True):
                assert own.dtype == other.dtype
                assert torch.equal(own, other)
        assert master.weight(name).numpy().tobytes() == part.dense().numpy().tobytes()
    assert len(sent) == 7
    assert master.head.codebooks == {}
    assert master.head.superblocks == dict.fromkeys(sorted(parts), kind)
    assert ArtefactHead.from_json(master.head.to_json()) == master.head
    name = next(iter(parts))
    held = {n.removeprefix(f"{name}.") for n in load_file(tmp_path / "model" / MASTER) if n.startswith(name)}
    assert held == {"codes", "d", "multiples", *(("dmin", "minima") if of.minimum else ())}
    bits = harness.bits(tmp_path / "model").linear
    assert Grid(kind, of.bits).bits_per_weight <= bits <= Grid(kind, of.bits).bits_per_weight + 0.55


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        ("multiples", lambda t: t[:, :-1].contiguous(), "not those of super-blocks of 256 columns"),
        ("multiples", lambda t: t.int(), "of another type than q4_k's"),
        ("multiples", lambda t: torch.full_like(t, 64), "multiples that q4_k has not"),
        ("minima", lambda t: torch.full_like(t, -1), "multiples that q4_k has not"),
        ("d", lambda t: t.float(), "of another type than q4_k's"),
        ("dmin", lambda t: t[:1], "not those of super-blocks"),
        ("codes", lambda t: t[:, 1:].contiguous(), "codes that are not 256 a row"),
        ("codes", lambda t: t[1:], "not those of super-blocks"),
        ("minima", None, "lacks parts of"),
    ],
)
def test_parts_that_are_no_super_blocks_are_refused(part: str, change, why: str, tmp_path: Path) -> None:
    _, found = in_super_blocks(tmp_path / "m", "q4_k")
    name = next(n for n in found if n.endswith("q_proj.weight"))
    file = tmp_path / "m" / MASTER
    head, tensors = Master(tmp_path / "m").head.to_json(), load_file(file)
    (tmp_path / "m" / sums.FILE).unlink()
    held = tensors.pop(f"{name}.{part}")
    if change is not None:
        tensors[f"{name}.{part}"] = change(held)
    save_file(tensors, file, metadata={"format": "pt", "master": head})
    with pytest.raises(ModelError, match=why):
        Master(tmp_path / "m").quantised(name)


def test_heads_and_messages_that_name_no_type_are_refused(tmp_path: Path) -> None:
    head = json.loads(ArtefactHead("rtn", {}, "a" * 64, "b" * 64).to_json())
    with pytest.raises(ModelError, match="super-block type 'q9_k'"):
        ArtefactHead.from_json(json.dumps({**head, "superblocks": {"a": "q9_k"}}))
    q = drawn("q4_k", 1)
    arrays = {n: t.numpy() for n, t in artefact.stored("a", q).items()}
    for grid in (
        [4, 32, 512, "", "q9_k"],
        [4, 16, 512, "", "q4_k"],
        [4, 32, 512, "iq4_nl", "q4_k"],
        [4, 32, 256, "", "q4_k"],
    ):
        with pytest.raises(MessageError, match="not as agreed"):
            weights_of(Payload(arrays, {"grids": json.dumps({"a": grid})}))
    assert torch.equal(
        weights_of(Payload(arrays, {"grids": '{"a": [4, 32, 512, "", "q4_k"]}'}))["a"].dense(), q.dense()
    )


# --- exports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("base", ["memory", "mapped"])
def test_the_importer_gets_the_weights_back(kind: str, base: str, tmp_path: Path) -> None:
    model, found = in_super_blocks(tmp_path / "m", kind)
    report = export(tmp_path / "m", "gguf" if base == "memory" else f"gguf:{kind}", tmp_path / "x.gguf")
    assert report.types[kind.upper()] == len(found) == 14
    assert report.exact == report.tensors - 1  # the embedding is rounded to Q8_0
    reader = gguf.GGUFReader(report.path)
    name = gguf.LlamaFileType(reader.fields["general.file_type"].contents()).name
    assert name in (f"MOSTLY_{kind.upper()}", f"MOSTLY_{kind.upper()}_S")
    back = models.load(str(report.path), base=base)
    whole = models.load(str(report.path)) if base == "mapped" else back
    read = dict(models.named_tensors(whole.net))
    for name, q in found.items():
        assert torch.equal(read[name], q.dense()), name
    (end,) = [name for name in read if name not in found and read[name].dim() == 2]
    model.net.get_parameter(end).copy_(read[end])
    ids = torch.arange(40, 90)[None]
    with torch.inference_mode():
        torch.testing.assert_close(back.net(ids).logits, model.net(ids).logits, rtol=0, atol=1e-5)


def test_every_matrix_may_be_on_a_grid_of_its_own(tmp_path: Path) -> None:
    """Four kinds of blocks, a codebook and plain floats in one artefact and one file."""
    model = tiny(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    kinds = {"q": "q4_k", "k": "q6_k", "v": "iq4_nl", "o": "ggml", "gate": "iq4_xs", "up": "q2_k"}
    found = {}
    for name, tensor in models.named_tensors(model.net):
        part = name.split(".")[-2].removesuffix("_proj")
        if part in kinds:
            bits = SUPER_TYPES[kinds[part]].bits if kinds[part] in SUPER_TYPES else 4
            found[name] = rounded(tensor, Grid(kinds[part], bits), 32)
    artefact.write(
        tmp_path / "m", model, found, ArtefactHead("rtn", {}, model.digest, model.tokenizer_digest)
    )
    head = Master(tmp_path / "m").head
    assert set(head.codebooks) == {name for name in found if ".v_proj" in name}
    assert set(head.superblocks.values()) == {"q4_k", "q6_k", "iq4_xs", "q2_k"}
    report = export(tmp_path / "m", "gguf", tmp_path / "x.gguf")
    types = {
        "Q4_K": 2,
        "Q6_K": 2,
        "IQ4_NL": 2,
        "Q4_0": 2,
        "IQ4_XS": 2,
        "Q2_K": 2,
        "F16": 2,
        "Q8_0": 1,
        "F32": 5,
    }
    assert report.types == types
    read = dict(models.named_tensors(models.load(str(report.path)).net))
    assert all(torch.equal(read[name], q.dense()) for name, q in found.items())


@needs_engine
@pytest.mark.parametrize("kind", TYPES)
def test_llama_cpp_reads_the_same_weights(kind: str, tmp_path: Path) -> None:
    """Its logits are torch's but for activations that it rounds to 8 bits; those of f32 of the same weights are not."""
    model, _ = in_super_blocks(tmp_path / "m", kind)
    ids, found = list(range(40, 104)), {}
    for to in (f"gguf:{kind}", "gguf:f32"):
        path = export(tmp_path / "m", to, tmp_path / f"{to[5:]}.gguf").path
        with llamacpp.opened(path, 1) as engine:
            found[to] = np.concatenate([piece.copy() for piece in engine.scored_logits([(ids, 1)])])
    with torch.inference_mode():
        ours = model.net(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    for to, most in ((f"gguf:{kind}", 1e-2), ("gguf:f32", 1e-4)):
        theirs = torch.from_numpy(found[to]).double().log_softmax(-1)
        divergence = (ours.exp() * (ours - theirs)).sum(-1)
        assert divergence.mean() < most
        assert (theirs - ours).abs().max() < 0.05 * ours.abs().max()


@pytest.mark.parametrize(
    ("to", "why", "hint"),
    [
        ("gguf:q4_0", "its scales are those of q4_k's super-blocks, which Q4_0 has not", "--to gguf or"),
        ("gguf:q5_k", "its codes are not those of the grid q5_k", "--to gguf or"),
        ("gguf:f16", "is not exact in F16", "--to gguf or"),
        (
            "gptq",
            "groups with a scale of their own; those of .* are of q4_k's super-blocks",
            "(--set grid=ggml)",
        ),
        (
            "compressed-tensors",
            "are of q4_k's super-blocks",
            "use --to gguf or --to hf, or compress again on another",
        ),
        ("mlx", "are of q4_k's super-blocks", "(--set grid=ggml)"),
    ],
)
def test_other_targets_refuse_them_and_say_what_to_do(to: str, why: str, hint: str, tmp_path: Path) -> None:
    in_super_blocks(tmp_path / "m", "q4_k")
    with pytest.raises(UsageError, match=why) as caught:
        export(tmp_path / "m", to, tmp_path / "out" / ("x.gguf" if to.startswith("gguf") else "x"))
    assert hint in (caught.value.hint or "")


def test_a_plain_directory_holds_the_values(tmp_path: Path) -> None:
    _, found = in_super_blocks(tmp_path / "m", "q2_k")
    report = export(tmp_path / "m", "hf", tmp_path / "hf")
    assert report.exact == report.tensors
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(tensors[name], q.dense()) for name, q in found.items())


def test_plain_weights_are_compressed_first(tmp_path: Path) -> None:
    model = tiny()
    models.save(model.net, model.tokenizer, tmp_path / "plain")
    with pytest.raises(UsageError, match="plain weights, and gguf:q4_k is for compressed ones") as caught:
        export(tmp_path / "plain", "gguf:q4_k", tmp_path / "x.gguf")
    assert "compress it first" in (caught.value.hint or "")


def test_scales_in_super_blocks_are_not_trained(tmp_path: Path) -> None:
    in_super_blocks(tmp_path / "m", "q4_k")
    """Those of the embedding in Q8_0 alone would be a run that trains next to nothing."""
    path = export(tmp_path / "m", "gguf:q4_k", tmp_path / "x.gguf").path
    model = models.load(str(path), base="mapped")
    model.trains = "scales"
    with pytest.raises(UsageError, match="no scales that could be trained") as caught:
        scale_view.moved_tensors(model)
    assert "its layers are in Q4_K, and super-blocks are not trained" in str(caught.value)
    assert "Q4_0, Q4_1" in (caught.value.hint or "")
    for verb in (
        lambda: fleetune.plan(path, train="scales"),
        lambda: adapters.attach(model, Scales(), seed=0),
    ):
        with pytest.raises(UsageError, match="its layers are in Q4_K, and super-blocks are not trained"):
            verb()


def test_a_packer_that_is_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fleetune.deploy.formats import gguf as format_
    from fleetune.errors import FleetuneError

    in_super_blocks(tmp_path / "m", "q6_k")
    wrong = {**format_._ggml_blocks.PACKERS}
    right = wrong["Q6_K"]
    wrong["Q6_K"] = lambda q: right(changed(q, codes=q.codes.flip(1)))
    monkeypatch.setattr(format_._ggml_blocks, "PACKERS", wrong)
    with pytest.raises(FleetuneError, match="does not hold the values of"):
        export(tmp_path / "m", "gguf", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_super_blocks_are_told_apart_from_their_own_copy() -> None:
    q = drawn("q3_k", 4)
    assert q.blocks is not None
    moved = Quantised.of_blocks(q.codes, q.blocks._replace(d=q.blocks.d * 2))
    assert torch.equal(moved.dense(), q.dense() * 2)
    assert dataclasses.replace(q, codes=q.codes).dense().equal(q.dense())
