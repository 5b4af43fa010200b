"""Mixtures of experts in directories and in GGUF: parts joined, codes in every export, budgets of bytes."""

from collections import Counter
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from family_harness import TEXT, divergence, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fleetune
from fleetune.deploy import llamacpp
from fleetune.deploy.checkpoint import Checkpoint, InMemory, Tuned, open_checkpoint
from fleetune.deploy.export import write as export
from fleetune.errors import ModelError
from fleetune.models.artefact import Master
from fleetune.models.loading import load_artefact
from fleetune.seeds.noise import Passes
from fleetune.seeds.scale_view import view_on
from heard import Heard

needs_engine = pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp is not installed")
# of transformers, about made-up sizes
pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.filterwarnings("ignore")]
PARTED = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "ernie4_5_moe"]  # stored as a matrix an expert


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in package.GGUFReader(path).tensors}


@pytest.mark.parametrize("case", PARTED)
def test_parts_are_joined(case: str, tmp_path: Path) -> None:
    net = save(case, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert not any(name.endswith("gate_up_proj") for name in stored)
    source = open_checkpoint(tmp_path / "m")
    own = dict(net.named_parameters())
    assert set(source.names) == set(own)
    for name in source.names:
        assert torch.equal(source.weight(name), own[name]), name
        assert source.quantised(name) is None


def test_parts_of_a_tuned_model_hold_the_tuned_weights(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "m")
    model = fleetune.models.load(str(tmp_path / "m"), dtype="fp32", device="cpu")
    model.attachment = view = view_on(model, run_key=7, law="hashed", grid=1e-3)
    view.place(Passes(np.array([5], np.uint64), np.arange(1, 9, dtype=np.int32).reshape(1, 8)))
    wanted = fleetune.models.digest(view.tensors())
    tuned = Tuned(model)
    moved = dict(tuned.tensors())
    assert fleetune.models.digest(moved.items()) == wanted != model.digest
    source = Checkpoint(InMemory(tuned, tmp_path / "out"))
    assert all(torch.equal(source.weight(name), moved[name]) for name in source.names)


@pytest.mark.parametrize("case", PARTED[:2])
def test_a_directory_of_joined_experts_is_read_by_transformers(case: str, tmp_path: Path) -> None:
    net = save(case, tmp_path / "m")
    written = export(tmp_path / "m", "hf", tmp_path / "hf").path
    back, info = AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = dict(net.named_parameters())
    assert all(torch.equal(tensor, own[name]) for name, tensor in back.named_parameters())


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    stored = load_file(file)
    lost = "model.layers.2.mlp.experts.3.up_proj.weight"
    save_file({name: tensor for name, tensor in stored.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks {lost}"):
        export(tmp_path / "m", "hf", tmp_path / "hf")


def test_three_stacked_tensors_and_a_router(tmp_path: Path) -> None:
    net = save("qwen3_moe", tmp_path / "m")
    found = tensors(export(tmp_path / "m", "gguf:f16", tmp_path / "x.gguf").path)
    own = net.model.layers[2].mlp
    both = own.experts.gate_up_proj.half().numpy()
    assert np.array_equal(found["blk.2.ffn_gate_exps.weight"].data, both[:, :64])
    assert np.array_equal(found["blk.2.ffn_up_exps.weight"].data, both[:, 64:])
    assert np.array_equal(found["blk.2.ffn_down_exps.weight"].data, own.experts.down_proj.half().numpy())
    router = found["blk.2.ffn_gate_inp.weight"]  # in fp32, as llama.cpp's converter has it
    assert router.tensor_type.name == "F32"
    assert np.array_equal(router.data, own.gate.weight.numpy())


@pytest.mark.parametrize(
    ("family", "grid"), [("qwen3_moe", "asymmetric"), ("gpt_oss", "asymmetric"), ("gpt_oss", "q4_k")]
)
def test_codes_of_experts_reach_every_export(family: str, grid: str, tmp_path: Path) -> None:
    save(family, tmp_path / "m")
    model = tmp_path / "m"
    settings: dict[str, Any] = {"group": 32, "grid": grid}
    if grid == "q4_k":
        model = tmp_path / "wide"
        wide = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 256)
        save(family, model, num_attention_heads=8, **wide)
    folder = fleetune.compress(model, method="rtn", settings=settings, out=tmp_path / "runs").folder / "model"
    master = Master(folder)
    transposed = family == "gpt_oss"  # the model holds them as [in, out]
    assert set(master.head.transposed) == (set(master.head.experts) if transposed else set())
    assert set(master.head.experts.values()) == {5}
    assert len(master.head.experts) == 8
    net = load_artefact(folder).net
    for name in master.head.experts:
        q, values = master.quantised(name), net.get_parameter(name)
        assert torch.equal(values, q.dense())
        assert values.shape == q.shape
    report = export(folder, "gguf", tmp_path / "x.gguf")
    kind, found = {"asymmetric": "Q5_0", "q4_k": "Q4_K"}[grid], tensors(report.path)
    gate_up = next(n for n in master.head.experts if "layers.1." in n and n.endswith("gate_up_proj"))
    weights = net.get_parameter(gate_up).numpy()
    F = weights.shape[1] // 2
    gates, ups = weights[:, :F], weights[:, F:]
    if transposed:
        gates, ups = (weights[:, :, first::2].swapaxes(1, 2) for first in (0, 1))
    for name, own in (("gate", gates), ("up", ups)):
        tensor = found[f"blk.1.ffn_{name}_exps.weight"]
        assert tensor.tensor_type.name == kind
        assert np.array_equal(package.quants.dequantize(tensor.data, tensor.tensor_type), own)
    back = AutoModelForCausalLM.from_pretrained(export(folder, "hf", tmp_path / "hf").path)
    ids = torch.tensor([TEXT])
    assert torch.equal(back(ids).logits, net(ids).logits)


def test_formats_of_linear_layers_hold_experts_in_16_bits(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "m")
    run = fleetune.compress(tmp_path / "m", method="rtn", settings={"group": 32}, out=tmp_path / "runs")
    folder = run.folder / "model"
    for to in ("gptq", "compressed-tensors"):
        report = export(folder, to, tmp_path / to)
        note = f"experts are in 16 bits: the codes of {to} are of linear layers; GGUF and MLX hold theirs"
        assert note in report.notes
        stored = load_file(report.path / "model.safetensors")
        name = "model.layers.0.mlp.experts.down_proj"
        assert torch.equal(stored[name], Master(folder).weight(name).half())


SAME, ROUNDED = 1e-5, 2e-2  # nats: as in test_gguf_families
MIXTURES = ["granitemoeshared", "gpt_oss"]


def kinds_in(file: Path) -> dict[str, int]:
    """How many tensors with a grid there are of each type: not the router, which is in fp32."""
    found = [t.tensor_type.name for t in package.GGUFReader(file).tensors if len(t.shape) > 1]
    return {kind: found.count(kind) for kind in sorted(set(found) - {"F32", "F16"})}


@needs_engine
@pytest.mark.parametrize("family", MIXTURES)
def test_the_file_has_the_size_that_was_said_and_runs(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / "m")
    text, heard = tmp_path / "t.txt", Heard()
    text.write_text("the quick brown fox jumps over the lazy dog, and a few more words. " * 60)
    given: dict[str, Any] = {"text": str(text), "windows": 4, "length": 32, "out": tmp_path / "runs"}
    done = fleetune.compress(tmp_path / "m", method="optq", bits=5, listener=heard, **given)
    model, name = done.folder / "model", done.folder.name.partition("-")[2]
    report = export(model, "gguf", tmp_path / f"0000-{name}.gguf")  # with the name that its header holds
    (spent,) = heard.of("budget")
    assert report.path.stat().st_size == report.bytes == spent.bytes
    # a gate and an up are one parameter, and two tensors; those of granitemoeshared's shared experts too
    mixed = sum(name.endswith("gate_up_proj") for name in Master(model).names)
    halves = mixed + (4 if family == "granitemoeshared" else 0)
    kinds = kinds_in(report.path)
    assert sum(spent.kinds.values()) + halves == sum(kinds.values())
    assert all(count <= kinds[kind] for kind, count in spent.kinds.items())
    weights = Counter[str]()
    for tensor in package.GGUFReader(report.path).tensors:
        if tensor.tensor_type.name in kinds:
            ends = 3 * tensor.n_elements * (tensor.name in ("token_embd.weight", "output.weight"))
            weights.update({"bits": 8 * tensor.n_bytes, "of Q5_0": 5.5 * tensor.n_elements + ends})
    assert 0.96 < weights["bits"] / weights["of Q5_0"] <= 1
    net = AutoModelForCausalLM.from_pretrained(export(model, "hf", tmp_path / "hf").path)
    whole = export(model, "gguf:f32", tmp_path / "x.gguf")
    assert whole.exact == whole.tensors
    assert divergence(net, whole.path) <= SAME
    assert divergence(net, report.path) <= ROUNDED
