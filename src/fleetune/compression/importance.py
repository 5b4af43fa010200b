"""Estimate how much the loss would rise without each coupled group of weights, and choose which stay (LLM-Pruner, section 3.2).

    a key head g            rows of k and v; rows of q and columns of o of its n_rep query heads g n_rep .. (g + 1) n_rep - 1
    an MLP channel c        row c of gate and of up, column c of down

The biases of removed rows go with them.  With g the gradient of the mean loss, and F the mean of the squared gradients of each
text's loss (Fisher's diagonal in place of the Hessian's), a weight w has the importance |w| (magnitude), |w g| (first), w^2 F
(second) or |w g - w^2 F / 2| (mixed; the paper's element-wise equations 3 and 5).  g is not 0: the texts are new.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from fleetune.data import Encoded, collate
from fleetune.evaluation.losses import pad_id
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.families.widths import KeptUnits, Width, blocks_of, width_of
from fleetune.models.net.layers import by_layer
from fleetune.models.net.model import Model

KINDS: Final = ("magnitude", "first", "second", "mixed")


class LayerGroups(NamedTuple):
    """The part of one linear layer that belongs to groups of one kind."""

    layer: nn.Linear
    rows: bool  # whether a group is rows of the weight (with their biases), or columns
    groups: int

    def parameters(self) -> list[nn.Parameter]:
        """Return the weight, and the bias where groups are rows."""
        biased = self.rows and self.layer.bias is not None
        return [self.layer.get_parameter(name) for name in (["weight", "bias"] if biased else ["weight"])]


class Shares(NamedTuple):
    """The importance of the groups of a block in each linear layer: float64 [layers, groups]."""

    heads: Tensor  # of q, k, v, o
    channels: Tensor  # of gate, up, down


def group_layers(block: Any) -> tuple[list[LayerGroups], list[LayerGroups]]:
    """Return the linear layers of the head groups, and those of the channel groups, of a decoder block."""
    a, f, width = block.self_attn, block.mlp, width_of(block)
    g, c = width.num_key_value_heads, width.intermediate_size
    heads = [
        LayerGroups(linear, linear is not a.o_proj, g) for linear in (a.q_proj, a.k_proj, a.v_proj, a.o_proj)
    ]
    channels = [
        LayerGroups(linear, linear is not f.down_proj, c) for linear in (f.gate_proj, f.up_proj, f.down_proj)
    ]
    return heads, channels


def estimate(
    model: Model,
    rows: Sequence[Encoded],
    kind: str,
    numbers: Sequence[int],
    on_row: Callable[[int, int], None] = lambda row, rows: None,
) -> dict[int, Shares]:
    """Return the shares of all groups in the blocks `numbers`, from the mean loss of each row.

    `on_row(row, rows)` is called after each row and may raise to stop.  `magnitude` reads no row.
    """
    blocks = blocks_of(model.net)
    found = {i: group_layers(blocks[i]) for i in numbers}
    every = [m for both in found.values() for part in both for m in part]
    sums = GradientSums(kind, len(rows))
    if kind != "magnitude":
        sums.gather(model, rows, every, on_row)
    return {i: Shares(*(sums.shares(part) for part in both)) for i, both in found.items()}


class GradientSums:
    """The sums g and F of parameters, as far as the kind of importance needs them."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count
        self.g: dict[nn.Parameter, Tensor] = {}
        self.F: dict[nn.Parameter, Tensor] = {}

    def gather(
        self,
        model: Model,
        rows: Sequence[Encoded],
        layers: Sequence[LayerGroups],
        on_row: Callable[[int, int], None],
    ) -> None:
        """Add the gradients of the mean loss of every row."""
        parameters = [p for layer in layers for p in layer.parameters()]
        with _hooked_gradients(parameters, self.add), by_layer(model.net), torch.enable_grad():
            for done, row in enumerate(rows, 1):
                loss_tensor(model, collate([row], pad_id(model), model.device)).backward()  # type: ignore[no-untyped-call]
                on_row(done, len(rows))

    def add(self, parameter: nn.Parameter) -> None:
        """Add the gradient of one row's loss, and free it."""
        grad = parameter.grad
        assert grad is not None
        grad = grad.float()
        if self.kind in ("second", "mixed"):
            _add(self.F, parameter, grad.square())
        if self.kind in ("first", "mixed"):
            _add(self.g, parameter, grad)
        parameter.grad = None

    def importance(self, parameter: nn.Parameter) -> Tensor:
        """Return the importance of every weight: float32, of the parameter's shape."""
        w = parameter.detach().float()
        if self.kind == "magnitude":
            return w.abs()
        if self.kind == "first":
            return (w * self.g[parameter] / self.count).abs()
        second = w.square() * self.F[parameter] / self.count
        return second if self.kind == "second" else (w * self.g[parameter] / self.count - second / 2).abs()

    def shares(self, layers: Sequence[LayerGroups]) -> Tensor:
        """Return the importance of the groups in each of these layers: float64 [layers, groups]."""
        return torch.stack([self._share(layer) for layer in layers])

    def _share(self, layer: LayerGroups) -> Tensor:
        """Return float64 [groups]; each group is a run of neighbouring rows or columns."""
        total = torch.zeros(layer.groups, dtype=torch.float64)
        for parameter in layer.parameters():
            found = self.importance(parameter)
            along = found if found.dim() == 1 else found.sum(1 if layer.rows else 0, dtype=torch.float64)
            total += along.double().view(layer.groups, -1).sum(1).cpu()
        return total


def _add(sums: dict[nn.Parameter, Tensor], parameter: nn.Parameter, more: Tensor) -> None:
    if parameter in sums:
        sums[parameter].add_(more)
    else:
        sums[parameter] = more.clone()


@contextmanager
def _hooked_gradients(
    parameters: Sequence[nn.Parameter], add: Callable[[nn.Parameter], None]
) -> Iterator[None]:
    """Compute gradients of `parameters` while the block runs; pass each to `add` when it is complete."""
    handles = []
    for parameter in parameters:
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(add))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for parameter, handle in zip(parameters, handles, strict=True):
            handle.remove()
            parameter.grad = None
            parameter.requires_grad_(False)


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
) -> list[KeptUnits]:
    """Return the heads and channels that stay in each block; blocks without shares keep all of theirs."""
    heads = {i: AGGREGATES[aggregate](share.heads) for i, share in shares.items()}
    channels = {i: AGGREGATES[aggregate](share.channels) for i, share in shares.items()}
    stay = choose(heads, ratio, 1, across_blocks), choose(channels, ratio, round_to, across_blocks)
    return [
        KeptUnits(
            stay[0].get(i, range(width.num_key_value_heads)), stay[1].get(i, range(width.intermediate_size))
        )
        for i, width in enumerate(map(width_of, blocks))
    ]


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
