# SPDX-License-Identifier: Apache-2.0
"""Compute the activations of a layer again in the backward pass instead of keeping them.

Of a forward pass only what enters each layer stays: layers x tokens x width numbers (Chen, Xu, Zhang and Guestrin 2016,
arXiv 1604.06174).  Dropout draws the same numbers both times, so in fp32 the gradients are bit for bit those of a pass that
keeps everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fleetune.errors import ModelError
from fleetune.models.layers import layers_of


@contextmanager
def by_layer(net: nn.Module) -> Iterator[None]:
    """Checkpoint every layer of a net while the block runs; a net that has no list of layers keeps its activations."""
    try:
        layers = [net.get_submodule(layer.name) for layer in layers_of(net)]
    except ModelError:
        layers = []
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _again(layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
