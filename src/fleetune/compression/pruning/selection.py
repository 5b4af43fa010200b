# SPDX-License-Identifier: Apache-2.0
"""Choose the heads, channels or blocks that stay, by their importance (LLM-Pruner, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fleetune.compression.pruning.importance import Shares
from fleetune.models.families.widths import KeptUnits, Width, width_of

AGGREGATES: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "sum": lambda shares: shares.sum(0),
    "mean": lambda shares: shares.mean(0),
    "max": lambda shares: shares.amax(0),
    "prod": lambda shares: shares.prod(0),
}


def select_units(
    blocks: Sequence[Any],
    shares: Mapping[int, Shares],
    aggregate: str,
    ratio: float,
    round_to: int,
    *,
    across_blocks: bool,
) -> dict[int, KeptUnits]:
    """Return the heads and channels that stay in each block; blocks without shares keep all of theirs."""
    heads = {i: AGGREGATES[aggregate](share.heads) for i, share in shares.items()}
    channels = {i: AGGREGATES[aggregate](share.channels) for i, share in shares.items()}
    stay = choose(heads, ratio, 1, across_blocks), choose(channels, ratio, round_to, across_blocks)
    return all_units(blocks) | {i: KeptUnits(stay[0][i], stay[1][i]) for i in shares}


def select_blocks(
    blocks: Sequence[Any], shares: Mapping[int, Shares], aggregate: str, ratio: float
) -> dict[int, KeptUnits]:
    """Return the blocks that stay, each with all of its heads and channels: the least important are removed."""
    totals = {i: float(sum(AGGREGATES[aggregate](s).sum() for s in both)) for i, both in shares.items()}
    kept = all_units(blocks)
    for i in sorted(totals, key=lambda i: totals[i])[: removed_blocks(len(totals), ratio)]:
        del kept[i]
    return kept


def all_units(blocks: Sequence[Any]) -> dict[int, KeptUnits]:
    """Return all heads and channels of each block, by its number."""
    widths = [width_of(block) for block in blocks]
    return {
        i: KeptUnits([*range(w.num_key_value_heads)], [*range(w.intermediate_size)])
        for i, w in enumerate(widths)
    }


def removed_blocks(count: int, ratio: float) -> int:
    """Return how many of `count` blocks are removed: the share `ratio`, rounded to the nearest."""
    return min(count, int(count * ratio + 0.5))


def count_kept(n: int, stay: float, step: int) -> int:
    """Round `stay`, the number of n groups that should stay, to a multiple of `step`: at least one step, at most n."""
    return min(n, max(1, int(stay / step + 0.5)) * step)


def choose(
    scores: Mapping[int, Tensor], ratio: float, step: int, across_blocks: bool
) -> dict[int, list[int]]:
    """Return the groups that stay in each block, ascending, by their scores [groups].

    Each block loses the same share.  With `across_blocks` the share is of all blocks together, and a block keeps as many
    as it has among the best, to the nearest multiple of `step`.  Among equal groups the first stays.
    """
    stay = {i: len(score) * (1 - ratio) for i, score in scores.items()}
    if across_blocks:
        owner = torch.cat([torch.full((len(score),), i) for i, score in scores.items()])
        best = _ranked(torch.cat(list(scores.values())))[: int(len(owner) * (1 - ratio) + 0.5)]
        stay = {i: float((owner[best] == i).sum()) for i in scores}
    return {
        i: sorted(_ranked(score)[: count_kept(len(score), stay[i], step)].tolist())
        for i, score in scores.items()
    }


def _ranked(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True)


# ---------------------------------------------------------------- where nothing, or everything, would be removed


def width_problems(widths: set[Width], ratio: float, round_to: int) -> list[str]:
    """Say why `ratio` removes no head and no channel from blocks of these widths; [] when it removes some."""
    narrow = min(w.intermediate_size for w in widths)
    if round_to > narrow:
        return [f"round_to = {round_to} is more than the {narrow} channels of a block"]
    if any(
        count_kept(n, n * (1 - ratio), step) != n
        for w in widths
        for n, step in ((w.num_key_value_heads, 1), (w.intermediate_size, round_to))
    ):
        return []
    most = max(widths)
    return [
        f"ratio = {ratio} takes nothing from {most.num_key_value_heads} key heads "
        f"and {most.intermediate_size} channels in steps of {round_to}"
    ]


def depth_problems(count: int, blocks: int, ratio: float) -> list[str]:
    """Say why `ratio` of `count` blocks removes none of them, or all `blocks` of the model; [] when it does not."""
    removed, what = removed_blocks(count, ratio), f"ratio = {ratio} of {count} blocks is "
    if removed == blocks:
        return [f"{what}all of them, and nothing else is spared"]
    return [] if removed else [f"{what}less than half a block"]
