# SPDX-License-Identifier: Apache-2.0
"""Compute the activations of a layer again in the backward pass instead of keeping them.

Of a forward pass only what enters each layer stays: layers x tokens x width numbers (Chen, Xu, Zhang and Guestrin 2016,
arXiv 1604.06174).  Dropout draws the same numbers both times, so in fp32 the gradients are bit for bit those of a pass that
keeps everything.

glibc does not use a freed block for another of its size where torch asks for aligned memory: each layer leaves some MB
behind that nothing can use, so every few layers what is free goes back to the system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fleetune.common.memory import give_back
from fleetune.errors import ModelError
from fleetune.models.net.layers import layers_of

# bytes that enter all layers together: below, keeping everything takes little memory
SMALL: Final = 2 << 20
LARGE: Final = 1 << 20  # bytes that enter one layer; from here on what it leaves behind counts
EVERY: Final = 5  # layers, forward or again, after which free memory is given back


@contextmanager
def by_layer(net: nn.Module, *, small: int | None = None) -> Iterator[None]:
    """Checkpoint every layer of a net while the block runs; a net that has no list of layers keeps its activations.

    So does any net for a batch whose layers are entered by fewer than `small` bytes (None: `SMALL`) together.
    """
    try:
        layers = [net.get_submodule(layer.name) for layer in layers_of(net)]
    except ModelError:
        layers = []
    before = [layer.__dict__.get("forward") for layer in layers]
    least = (SMALL if small is None else small) / max(1, len(layers))
    for place, layer in enumerate(layers):
        layer.forward = _again(layer.forward, least, place % EVERY == EVERY - 1)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def _again(forward: Callable[..., Any], least: float, gives_back: bool) -> Callable[..., Any]:
    """Return a layer's forward that is run under a checkpoint where at least `least` bytes enter it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if gives_back and _entering(args, kwargs) >= LARGE:
            give_back()
        return forward(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or _entering(args, kwargs) < least:
            return forward(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return call


def _entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the bytes of the hidden states among a layer's arguments."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden.numel() * hidden.element_size() if isinstance(hidden, Tensor) else 0
