"""A solver that keeps what it is given, windows of random tokens, and what the layers of a compressed model read."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig, Qwen2Config, Qwen3Config

from fleetune import models
from fleetune.compression import Solved
from fleetune.compression.layerwise.blocks import FinishedBlocks
from fleetune.compression.layerwise.driver import linears_of, place_weights, restored_weights
from fleetune.models import Model
from tiny_families import sizes


def text(count: int, length: int) -> Tensor:
    """Windows int64 [count, length], the same at every call."""
    return torch.randint(0, 250, (count, length), generator=torch.Generator().manual_seed(3))


class Spy:
    """Rounds coarsely and keeps the Hessians it was given."""

    data = True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def check(self, name: str, R: int, C: int) -> str:
        return ""

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        self.seen.append(H.clone())
        return Solved(torch.round(W * 16) / 16)


SMALL = sizes(32, 48, 3, 4, 2, head_dim=8, vocab_size=300, max_position_embeddings=64)
FAMILIES = {
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=8),
    "gemma2": Gemma2Config(**SMALL, sliding_window=8, query_pre_attn_scalar=8),
}


def model_of(family: str) -> Model:
    model = models.tiny_llama()
    if family != "llama":
        torch.manual_seed(1)
        model.net = AutoModelForCausalLM.from_config(FAMILIES[family]).eval().requires_grad_(False)
    return model


def inputs_of(model: Model, linears: Mapping[str, nn.Linear], windows: Tensor) -> dict[str, Tensor]:
    """float64 [tokens, C] by layer: what it reads while the model runs, window by window."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}

    def hook(name: str) -> Any:
        return lambda module, args: seen[name].append(args[0][0])

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    with torch.inference_mode():
        for window in windows:
            model.net(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found).double() for name, found in seen.items()}


def compressed_inputs(
    model: Model, parts: FinishedBlocks, windows: Tensor, *, in_turn: bool
) -> Iterator[tuple[str, Tensor]]:
    """(name, inputs) of each layer in the order they were solved, from the model with the blocks before it compressed.

    With `in_turn` the layers of its own block that were solved before it are compressed too.
    """
    every = {name: linear for _, linears in linears_of(model) for name, linear in linears.items()}
    done: dict[str, Any] = {}
    for block in parts.blocks:
        names = [matrix.name for matrix in block.matrices]
        for at, name in enumerate(names):
            own = {n: every[n] for n in names[:at]} if in_turn else {}
            with restored_weights(done | own):
                place_weights(done | own, parts)
                x = inputs_of(model, {name: every[name]}, windows)[name]
            yield name, x
        done |= {n: every[n] for n in names}
