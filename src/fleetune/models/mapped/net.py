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


class NotMappable(ModelError):
    """A model's files hold its tensors in another form than the model does, so that they cannot be read piece by piece."""


def leave_in_file(
    net: Any,
    tensors: Mapping[str, Stored],
    dtype: torch.dtype,
    path: Path,
    *,
    drawn: Collection[str] = (),
    ignored: Collection[str] = (),
) -> None:
    """Make the matrices of a net, made of `placeholders`, lazy weights; norms and biases come into memory.

    `drawn` are the parameters that the files do not hold and the net has drawn (an encoder's new head): they stay as they
    are.  `ignored` are tensors of the files that the net has no place for.  NotMappable unless every other parameter is one
    tensor of the files and every other tensor one parameter: experts that are put together while a model is loaded are not.
    """
    memory, head = Memory(), net.get_output_embeddings()
    names: dict[int, list[str]] = {}
    for name, tensor in net.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    made: dict[int, Tensor] = {}
    left = set(tensors) - set(ignored)
    for tensor in list(net.parameters()):
        own = min(names[id(tensor)])
        found = _name_of(names[id(tensor)], tensors)
        if found is None:
            if not set(names[id(tensor)]) & set(drawn):
                raise _not_mappable(path, own)
            continue
        if tensors[found].shape != tuple(tensor.shape):
            raise _not_mappable(path, own)
        left -= {found, *names[id(tensor)]}
        lazy = LazyWeight.make(own, tensors[found], dtype, memory, streams=_is_of(head, tensor))
        made[id(tensor)] = lazy if tensor.dim() > 1 else nn.Parameter(lazy.values(), requires_grad=False)
    if left:
        raise _not_mappable(path, min(left))
    replace_parameters(net, made)


def _not_mappable(path: Path, name: str) -> NotMappable:
    return NotMappable(
        f"{path} holds its tensors in another form than the model does ({name}): they cannot be read piece by piece",
        hint="use --base memory, and no --low-memory",
    )


def _name_of(names: list[str], tensors: Mapping[str, Stored]) -> str | None:
    """Return a parameter's name among a file's tensors, which may leave out its beginning."""
    for name in names:
        if name in tensors:
            return name
    ends = [n for n in tensors if any(name.endswith(f".{n}") for name in names)]
    return ends[0] if len(ends) == 1 else None


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
