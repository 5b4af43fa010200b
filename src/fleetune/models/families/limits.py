# SPDX-License-Identifier: Apache-2.0
"""State for which configurations of a family a runtime computes the same as transformers; the tables of runtimes build on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fleetune.models.families import rope

Options = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a configuration may say; any other value is refused."""

    options: Options = field(default_factory=dict)  # field -> values for which the runtime computes the same
    needed: tuple[str, ...] = ()  # fields that may not be None
    rotary: bool = True
    scalings: tuple[str, ...] = ("default",)  # kinds of rescaled rotary frequencies
    partial: bool = False  # a part of each head may be rotated
    square: bool = True  # heads must be as wide together as the model
    layers: tuple[str, ...] = ("full_attention",)  # what a block may be, where a configuration says
    mixed: bool = False  # there must be blocks of each of these kinds
    misfit: Callable[[Any], str | None] = lambda config: None  # what else has no place

    def unmet(self, config: Any) -> str | None:
        """Return what of a configuration has no place; None when all has one."""
        kind = str(config.model_type)
        for name, values in self.options.items():
            if (value := getattr(config, name, values[0])) not in values:
                return f"{name}={value!r} in a {kind}"
        for name in self.needed:
            if getattr(config, name) is None:
                return f"{name}=None in a {kind}"
        if self.rotary and (scaling := rope.kind(config)) not in self.scalings:
            return f"rotary scaling '{scaling}' in a {kind}"
        local = rope.in_windows(config)
        if local.get("rope_type", "default") != "default" or local.get("partial_rotary_factor", 1) != 1:
            return f"rescaled or partly rotated heads in the windows of a {kind}"
        if self.rotary and not self.partial and rope.width(config) != rope.head_dim(config):
            return f"partly rotated heads in a {kind}"
        found = getattr(config, "layer_types", None) or ()
        if other := [layer for layer in found if layer not in self.layers]:
            return f"layer_types with '{other[0]}' in a {kind}"
        if self.mixed and (lacking := [layer for layer in self.layers if layer not in found]):
            return f"layer_types without {lacking[0]} in a {kind}"
        if self.square and (wide := rope.head_dim(config) * config.num_attention_heads) != config.hidden_size:
            return f"a {kind} whose heads are {wide} wide together where the model is {config.hidden_size}"
        return self.misfit(config)


def irregular(config: Any, period: int) -> str | None:
    """Return a complaint unless the last of each `period` blocks looks at everything, and the others at a window; 0: always."""
    whole = [i + 1 for i, layer in enumerate(config.layer_types) if layer == "full_attention"]
    if period and whole == list(range(period, config.num_hidden_layers + 1, period)):
        return None
    return f"layer_types without a regular place for full_attention in a {config.model_type}"


def only(*others: Options, **fields: tuple[Any, ...]) -> Options:
    """Return options: those of others, and the values that fields may have."""
    return {name: values for options in (*others, fields) for name, values in options.items()}


SILU: Final = only(hidden_act=("silu",))
OWN_HEAD: Final = only(tie_word_embeddings=(False,))
TIED: Final = only(tie_word_embeddings=(True,))
ALL_EXPERTS: Final = only(decoder_sparse_step=(1,), mlp_only_layers=([],))  # in every block
NO_WINDOW: Final = only(use_sliding_window=(False,))
WINDOWS: Final = ("full_attention", "sliding_attention")
TANH: Final = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # transformers' names of the GELU by tanh
