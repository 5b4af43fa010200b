# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts in the formats: parts are joined, stacked for llama.cpp, rounded and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from family_harness import TEXT, divergence, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fleetune import adapters, models
from fleetune.deploy.checkpoint import open_checkpoint
from fleetune.deploy.export import export, export_adapter
from fleetune.deploy.measure import llamacpp
from fleetune.errors import ModelError
from fleetune.models.families import experts

needs_engine = pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
PARTED = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "ernie4_5_moe"]  # stored as a matrix an expert


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in package.GGUFReader(path).tensors}


# ---------------------------------------------------------------- joining


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


@pytest.mark.parametrize("case", PARTED)
def test_a_directory_of_joined_experts_is_read_by_transformers(case: str, tmp_path: Path) -> None:
    net = save(case, tmp_path / "m")
    written = export(tmp_path / "m", "hf", tmp_path / "hf").path
    back, info = AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = dict(net.named_parameters())
    assert all(torch.equal(tensor, own[name]) for name, tensor in back.named_parameters())


def test_shards_of_parts_are_joined(tmp_path: Path) -> None:
    net = save("qwen3_moe", tmp_path / "m")
    net.save_pretrained(tmp_path / "m", max_shard_size="200KB")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 3
    source, own = open_checkpoint(tmp_path / "m"), dict(net.named_parameters())
    assert all(torch.equal(source.weight(name), own[name]) for name in source.names)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    stored = load_file(file)
    lost = "model.layers.2.mlp.experts.3.up_proj.weight"
    save_file({name: tensor for name, tensor in stored.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks {lost}"):
        export(tmp_path / "m", "hf", tmp_path / "hf")


def test_experts_of_different_shapes_are_named(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.1.block_sparse_moe.experts.2.w2.weight"] = torch.zeros(96, 161)
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"parts of model.layers.1.mlp.experts.down_proj do not join"):
        export(tmp_path / "m", "gguf", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


# ---------------------------------------------------------------- what the file holds


def test_the_order_of_rows_of_a_part() -> None:
    gate, up = experts.parts("model.layers.0.block_sparse_moe.experts.gate_up_proj")
    assert (gate.name, up.name) == (
        "model.layers.0.mlp.experts.gate_proj.weight",
        "model.layers.0.mlp.experts.up_proj.weight",
    )
    assert gate.order((2, 6, 5), True, False).tolist() == [0, 1, 2, 6, 7, 8]
    assert up.order((2, 6, 5), True, False).tolist() == [3, 4, 5, 9, 10, 11]
    assert up.order((2, 6, 5), True, True).tolist() == [1, 3, 5, 7, 9, 11]
    assert up.order((2, 6), False, True).tolist() == [1, 3, 5, 7, 9, 11]
    assert up.order((6, 5), True, False).tolist() == [3, 4, 5]


def test_three_stacked_tensors_and_a_router(tmp_path: Path) -> None:
    net = save("qwen3_moe", tmp_path / "m")
    found = tensors(export(tmp_path / "m", "gguf:f16", tmp_path / "x.gguf").path)
    own = net.model.layers[2].mlp
    gate, up = (
        own.experts.gate_up_proj.half().numpy()[:, :64],
        own.experts.gate_up_proj.half().numpy()[:, 64:],
    )
    assert np.array_equal(found["blk.2.ffn_gate_exps.weight"].data, gate)
    assert np.array_equal(found["blk.2.ffn_up_exps.weight"].data, up)
    assert np.array_equal(found["blk.2.ffn_down_exps.weight"].data, own.experts.down_proj.half().numpy())
    router = found["blk.2.ffn_gate_inp.weight"]  # in fp32, as llama.cpp's converter has it
    assert router.tensor_type.name == "F32"
    assert np.array_equal(router.data, own.gate.weight.numpy())


@needs_engine
@pytest.mark.parametrize("case", [*PARTED, "granitemoe", "granitemoeshared", "gpt_oss"])
@pytest.mark.parametrize(("kind", "bound"), [("gguf:f16", 1e-4), ("gguf:q8_0", 2e-2)])
def test_rounded_experts_run(case: str, kind: str, bound: float, tmp_path: Path) -> None:
    net = save(case, tmp_path / "m")
    report = export(tmp_path / "m", kind, tmp_path / "x.gguf")
    types = {name: tensor.tensor_type.name for name, tensor in tensors(report.path).items()}
    stacked = {name: kind for name, kind in types.items() if name.endswith("_exps.weight")}
    assert len(stacked) >= 9
    assert set(stacked.values()) == {kind.removeprefix("gguf:").upper()}
    assert divergence(net, report.path) <= bound


PUBLISHED: dict[str, Any] = {  # gpt-oss-20b's
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
}


@needs_engine
def test_a_ramp_that_llama_cpp_rounds_is_said(tmp_path: Path) -> None:
    net = save("gpt_oss", tmp_path / "m", **PUBLISHED)
    report = export(tmp_path / "m", "gguf:f32", tmp_path / "x.gguf")
    assert any("rounds the ends of YaRN's ramp" in note for note in report.notes)
    assert 1e-7 < divergence(net, report.path) < 1e-3  # of the rotation: without it 1e-11
    rope = PUBLISHED["rope_parameters"] | {"truncate": True}
    net = save("gpt_oss", tmp_path / "n", **PUBLISHED | {"rope_parameters": rope})
    report = export(tmp_path / "n", "gguf:f32", tmp_path / "y.gguf")
    assert report.notes == ()
    assert divergence(net, report.path, TEXT * 10) < 1e-8


def test_a_mixture_s_file_is_not_read_back(tmp_path: Path) -> None:
    save("mixtral, tied", tmp_path / "m")
    path = export(tmp_path / "m", "gguf:f16", tmp_path / "x.gguf").path
    with pytest.raises(ModelError, match="holds a mixture of experts"):
        models.load(str(path), device="cpu")


# ---------------------------------------------------------------- adapters


def test_an_adapter_on_names_that_experts_have_too(tmp_path: Path) -> None:
    """ERNIE's shared experts: PEFT takes their names for the experts'."""
    save("ernie4_5_moe", tmp_path / "m")
    model = models.load(str(tmp_path / "m"), device="cpu")
    ids = torch.tensor([TEXT])
    before = model.net(ids).logits
    with pytest.raises(ModelError, match="for its experts, which are no linear layers") as caught:
        adapters.attach(model, adapters.Lora(r=4, alpha=6), seed=1)
    assert "targets=k_proj,o_proj,q_proj,v_proj" in (caught.value.hint or "")
    assert torch.equal(model.net(ids).logits, before)  # it is off again
    adapters.attach(model, adapters.Lora(r=4, alpha=6, targets="k_proj,o_proj,q_proj,v_proj"), seed=1)
    adapters.save(model, tmp_path / "adapter")
    assert (
        export_adapter(tmp_path / "adapter", tmp_path / "m", "gguf:lora", tmp_path / "l.gguf").tensors == 32
    )
