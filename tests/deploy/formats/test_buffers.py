"""Buffers that stand in a checkpoint, such as a router's bias: in artefacts and every export, or nothing is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_harness import ENDS, on_grid, tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fleetune import models
from fleetune.common import sums
from fleetune.deploy.export import write as export
from fleetune.errors import ModelError
from fleetune.models import Model, artefact
from fleetune.models.artefact import ArtefactHead, Quantised
from tiny_families import sizes

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
SIZES = sizes(64, 96, 2, 4, 4, max_position_embeddings=128) | ENDS
WIDTHS = ["moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "v_head_dim"]
WIDTHS += ["qk_rope_head_dim", "qk_nope_head_dim"]
KINDS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "deepseek_v3": dict.fromkeys(WIDTHS, 32)
    | {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2}
    | {"first_k_dense_replace": 1, "n_shared_experts": 1},
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
@pytest.mark.parametrize("to", ["hf:bf16", "gptq"])
def test_every_directory_has_them_as_they_are(kind: str, to: str, tmp_path: Path) -> None:
    buffers = compressed(model_of(kind, tmp_path / "m"), tmp_path / "codes")
    export(tmp_path / "codes", to, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in buffers.items())


@pytest.mark.parametrize("folder", ["m", "codes"])
def test_a_source_that_lacks_one_is_not_exported(folder: str, tmp_path: Path) -> None:
    lost = max(compressed(model_of("apertus", tmp_path / "m"), tmp_path / "codes"))
    (file,) = (tmp_path / folder).glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        kept, about = {n: opened.get_tensor(n) for n in opened.keys() if n != lost}, opened.metadata()  # noqa: SIM118
    save_file(kept, file, about)
    (tmp_path / folder / sums.FILE).unlink(missing_ok=True)
    with pytest.raises(ModelError, match=f"lacks {lost}"):
        export(tmp_path / folder, "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
