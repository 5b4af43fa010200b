"""What the tests of pruning share: tiny models of each family, rows, settings, the importance as the paper writes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gkd_harness import END
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from fleetune import compression, models
from fleetune.compression.methods import llm_pruner
from fleetune.data import Encoded
from fleetune.errors import Interrupted
from fleetune.models import Model
from tiny_families import drawn

IDS = torch.tensor([[256, 12, 200, 7, 255, 31, 90, 63, 64, 65]])


# of 12 matrices with rows of 96 and 2 with rows of 256
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_hidden_layers": 2,
}


def tiny(kind: str = "llama", seed: int = 0, **sizes: Any) -> Model:
    """A random model with 3 query heads to each of 3 key heads, with biases where the family may have them."""
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 264,
            "hidden_size": 36,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 4,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": 256,
            "eos_token_id": END,
            "pad_token_id": END,
        }
        | ({"attention_bias": True} if kind == "qwen3" else {})
        | (
            {"attention_bias": True, "mlp_bias": True}
            if kind == "llama" and sizes.pop("biases", False)
            else {}
        )
        | sizes,
    )
    return drawn(
        config,
        models.tiny_tokenizer(),
        kind,
        seed,
        0.2,
        lambda tensor: tensor.dim() == 1 and len(tensor) in (4, 36),
        dtype=torch.float32,
    )


def pruner(**values: Any) -> llm_pruner.Pruner:
    """Of a model of four blocks, whose middle two are pruned."""
    given = {
        "first": 1,
        "last": 1,
        "round_to": 4,
        "ratio": 0.34,
        "recover": "none",
        "steps": 4,
        "batch_size": 3,
    }
    made = compression.make("llm-pruner", given | values)
    assert isinstance(made, llm_pruner.Pruner)
    return made


def logits(net: Any) -> Tensor:
    with torch.no_grad():
        return net(IDS).logits


def gradients(model: Model, data: list[Encoded]) -> dict[str, list[Tensor]]:
    """float64 gradients of each row's mean loss, from whole logits, by parameter."""
    net = tiny(
        model.net.config.model_type, biases=bool(getattr(model.net.config, "mlp_bias", False))
    ).net.double()
    net.load_state_dict({name: p.double() for name, p in model.net.state_dict().items()})
    net.requires_grad_(True)
    names, parameters = zip(*net.named_parameters(), strict=True)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for row in data:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        out = net(ids[None]).logits[0, :-1]
        first = max(row.n_prompt, 1) - 1
        loss = F.cross_entropy(out[first:], ids[1:][first:])
        for name, g in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            found[name].append(g)
    return found


def importance(kind: str, w: Tensor, per_row: list[Tensor]) -> Tensor:
    """The paper's importance of every weight, float64."""
    w, n = w.double(), len(per_row)
    g = sum(per_row) / n
    fisher = sum(x * x for x in per_row) / n
    return {
        "magnitude": w.abs(),
        "first": (w * g).abs(),
        "second": w * w * fisher,
        "mixed": (w * g - w * w * fisher / 2).abs(),
    }[kind]


def stop_at(last: int) -> Any:
    """A callback that stops the work when it is called for step or row `last`."""

    def on(done: int, all_: int, *_: object) -> None:
        if done == last:
            raise Interrupted("stopped")

    return on
