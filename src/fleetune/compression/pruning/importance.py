# SPDX-License-Identifier: Apache-2.0
"""How much the loss would suffer without a coupled group of weights (LLM-Pruner, section 3.2).

What must go together in a block of a llama-like net, a group, is

    a key head g            rows of k and v, and of its n_rep query heads g n_rep .. (g + 1) n_rep - 1 the rows of q
                            and the columns of o (half a head cannot go: rotation pairs its rows)
    an MLP channel c        row c of gate and of up, column c of down

each with the biases of its rows.  Biases of o and down, norms, embedding and head belong to none and stay.

A weight w with the gradient g of the mean loss and F, the mean over texts of the squared gradient of each one's
loss (Fisher's diagonal for the Hessian's), has the importance

    magnitude   |w|              first   |w g|
    second      w^2 F            mixed   |w g - w^2 F / 2|       the paper's element-wise equations 3 and 5

The first order stays because the texts are not those the model was trained on, so g is not 0.  The weights of a
linear layer that are in a group are summed: that is the group's share in the layer.

Memory: a parameter's gradient is folded into g and F as soon as it is whole and given up, so beside the weights
there is one copy of the prunable ones for first (g) or second (F), two for mixed, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from fleetune.data import Encoded, collate
from fleetune.evaluation.losses import pad_id
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.families.widths import blocks_of, width_of
from fleetune.models.model import Model

KINDS: Final = ("magnitude", "first", "second", "mixed")


class LayerGroups(NamedTuple):
    """What the groups of one kind have in one layer: a linear one, an embedding or a norm."""

    layer: nn.Module
    rows: bool  # whether a group is rows (with their biases), or columns
    groups: int

    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the biases where rows are what goes."""
        biased = self.rows and getattr(self.layer, "bias", None) is not None
        return [self.layer.get_parameter(name) for name in (["weight", "bias"] if biased else ["weight"])]


class Shares(NamedTuple):
    """The groups' importance in a block, by linear layer: float64 [layers, groups]."""

    heads: Tensor  # of q, k, v, o
    channels: Tensor  # of gate, up, down


def members(block: Any) -> tuple[list[LayerGroups], list[LayerGroups]]:
    """The linear layers of the head groups and of the channel groups of a decoder block."""
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
    """The shares of all groups in the blocks `numbers`, from each row's mean loss.

    `on_row(row, rows)` is called after each and may raise to stop.  Without gradients, `magnitude`, no row is read.
    """
    blocks = blocks_of(model.net)
    found = {i: members(blocks[i]) for i in numbers}
    every = [m for both in found.values() for part in both for m in part]
    sums = GradientSums(kind, len(rows))
    if kind != "magnitude":
        sums.gather(model, rows, every, on_row)
    return {i: Shares(*(sums.shares(part) for part in both)) for i, both in found.items()}


class GradientSums:
    """g and F of parameters, as far as the kind of importance needs them."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count
        self.g: dict[nn.Parameter, Tensor] = {}
        self.F: dict[nn.Parameter, Tensor] = {}

    def gather(
        self,
        model: Model,
        rows: Sequence[Encoded],
        members: Sequence[LayerGroups],
        on_row: Callable[[int, int], None],
    ) -> None:
        """Take in the gradients of every row's mean loss."""
        parameters = [p for member in members for p in member.parameters()]
        with _hooked_gradients(parameters, self.fold), torch.enable_grad():
            for done, row in enumerate(rows, 1):
                loss_tensor(model, collate([row], pad_id(model), model.device)).backward()  # type: ignore[no-untyped-call]
                on_row(done, len(rows))

    def fold(self, parameter: nn.Parameter) -> None:
        """Take in the gradient of one row's loss, and free it."""
        grad = parameter.grad
        assert grad is not None
        grad = grad.float()
        if self.kind in ("second", "mixed"):
            _add(self.F, parameter, grad.square())
        if self.kind in ("first", "mixed"):
            _add(self.g, parameter, grad)
        parameter.grad = None

    def importance(self, parameter: nn.Parameter) -> Tensor:
        """Of every weight: float32, of the parameter's shape."""
        w = parameter.detach().float()
        if self.kind == "magnitude":
            return w.abs()
        if self.kind == "first":
            return (w * self.g[parameter] / self.count).abs()
        second = w.square() * self.F[parameter] / self.count
        return second if self.kind == "second" else (w * self.g[parameter] / self.count - second / 2).abs()

    def shares(self, members: Sequence[LayerGroups]) -> Tensor:
        """The importance of the groups of these members: float64 [members, groups]."""
        return torch.stack([self._share(member) for member in members])

    def _share(self, member: LayerGroups) -> Tensor:
        """float64 [groups]: neighbours among the rows or columns are of one group."""
        total = torch.zeros(member.groups, dtype=torch.float64)
        for parameter in member.parameters():
            found = self.importance(parameter)
            along = found if found.dim() == 1 else found.sum(1 if member.rows else 0, dtype=torch.float64)
            total += along.double().view(member.groups, -1).sum(1).cpu()
        return total


def _add(sums: dict[nn.Parameter, Tensor], parameter: nn.Parameter, more: Tensor) -> None:
    if parameter in sums:
        sums[parameter].add_(more)
    else:
        sums[parameter] = more.clone()


@contextmanager
def _hooked_gradients(
    parameters: Sequence[nn.Parameter], fold: Callable[[nn.Parameter], None]
) -> Iterator[None]:
    """Gradients of `parameters` while the block runs, each handed to `fold` when it is whole."""
    handles = []
    for parameter in parameters:
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(fold))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for parameter, handle in zip(parameters, handles, strict=True):
            handle.remove()
            parameter.grad = None
            parameter.requires_grad_(False)


# ---------------------------------------------------------------- which stay

AGGREGATES: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "sum": lambda shares: shares.sum(0),
    "mean": lambda shares: shares.mean(0),
    "max": lambda shares: shares.amax(0),
    "prod": lambda shares: shares.prod(0),
}


def count_kept(n: int, stay: float, step: int) -> int:
    """How many of n groups stay where `stay` should: the nearest multiple of `step`, at least one of it, at most n."""
    return min(n, max(1, int(stay / step + 0.5)) * step)


def choose(scores: Mapping[int, Tensor], ratio: float, step: int, whole: bool) -> dict[int, list[int]]:
    """The groups that stay in each block, ascending, by their scores [groups].

    Each block loses the same share; or, with `whole`, all of them together do, and each keeps as many as it has
    among the best, to the nearest multiple of `step`.  Of equal ones the first stays.
    """
    stay = {i: len(score) * (1 - ratio) for i, score in scores.items()}
    if whole:
        owner = torch.cat([torch.full((len(score),), i) for i, score in scores.items()])
        best = _ranked(torch.cat(list(scores.values())))[: int(len(owner) * (1 - ratio) + 0.5)]
        stay = {i: float((owner[best] == i).sum()) for i in scores}
    return {
        i: sorted(_ranked(score)[: count_kept(len(score), stay[i], step)].tolist())
        for i, score in scores.items()
    }


def _ranked(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True)
