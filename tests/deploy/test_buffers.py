# SPDX-License-Identifier: Apache-2.0
"""Buffers that stand in a checkpoint, such as a router's bias: in artefacts and every export, or nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_harness import on_grid, tokenizer
from family_harness import TEXT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fleetune import models
from fleetune.cli.commands.compress import _next_target
from fleetune.common import sums
from fleetune.deploy.export import export
from fleetune.errors import ModelError, UsageError
from fleetune.models import Model, artefact
from fleetune.models.artefact import ArtefactHead, Quantised
from fleetune.tuning.recipe import objects

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 260,
    "eos_token_id": 261,
    "pad_token_id": 261,
}
KINDS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "deepseek_v3": {
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "qk_nope_head_dim": 32,
        "n_shared_experts": 1,
    },
}


def model_of(kind: str, folder: Path) -> Model:
    """Save and load a tiny random model whose buffers are not those that transformers begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **KINDS[kind]))
        for _, tensor in net.named_parameters():
            torch.nn.init.normal_(tensor, 0 if tensor.dim() > 1 else 1, 0.08)
        for buffer in buffers_of(net).values():
            buffer.normal_(0, 0.5) if buffer.dim() else buffer.fill_(0.9)
    models.save(net, tokenizer(), folder)
    return models.load(str(folder), device="cpu")


def buffers_of(net: Any) -> dict[str, torch.Tensor]:
    parameters = dict(net.named_parameters(remove_duplicate=False))
    return {name: tensor for name, tensor in net.state_dict().items() if name not in parameters}


def compressed(model: Model, folder: Path) -> dict[str, torch.Tensor]:
    """Write an artefact with every linear layer of the blocks in 8 bits; its buffers."""
    quantised: dict[str, Quantised | torch.Tensor] = {
        f"{name}.weight": on_grid(layer.weight, 8, 32)
        for name, layer in model.net.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".layers." in name
    }
    artefact.write(folder, model, quantised, ArtefactHead("rtn", {}, model.digest, model.tokenizer_digest))
    buffers = buffers_of(model.net)
    assert quantised
    assert buffers
    return buffers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["hf", "hf:bf16", "compressed-tensors", "gptq"])
def test_every_directory_has_them_as_they_are(kind: str, to: str, tmp_path: Path) -> None:
    buffers = compressed(model_of(kind, tmp_path / "m"), tmp_path / "codes")
    export(tmp_path / "codes", to, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in buffers.items())


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_are_near_the_dense_model(kind: str, tmp_path: Path) -> None:
    dense = model_of(kind, tmp_path / "m")
    compressed(dense, tmp_path / "codes")
    export(tmp_path / "codes", "hf", tmp_path / "hf")
    plain, codes = models.load(str(tmp_path / "hf"), device="cpu"), models.load_artefact(tmp_path / "codes")
    with torch.no_grad():
        own, *others = (
            m.net(input_ids=torch.tensor([TEXT])).logits[0].double().log_softmax(-1)
            for m in (dense, plain, codes)
        )
    assert torch.equal(*others)
    assert float((own.exp() * (own - others[0])).sum(-1).mean()) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_directory_is_written_as_it_is_stored(kind: str, tmp_path: Path) -> None:
    net = model_of(kind, tmp_path / "m").net.bfloat16()
    for buffer in (buffers := buffers_of(net)).values():
        buffer.data = buffer.float() + 1e-4  # which bf16 would round
    stored = net.state_dict() | buffers
    save_file(stored, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    report = export(tmp_path / "m", "hf", tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert {n: t.dtype for n, t in written.items()} == {n: t.dtype for n, t in stored.items()}
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())
    assert (report.exact, report.tensors, report.notes) == (len(stored), len(stored), ())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["m", "codes"])
def test_a_source_that_lacks_one_is_not_exported(kind: str, folder: str, tmp_path: Path) -> None:
    lost = max(compressed(model_of(kind, tmp_path / "m"), tmp_path / "codes"))
    (file,) = (tmp_path / folder).glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        kept, about = {n: opened.get_tensor(n) for n in opened.keys() if n != lost}, opened.metadata()  # noqa: SIM118
    save_file(kept, file, about)
    (tmp_path / folder / sums.FILE).unlink(missing_ok=True)
    with pytest.raises(ModelError, match=f"lacks {lost}"):
        export(tmp_path / folder, "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_refusal_of_gguf_names_the_target_that_keeps_the_codes(kind: str, tmp_path: Path) -> None:
    compressed(model_of(kind, tmp_path / "m"), tmp_path / "codes")
    for folder, hint in (("codes", "use --to compressed-tensors or --to hf"), ("m", "use --to hf")):
        with pytest.raises(UsageError, match=f"not written for a '{kind}'") as caught:
            export(tmp_path / folder, "gguf", tmp_path / "x.gguf")
        assert caught.value.hint == hint
    assert _next_target(tmp_path / "codes") == "compressed-tensors"


def test_models_in_memory_that_differ_in_a_buffer_are_two(tmp_path: Path) -> None:
    model = model_of("deepseek_v3", tmp_path / "m")
    first = objects.model_name(model.net, model.tokenizer, tmp_path / "runs")
    next(iter(buffers_of(model.net).values())).add_(1)
    assert objects.model_name(model.net, model.tokenizer, tmp_path / "runs") != first
