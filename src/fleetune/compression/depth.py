"""Copy a model with fewer decoder blocks, as students of DistilBERT start (Sanh et al. 2019, arXiv 1910.01108, section 3)."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from fleetune.models.families.widths import KEY, has_block_widths
from fleetune.models.net.layers import layers_of


def evenly_spaced(whole: int, keep: int) -> list[int]:
    """Return `keep` of `whole` block numbers, evenly spaced, with the first and the last (2 <= keep <= whole)."""
    gaps = keep - 1
    return [(2 * k * (whole - 1) + gaps) // (2 * gaps) for k in range(keep)]


def shallow(net: PreTrainedModel, keep: int) -> PreTrainedModel:
    """Copy `net` with `keep` of its decoder blocks, evenly spaced; `net` is left unchanged.

    Lists in the configuration with an entry a block (such as `layer_types`) are cut alike.  ModelError for a family
    whose blocks are not known.
    """
    kept = evenly_spaced(len(layers_of(net)), keep)
    path = layers_of(net)[0].name.rpartition(".")[0]
    parent, _, stack = path.rpartition(".")
    owner, whole = net.get_submodule(parent), cast(nn.ModuleList, net.get_submodule(path))
    setattr(owner, stack, nn.ModuleList(whole[i] for i in kept))
    try:
        cut = copy.deepcopy(net)
    finally:
        setattr(owner, stack, whole)
    for number, block in enumerate(cast(nn.ModuleList, cut.get_submodule(path))):
        for module in block.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = number
    _cut_config(cut.config.get_text_config(), len(whole), kept)
    return cut


def shallow_config(config: Any, keep: int) -> Any:
    """Return the configuration that `shallow` gives its copy."""
    cut, whole = copy.deepcopy(config), int(config.get_text_config().num_hidden_layers)
    _cut_config(cut.get_text_config(), whole, evenly_spaced(whole, keep))
    return cut


def _cut_config(config: Any, whole: int, kept: list[int]) -> None:
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == whole:
            setattr(config, name, [value[i] for i in kept])
    if has_block_widths(config):
        table = getattr(config, KEY)
        setattr(config, KEY, {name: [found[i] for i in kept] for name, found in table.items()})
    config.num_hidden_layers = len(kept)
