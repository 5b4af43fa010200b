# SPDX-License-Identifier: Apache-2.0
"""Run a model larger than memory: read a part's weights from its files when it runs, and drop them after.

A part is a decoder block, or any module outside the blocks that has weights of its own (embedding, last norm, head).
Only one is in memory at a time, in the dtype that was asked for, so that a model larger than memory can be compressed
block by block.  The file is mapped anew for each read, so that the system gets its pages back at once; the values are
those of `models.load` bit for bit.  The price: every forward pass reads the whole model again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from fleetune.errors import ModelError
from fleetune.models.model import Model, named_tensors


class Pages:
    """Hooks that bring each part of a net into memory for as long as it runs."""

    def __init__(self, net: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
        """Hook into `net`, made of `stubs`.  ModelError where the files name its tensors in another way."""
        self.dtype = dtype
        self.changed: Callable[[str], Tensor | None] = lambda name: None  # weights that replace the files'
        self._names = [name for name, _ in named_tensors(net)]
        self._name = {id(tensor): name for name, tensor in named_tensors(net)}
        self._place = _places(net, folder, self._name)
        self._stubs: dict[int, Tensor] = {}  # of parts that are in memory
        self._loaded: set[nn.Module] = set()
        for part in _parts(net):
            part.register_forward_pre_hook(lambda part, args: self._read(part))
            part.register_forward_hook(lambda part, args, out: self._drop(part), always_call=True)

    def weight(self, name: str) -> Tensor:
        """Return a parameter's values in the dtype that was asked for."""
        changed = self.changed(name)
        if changed is None:
            file, stored = self._place[name]
            with safe_open(file, "pt") as opened:
                changed = opened.get_tensor(stored)
        return changed.to(self.dtype)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, values) of every parameter in name order, one in memory at a time."""
        for name in self._names:
            yield name, self.weight(name)

    @contextmanager
    def keep_loaded(self, part: nn.Module) -> Iterator[None]:
        """Keep a part in memory while the block runs, however often the part runs."""
        self._read(part)
        self._loaded.add(part)
        try:
            yield
        finally:
            self._loaded.discard(part)
            self._drop(part)

    def _read(self, part: nn.Module) -> None:
        for tensor in part.parameters():
            if id(tensor) not in self._stubs:
                self._stubs[id(tensor)] = tensor.data
                tensor.data = self.weight(self._name[id(tensor)])

    def _drop(self, part: nn.Module) -> None:
        if part not in self._loaded:
            for tensor in part.parameters():
                tensor.data = self._stubs.pop(id(tensor), tensor.data)


def stubs(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a directory by name and shape, with one value each that takes no room."""
    found = {}
    for file in _files(folder):
        with safe_open(file, "pt") as opened:
            for name in list(opened.keys()):
                found[name] = torch.zeros((), dtype=dtype).expand(opened.get_slice(name).get_shape())
    return found


def _files(folder: Path) -> list[Path]:
    one = folder / "model.safetensors"
    return [one] if one.is_file() else sorted(folder.glob("model-*.safetensors"))


def _parts(net: PreTrainedModel) -> list[nn.Module]:
    from fleetune.models.layers import layers_of

    names = {layer.name for layer in layers_of(net)}
    modules = dict(net.named_modules())
    inside = tuple(f"{name}." for name in names)
    ends = [
        module
        for name, module in modules.items()
        if name not in names and not name.startswith(inside) and list(module.parameters(recurse=False))
    ]
    return [*(modules[name] for name in sorted(names)), *ends]


def _places(net: PreTrainedModel, folder: Path, names: dict[int, str]) -> dict[str, tuple[Path, str]]:
    """Return each parameter's file, and its name there (a tied one may have its other name)."""
    files = dict[str, Path]()
    for file in _files(folder):
        with safe_open(file, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    found = {}
    for name, tensor in net.named_parameters(remove_duplicate=False):
        if name in files:
            found[names[id(tensor)]] = (files[name], name)
    if lacking := sorted(set(names.values()) - set(found)):
        raise ModelError(
            f"the files in {folder} name their tensors in another way than the model does ({lacking[0]})",
            hint="it cannot be read block by block: leave out --low-memory",
        )
    return found


def pages_of(model: Model) -> Pages | None:
    """Return a model's pages; None for a model that is in memory."""
    return model.attachment if isinstance(model.attachment, Pages) else None


def tensors_of(model: Model) -> Iterable[tuple[str, Tensor]]:
    """Return (name, values) of every parameter in name order, in memory or in files."""
    pages = pages_of(model)
    return named_tensors(model.net) if pages is None else pages.items()


@contextmanager
def in_memory(model: Model, part: Any) -> Iterator[None]:
    """Keep the weights of a part in memory while the block runs, for a model that is in its files."""
    pages = pages_of(model)
    if pages is None:
        yield
    else:
        with pages.keep_loaded(part):
            yield
