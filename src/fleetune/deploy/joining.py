# SPDX-License-Identifier: Apache-2.0
"""Join the parameters that a directory stores in parts, as published mixtures of experts do: a matrix an expert.

transformers knows for each family which tensors of a directory become which parameter (`WeightConverter`), and in which
order.  Its own conversions run here, for one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Final, Protocol

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from fleetune.errors import ModelError
from fleetune.models.artefact import Quantised

AGAIN: Final = "the weights belong to another configuration: make or fetch the model again"


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


class JoinedSource:
    """A source under the names that it has, but for the parameters that it stores in parts: under transformers' names."""

    def __init__(self, source: TensorSource, net: PreTrainedModel) -> None:
        """ModelError when the source has some parts of a parameter and not all."""
        self.source, self._net = source, net
        has = set(source.names)
        self._parts: dict[str, list[str]] = {}
        for name, parts in _parts_of(net).items():
            if has.isdisjoint(parts):
                continue
            if missing := [part for part in parts if part not in has]:
                raise ModelError(f"{source.folder} lacks {missing[0]}", hint=AGAIN)
            self._parts[name] = parts

    @property
    def folder(self) -> Path:
        """The source's folder."""
        return self.source.folder

    @property
    def names(self) -> list[str]:
        """The parameters; those in parts once."""
        parts = {part for found in self._parts.values() for part in found}
        return [*(name for name in self.source.names if name not in parts), *self._parts]

    def quantised(self, name: str) -> Quantised | None:
        """Return the codes of a parameter; None for a dense one, as those in parts are."""
        return None if name in self._parts else self.source.quantised(name)

    def weight(self, name: str) -> Tensor:
        """Return the values of a parameter; all its parts are in memory beside it until it is joined."""
        if name not in self._parts:
            return self.source.weight(name)
        return self._joined(name, ((part, self.source.weight(part)) for part in self._parts[name]))

    def _joined(self, name: str, parts: Iterable[tuple[str, Tensor]]) -> Tensor:
        renamings, converters = self._conversions
        joining: WeightConverter | None = None
        for part, tensor in parts:
            key, pattern = rename_source_key(part, renamings, converters)
            if joining is None:
                joining = deepcopy(next(c for c in converters if pattern in c.source_patterns))
            joining.add_tensor(key, part, pattern, tensor)
        assert joining is not None
        try:
            found: Tensor = joining.convert(name, model=self._net, config=self._net.config)[name]
        except (RuntimeError, KeyError) as error:  # experts of different shapes
            raise ModelError(
                f"{self.folder}: the parts of {name} do not join ({error})", hint=AGAIN
            ) from error
        return found

    @cached_property
    def _conversions(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        every = get_model_conversion_mapping(self._net, add_legacy=False)
        return (
            [found for found in every if isinstance(found, WeightRenaming)],
            [found for found in every if isinstance(found, WeightConverter)],
        )


def _parts_of(net: PreTrainedModel) -> dict[str, list[str]]:
    """Return the names of the parts, in order, of each parameter that transformers writes in parts."""
    found = dict[str, list[str]]()
    parameters = dict(net.named_parameters())
    whole = {id(parameter) for parameter in parameters.values()}
    if all(id(tensor) in whole for tensor in revert_weight_conversion(net, parameters).values()):
        return found
    for name, parameter in parameters.items():
        written = revert_weight_conversion(net, {name: parameter})
        if not any(tensor is parameter for tensor in written.values()):
            found[name] = sorted(written, key=dot_natural_key)
    return found
