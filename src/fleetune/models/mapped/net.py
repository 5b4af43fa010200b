# SPDX-License-Identifier: Apache-2.0
"""Give a net its lazy weights, and take some or all of them into memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fleetune.errors import ModelError
from fleetune.models.mapped.lazy import LazyWeight, Memory, weights_of
from fleetune.models.mapped.stored import Stored


def placeholders(tensors: Mapping[str, Stored], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return tensors of these shapes by name that take no room, for a net to be made of."""
    return {name: torch.zeros((), dtype=dtype).expand(stored.shape) for name, stored in tensors.items()}


def leave_in_file(net: Any, tensors: Mapping[str, Stored], dtype: torch.dtype, path: Path) -> None:
    """Make the matrices of a net, made of `placeholders`, lazy weights; norms and biases come into memory.

    A parameter that the file does not hold stays as it is where the net has drawn it (an encoder's new head).  ModelError
    where the file names the tensors in another way than the net.
    """
    memory, head = Memory(), net.get_output_embeddings()
    names: dict[int, list[str]] = {}
    for name, tensor in net.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    own = {id(p): min(names[id(p)]) for p in net.parameters()}
    made: dict[int, Tensor] = {}
    for tensor in list(net.parameters()):
        stored = _stored(names[id(tensor)], tensors)
        if stored is None:
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise ModelError(
                    f"{path} names its tensors in another way than the model does ({own[id(tensor)]})",
                    hint="it cannot be read piece by piece: leave out --base mapped and --low-memory",
                )
            continue
        lazy = LazyWeight.make(own[id(tensor)], stored, dtype, memory, streams=_is_of(head, tensor))
        made[id(tensor)] = lazy if tensor.dim() > 1 else nn.Parameter(lazy.values(), requires_grad=False)
    replace_parameters(net, made)


def _stored(names: list[str], tensors: Mapping[str, Stored]) -> Stored | None:
    """Return the tensor of a file that has one of a parameter's names, with or without what a file leaves out in front."""
    for name in names:
        if name in tensors:
            return tensors[name]
    ends = [n for n in tensors if any(name.endswith(f".{n}") for name in names)]
    return tensors[ends[0]] if len(ends) == 1 else None


def _is_of(module: nn.Module | None, tensor: Tensor) -> bool:
    return module is not None and any(tensor is p for p in module.parameters(recurse=False))


def replace_parameters(net: nn.Module, new: Mapping[int, Any]) -> None:
    """Put parameters in the places of others, which are named by their `id`."""
    for module in net.modules():
        for name, tensor in module._parameters.items():
            if id(tensor) in new:
                module._parameters[name] = new[id(tensor)]


def into_memory(net: nn.Module, names: Collection[str] | None = None) -> None:
    """Bring the values of lazy weights into memory for good: of those `names` (in full), or of all."""
    lazy = {n: w for n, w in weights_of(net).items() if names is None or n in names}
    replace_parameters(net, {id(w): nn.Parameter(w.values(), requires_grad=False) for w in lazy.values()})


@contextmanager
def in_memory(part: nn.Module) -> Iterator[None]:
    """Keep the weights of a part of a net in memory while the block runs; of a net in memory nothing changes."""
    lazy = weights_of(part)
    held = {id(w): nn.Parameter(w.values(), requires_grad=False) for w in lazy.values()}
    replace_parameters(part, held)
    back = {id(held[id(w)]): w for w in lazy.values()}
    try:
        yield
    finally:
        replace_parameters(part, back)


def memory_of(net: nn.Module) -> Memory | None:
    """Return what a net's lazy weights share; None for a net in memory."""
    return next((w.memory for w in weights_of(net).values()), None)
