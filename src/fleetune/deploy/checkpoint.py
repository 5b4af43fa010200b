"""Read the source of an export, a master artefact or a plain Hugging Face directory, one tensor at a time.

The `state_dict` of a model that is built from the configuration on the meta device says which tensors there are, which of them
are one (tied embeddings) and which belong to linear layers.  The source must hold every one of them and nothing else.  It may
hold a parameter in parts (a matrix an expert): transformers knows which (`WeightConverter`), and its own conversions run here.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from fleetune.deploy.again import Again
from fleetune.errors import ModelError, UsageError
from fleetune.models.artefact import Master, Quantised
from fleetune.models.cache.names import is_master
from fleetune.models.checks import check_folder, config_of, is_encoder
from fleetune.models.families.foreign import foreign_file
from fleetune.models.families.widths import build
from fleetune.models.lazy import LazyWeight, memory_of
from fleetune.models.loading import size_check
from fleetune.models.net.model import Model, named_tensors
from fleetune.models.net.saving import save, written

ANOTHER: Final = "the weights belong to another configuration: make or fetch the model again"
COMPUTED: Final = ("rotary_emb.inv_freq",)  # old checkpoints hold them; models compute them


class TensorSource(Protocol):
    """A model on disk, read one tensor at a time."""

    @property
    def folder(self) -> Path:
        """The folder with config.json and the tokenizer's files."""

    @property
    def names(self) -> list[str]:
        """The parameters, quantised or not."""

    def quantised(self, name: str) -> Quantised | None:
        """Return the codes of a parameter; None for a dense one."""

    def weight(self, name: str) -> Tensor:
        """Return the values of a parameter."""


class PlainFolder:
    """A plain Hugging Face directory, one safetensors file or shards."""

    def __init__(self, folder: Path) -> None:
        """ModelError when the directory is incomplete or damaged."""
        check_folder(folder)
        self.folder = folder
        one = folder / "model.safetensors"
        index = folder / "model.safetensors.index.json"
        shards = {} if one.is_file() else json.loads(index.read_bytes())["weight_map"]
        files = sorted({index.parent / name for name in shards.values()}) or [one]
        self._files: dict[str, Path] = {}
        for file in files:
            with _opened(file) as head:
                self._files |= dict.fromkeys(head.keys(), file)

    @property
    def names(self) -> list[str]:
        """The parameters in the order of their names."""
        return sorted(name for name in self._files if not name.endswith(COMPUTED))

    def quantised(self, name: str) -> None:
        """Return None: nothing in a plain directory is quantised."""

    def weight(self, name: str) -> Tensor:
        """Return the values of a parameter in the stored dtype."""
        with _opened(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


class Tuned:
    """A model in memory whose tuned weights are made when they are asked for, where they can be: they are not stored."""

    def __init__(self, model: Model) -> None:
        """What the model carries is taken off, or merged; ModelError as of `Model.merge`."""
        carried, self.model = model.attachment, model
        # what makes the tuned values, by the address of the stored ones
        self.moved: dict[int, Callable[[], Tensor]] = carried.moved() if memory_of(model.net) is None else {}
        (carried.detach if self.moved else carried.merge)(model)
        if self.moved and _parts_of(model.net):  # a part does not lie where its whole does
            for _, tensor in named_tensors(model.net):
                tensor.copy_(self.values(tensor))
            self.moved = {}

    def values(self, stored: Tensor) -> Tensor:
        """Return the tuned values of a stored tensor."""
        make = self.moved.get(stored.data_ptr()) if self.moved else None
        return stored if make is None else make()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tuned parameters as `named_tensors` does."""
        return ((name, self.values(tensor)) for name, tensor in named_tensors(self.model.net))


class InMemory:
    """A model in memory; `folder` gets its configuration and tokenizer."""

    def __init__(self, tuned: Tuned, folder: Path) -> None:
        save(tuned.model.net, tuned.model.tokenizer, folder, weights=False)
        self.folder, self._tuned, self._tensors = folder, tuned, written(tuned.model.net)
        self.tokenizer = tuned.model.tokenizer

    @property
    def names(self) -> list[str]:
        """The parameters in the order of their names."""
        return sorted(self._tensors)

    def quantised(self, name: str) -> None:
        """Return None: nothing in memory is quantised."""

    def weight(self, name: str) -> Tensor:
        """Return the values of a parameter in the model's dtype."""
        tensor = self._tensors[name]
        return tensor.values() if isinstance(tensor, LazyWeight) else self._tuned.values(tensor)


def _opened(file: Path) -> Any:
    with foreign_file(file, "is damaged"):
        return safe_open(file, framework="pt")


class Checkpoint:
    """A source under transformers' parameter names, in the order of the model's modules."""

    def __init__(self, source: TensorSource, *, foreign: bool = False) -> None:
        """UsageError for an encoder; ModelError for tensors (or sizes, of a `foreign` folder) that the configuration lacks."""
        self.source = source
        self.folder = source.folder
        self.again: Again | None = None  # what an export is compared with, in place of being written
        self.tokenizer = source.tokenizer if isinstance(source, InMemory) else None  # where it is loaded
        self.compressed = isinstance(source, Master)  # whether it is a master artefact
        self.config: Any = config_of(source.folder)
        if is_encoder(self.config):
            raise UsageError(
                f"{source.folder} holds an encoder; only causal language models are exported",
                hint="save it as it is: an encoder's directory is ready for transformers",
            )
        with foreign_file(self.folder / "config.json"):
            inspect = [size_check(self.config, self.folder)] if foreign else []
            self._net = build(self.config, *inspect)
        state: dict[str, Tensor] = self._net.state_dict(keep_vars=True)
        self._parts = _stored_parts(self._net, source)
        # the name under which the source has a tensor
        self.stored = _stored_names(self._net, state, source, self._parts)
        self.shapes = {name: tuple(state[name].shape) for name in self.stored}
        self.buffers = self.shapes.keys() - dict(self._net.named_parameters())
        modules = self._net.named_modules()
        self.linears = frozenset(f"{n}.weight" for n, m in modules if isinstance(m, nn.Linear))

    @property
    def names(self) -> list[str]:
        """The parameters and the `buffers`; a tied one under the name of the input embedding."""
        return list(self.shapes)

    def quantised(self, name: str) -> Quantised | None:
        """Return the codes of a tensor; None for a dense one, as those in parts are."""
        stored = self.stored[name]
        q = None if stored in self._parts else self.source.quantised(stored)
        if q is not None:
            self._check_shape(name, q.shape)
        return q

    def weight(self, name: str) -> Tensor:
        """Return the values of a tensor: float32 for a quantised one, else in the stored dtype.

        All parts of a parameter are in memory beside it until it is joined.
        """
        stored = self.stored[name]
        weight = self._joined(stored) if stored in self._parts else self.source.weight(stored)
        self._check_shape(name, tuple(weight.shape))
        return weight

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters that are not quantised, taken from the smallest of them."""
        names = self.shapes.keys() - self.buffers
        return self.weight(min(names, key=lambda name: (len(self.shapes[name]), name))).dtype

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if shape != self.shapes[name]:
            raise ModelError(
                f"{self.folder}: {name} has shape {shape}, the configuration says {self.shapes[name]}",
                hint=ANOTHER,
            )

    def _joined(self, name: str) -> Tensor:
        renamings, converters = self._conversions
        joining: loading.WeightConverter | None = None
        for part in self._parts[name]:
            key, pattern = loading.rename_source_key(part, renamings, converters)
            if joining is None:
                joining = deepcopy(next(c for c in converters if pattern in c.source_patterns))
            joining.add_tensor(key, part, pattern, self.source.weight(part))
        assert joining is not None
        try:
            joined: Tensor = joining.convert(name, model=self._net, config=self._net.config)[name]
        except (RuntimeError, KeyError) as error:  # experts of different shapes
            raise ModelError(
                f"{self.folder}: the parts of {name} do not join ({error})", hint=ANOTHER
            ) from error
        return joined

    @cached_property
    def _conversions(self) -> tuple[list[loading.WeightRenaming], list[loading.WeightConverter]]:
        every = get_model_conversion_mapping(self._net, add_legacy=False)
        renamings = [one for one in every if isinstance(one, loading.WeightRenaming)]
        return renamings, [one for one in every if isinstance(one, loading.WeightConverter)]


def _stored_names(
    net: PreTrainedModel,
    state: Mapping[str, Tensor],
    source: TensorSource,
    parted: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    """Return for each tensor of a net's `state`, tied ones once, the name that the source stores it under.

    A parameter that the source stores in parts (`parted`) gets its name in transformers.
    """
    aliases: dict[int, list[str]] = {}
    for name, tensor in state.items():
        aliases.setdefault(id(tensor), []).append(name)
    front, written = f"{net.base_model_prefix}.", _written_names(net, state)
    has = set(source.names).difference(*parted.values()) | parted.keys()
    stored, known = dict[str, str](), set[str]()
    for identity, names in aliases.items():
        # checkpoints of a bare body (GPT-2's, Bloom's) have no name of the body in front
        spellings = [*names, *written[identity], *(name.removeprefix(front) for name in names)]
        stored[names[0]] = next((name for name in spellings if name in has), "")
        known.update(spellings)
    missing = sorted(name for name, there in stored.items() if not there)
    ignored = [re.compile(pattern) for pattern in net._keys_to_ignore_on_load_unexpected or ()]
    extra = sorted(name for name in has - known if not any(pattern.search(name) for pattern in ignored))
    if missing or extra:
        what = (
            f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which the configuration does not have"
        )
        raise ModelError(f"{source.folder} {what}", hint=ANOTHER)
    return stored


def _written_names(net: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """Return the names under which transformers writes each tensor that it writes whole, by its identity."""
    whole: dict[int, list[str]] = {id(tensor): [] for tensor in state.values()}
    for name, tensor in loading.revert_weight_conversion(net, dict(state)).items():
        if id(tensor) in whole:
            whole[id(tensor)].append(name)
    return whole


def _stored_parts(net: PreTrainedModel, source: TensorSource) -> dict[str, list[str]]:
    """Return the parts of those parameters that the source has in parts; ModelError where it has some of one and not all."""
    has, parted = set(source.names), dict[str, list[str]]()
    for name, parts in _parts_of(net).items():
        if has.isdisjoint(parts):
            continue
        if missing := [part for part in parts if part not in has]:
            raise ModelError(f"{source.folder} lacks {missing[0]}", hint=ANOTHER)
        parted[name] = parts
    return parted


def _parts_of(net: PreTrainedModel) -> dict[str, list[str]]:
    """Return the names of the parts, in order, of each parameter that transformers writes in parts."""
    found = dict[str, list[str]]()
    parameters = dict(net.named_parameters())
    whole = {id(parameter) for parameter in parameters.values()}
    if all(id(tensor) in whole for tensor in loading.revert_weight_conversion(net, parameters).values()):
        return found
    for name, parameter in parameters.items():
        written = loading.revert_weight_conversion(net, {name: parameter})
        if not any(tensor is parameter for tensor in written.values()):
            found[name] = sorted(written, key=loading.dot_natural_key)
    return found


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the model of a folder, a master artefact or a plain directory; ModelError when it is neither."""
    return Checkpoint(Master(folder) if is_master(folder) else PlainFolder(folder), foreign=True)
