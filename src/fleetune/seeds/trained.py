# SPDX-License-Identifier: Apache-2.0
"""Say what directions move of a model by its `trains`, and open the view that moves it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fleetune.common import ggml
from fleetune.models.dtypes import WEIGHTS
from fleetune.models.mapped.lazy import kinds_of
from fleetune.models.model import Model, named_tensors
from fleetune.seeds.block_view import BlockView
from fleetune.seeds.code_view import CodeView
from fleetune.seeds.scale_view import ScaleView
from fleetune.seeds.view import View

VIEWS: Final[Mapping[str, type[View]]] = MappingProxyType(  # of `ledger_head.TRAINS`
    {"weights": View, "scales": ScaleView, "codes": CodeView}
)


def moved_tensors(model: Model) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Return (name, shape, dtype) of what directions move of a model, in name order; UsageError where it has none."""
    named, view = named_tensors(model.net), VIEWS[model.trains]
    if issubclass(view, BlockView):
        dtype = WEIGHTS[model.dtype].full
        return tuple((name, shape, dtype) for name, shape in view.moved_of(named))
    return tuple((n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in named)


def blocks_share(model: Model) -> list[str]:
    """Say how much a model trains whose layers are not all in blocks that have what it trains, in one text; [] for others."""
    share = ggml.share(kinds_of(named_tensors(model.net)), model.trains) if model.trains in ggml.PARTS else ""
    return [share] if share else []


def view_on(model: Model, *, run_key: int, law: str, grid: float) -> View:
    """Return a view of a model that moves what `model.trains` says."""
    return VIEWS[model.trains](named_tensors(model.net), model.net, run_key=run_key, law=law, grid=grid)
