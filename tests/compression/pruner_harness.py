"""What the tests of pruning share: tiny models of each family, rows, settings, the importance as the paper writes it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from fleetune import compression, models
from fleetune.compression.methods import llm_pruner
from fleetune.data import Encoded
from fleetune.errors import Interrupted
from fleetune.models import Model
from tiny_families import TOKENS, drawn, sizes

IDS = torch.tensor([[256, 12, 200, 7, 255, 31, 90, 63, 64, 65]])
# of 12 matrices with rows of 96 and 2 with rows of 256
SIZES = sizes(96, 256, 2, 3, 1, head_dim=32)


def tiny(kind: str = "llama", seed: int = 0, biases: bool = False, **changes: Any) -> Model:
    """A random model with 3 query heads to each of 3 key heads, with biases where the family may have them."""
    own = TOKENS | sizes(36, 40, 4, 9, 3, head_dim=4, max_position_embeddings=512, tie_word_embeddings=True)
    if biased := {"llama": biases, "qwen3": True}.get(kind):
        own |= {"attention_bias": biased, "mlp_bias": biased and kind == "llama"}
    config, words = AutoConfig.for_model(kind, **own | changes), models.tiny_tokenizer()

    def about_one(tensor: Tensor) -> bool:
        return tensor.dim() == 1 and len(tensor) in (4, 36)

    return drawn(config, words, kind, seed, 0.2, about_one, dtype=torch.float32)


GIVEN = {"first": 1, "last": 1, "round_to": 4, "ratio": 0.34, "recover": "none", "steps": 4, "batch_size": 3}


def pruner(**values: Any) -> llm_pruner.Pruner:
    """Of a model of four blocks, whose middle two are pruned."""
    made = compression.make("llm-pruner", GIVEN | values)
    assert isinstance(made, llm_pruner.Pruner)
    return made


def logits(net: Any) -> Tensor:
    with torch.no_grad():
        return net(IDS).logits


def gradients(model: Model, data: list[Encoded]) -> dict[str, list[Tensor]]:
    """float64 gradients of each row's mean loss, from whole logits, by parameter."""
    config = model.net.config
    net = tiny(config.model_type, biases=bool(getattr(config, "mlp_bias", False))).net.double()
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
