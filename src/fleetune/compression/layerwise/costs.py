"""Estimate what each grid would cost each matrix: its bytes in a GGUF file, and the KL divergence that it causes.

A matrix is rounded to nearest on grids that are fitted by the curvature c_j = 1 / U_jj^2 (`hessian.py`).  The column loop loses
sum_j c_j e_j^2 on a row whose columns err by e_j when it reaches them, and these errors are about as large as those of plain
rounding.  So with F from `sensitivity.py` the KL divergence is about 1/2 sum_i F_i sum_j c_j e_ij^2, without running the loop.
A sample of the rows stands for all.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from fleetune.common.ggml import BLOCK, padded
from fleetune.compression.layerwise.activations import HiddenStates
from fleetune.compression.layerwise.driver import End, experts_in, linears_of
from fleetune.compression.layerwise.experts import DOWN, Experts, Routed, hessian, matrices_of
from fleetune.compression.layerwise.grids import PRUNED, Grid, rounded
from fleetune.compression.layerwise.hessian import inverse_cholesky
from fleetune.compression.layerwise.sensitivity import Sensitivity
from fleetune.models.families.number_types import SUPER_TYPES
from fleetune.models.families.table import parts
from fleetune.models.lazy import in_memory
from fleetune.models.net.model import Model, named_tensors
from fleetune.planning.compression_cost import END_ROWS

TOGETHER: Final = 1 << 21  # weights that are rounded together
DAMPING: Final = 0.01
ROWS: Final = 128  # of a matrix, that stand for all of it


class Candidate(NamedTuple):
    """A grid that a GGUF file holds exactly, and the type of its blocks there."""

    grid: str
    bits: int
    kind: str

    def fits(self, C: int) -> bool:
        """Tell whether blocks of this type divide rows of C columns."""
        return C % self._block[0] == 0

    def bytes(self, R: int, C: int) -> int:
        """Return the size of a matrix in the file, in bytes."""
        columns, size = self._block
        return padded(R * (C // columns) * size)

    @property
    def _block(self) -> tuple[int, int]:
        """The columns and the bytes of a block."""
        found = Grid(self.grid, self.bits).block
        assert found is not None
        return found


CANDIDATES: Final = (
    Candidate("ggml", 4, "Q4_0"),
    Candidate("iq4_nl", 4, "IQ4_NL"),
    Candidate("ggml", 5, "Q5_0"),
    Candidate("ggml", 8, "Q8_0"),
    *(Candidate(grid, of.bits, grid.upper()) for grid, of in SUPER_TYPES.items()),
)

OF_ENDS: Final = CANDIDATES[3]  # of the embedding and the head, in a file of one grid


class Option(NamedTuple):
    """What a candidate costs a matrix."""

    candidate: Candidate
    bytes: int  # in the file
    cost: float  # KL divergence, nats a token


class Term(NamedTuple):
    """A part of a matrix's cost: 1/2 sum_i F_i sum_j c_j e_ij^2."""

    F: Tensor  # float64 [R]
    c: Tensor  # [C]


class Costs(NamedTuple):
    """What every candidate costs every matrix, by the weight's name, and how embedding and head are solved."""

    options: Mapping[str, Sequence[Option]]
    ends: Sequence[End]


def measure(
    model: Model,
    windows: Tensor,
    found: Sensitivity,
    on_matrix: Callable[[int, int, str], None] = lambda block, blocks, name: None,
) -> Costs:
    """Round every matrix on every grid, on the Hessians of windows int64 [n, length] that the dense model sees.

    `on_matrix(block, blocks, name)` is called before every matrix and may raise to stop.
    """
    options = dict[str, list[Option]]()
    with torch.inference_mode():
        states, blocks, of_blocks = HiddenStates(model, windows), linears_of(model), experts_in(model)
        for number, (block, linears) in enumerate(blocks):
            on_name = functools.partial(on_matrix, number, len(blocks))
            with in_memory(block):
                H, routed = states.inputs(number, linears, of_blocks[number])
                options |= _of_layers(linears, H, found, windows.numel(), on_name)
                del H
                for each in of_blocks[number]:
                    options |= _of_experts(each, routed.pop(each.name, None), found, on_name)
                states.advance(number)
        head = states.head_hessian() / (2 * windows.numel())
        ends, terms = _ends(model, found, head)
        for end in ends:
            on_matrix(len(blocks), len(blocks), end.name.removesuffix(".weight"))
            options[end.name] = of_matrix(_values(model.net.get_parameter(end.name)), terms[end.name])
    return Costs(options, ends)


def _of_layers(
    linears: Mapping[str, nn.Linear],
    H: Mapping[str, Tensor],
    found: Sensitivity,
    tokens: int,
    on_name: Callable[[str], None],
) -> dict[str, list[Option]]:
    """Return what every candidate costs each linear layer of a block."""
    options = dict[str, list[Option]]()
    known = dict[int, Tensor]()  # layers that read the same tensor share one H
    for name, linear in linears.items():
        on_name(name)
        h = H.get(name)
        c = torch.ones(linear.weight.shape[1])  # nothing reached it
        if h is not None:
            c = known[id(h)] if id(h) in known else _curvature(h / (2 * tokens))
            known[id(h)] = c
        options[f"{name}.weight"] = of_matrix(_values(linear.weight), [Term(found.rows[name], c)])
    return options


def _of_experts(
    experts: Experts, routed: Routed | None, found: Sensitivity, on_name: Callable[[str], None]
) -> dict[str, list[Option]]:
    """Return what every candidate costs each parameter of the experts of a layer: the sum over the experts."""
    options = dict[str, list[Option]]()
    for name, matrices in experts.matrices.items():
        on_name(name)
        of_each, of_all = list[list[Option]](), list[Tensor]()
        for number in range(len(matrices)):
            c = _of_inputs(experts, name, number, routed, of_all)
            of_each.append(of_matrix(_values(matrices[number]), [Term(found.experts[name][number], c)]))
        options[name] = _together(of_each, name, matrices.shape)
    return options


def _of_inputs(
    experts: Experts, name: str, number: int, routed: Routed | None, of_all: list[Tensor]
) -> Tensor:
    """Return the curvature [C] of an expert's inputs.

    Experts that few tokens chose are solved on all tokens of the layer: what their gates and ups read is the same for each, and
    `of_all` keeps its curvature.
    """
    C = experts.matrices[name].shape[2]
    if routed is None:
        return torch.ones(C)  # nothing reached it
    few = routed.tokens(number) < C
    if few and of_all:
        return of_all[0]
    H, tokens = hessian(experts, name, number, routed)
    c = _curvature(H / (2 * (len(routed.x) if few else tokens)))
    if few and not name.endswith(DOWN):
        of_all.append(c)
    return c


def _together(of_each: Sequence[Sequence[Option]], name: str, shape: Sequence[int]) -> list[Option]:
    """Return the options that all experts have, with what they cost together; `shape` is [experts, R, C]."""
    costs = [{option.candidate: option.cost for option in each} for each in of_each]
    return [
        Option(each, _bytes(each, name, shape), sum(cost[each] for cost in costs))
        for each in costs[0]
        if all(each in cost for cost in costs)
    ]


def _ends(model: Model, found: Sensitivity, head: Tensor) -> tuple[list[End], dict[str, list[Term]]]:
    """Return embedding and head, one where they are tied, with the terms of their costs; `head` is the mean of x x'."""
    as_head, as_table = Term(found.head, _curvature(head)), Term(found.shares, found.table.diagonal().float())
    total, table = float(found.head.sum()), found.table.float()
    first, *last = end_names(model)
    if not last:
        return [End(first, total, table)], {first: [as_head, as_table]}
    return [End(first, 0.0, table), End(last[0], total, None)], {first: [as_table], last[0]: [as_head]}


def matrices(model: Model) -> dict[str, Tensor]:
    """Return all weights that grids are chosen for by name, as [.., R, C] = [.., out, in]."""
    layers = {name: linear for _, linears in linears_of(model) for name, linear in linears.items()}
    experts = [each for inside in experts_in(model) for each in inside]
    return matrices_of(layers, experts) | {n: model.net.get_parameter(n) for n in end_names(model)}


class Reach(NamedTuple):
    """What all matrices can take in a file."""

    least: int  # bytes, each matrix on the smallest grid that it can have
    most: int  # ... on the largest


def reach(model: Model) -> Reach:
    """Return what the matrices of a model can take."""
    least = most = 0
    for name, weight in matrices(model).items():
        sizes = [_bytes(each, name, weight.shape) for each in _possible(weight)]
        least, most = least + min(sizes), most + max(sizes)
    return Reach(least, most)


def size_of(model: Model, candidate: Candidate) -> int:
    """Return the bytes of the matrices in a file of one candidate, whose embedding and head are in Q8_0."""
    ends = end_names(model)
    return sum(
        _bytes(OF_ENDS if name in ends else candidate, name, weight.shape)
        for name, weight in matrices(model).items()
    )


def _possible(weight: Tensor) -> list[Candidate]:
    """Return the candidates for a matrix, or for the matrices of all experts."""
    if weight.dim() == 2:
        return candidates(_values(weight))
    of_each = [candidates(_values(W)) for W in weight]
    return [each for each in of_each[0] if all(each in own for own in of_each)]


def _bytes(candidate: Candidate, name: str, shape: Sequence[int]) -> int:
    """Return the size of a parameter [.., R, C] in the file, in bytes: gates and ups are two tensors there."""
    count = len(parts(name))
    return count * candidate.bytes(math.prod(shape[:-1]) // count, shape[-1])


def end_names(model: Model) -> list[str]:
    """Return the names of the embedding's and the head's weights; one where they are tied."""
    ends = [model.net.get_input_embeddings().weight, model.net.get_output_embeddings().weight]
    names = {id(tensor): name for name, tensor in named_tensors(model.net)}
    return list(dict.fromkeys(names[id(weight)] for weight in ends))


def _values(weight: Tensor) -> Tensor:
    return weight.detach().float().cpu()


def _curvature(H: Tensor) -> Tensor:
    """Return how much an error in each column costs when later columns correct it, [C]; the diagonal without a factor."""
    found = inverse_cholesky(H, DAMPING).curvature
    return H.diagonal().clone() if found is None else found


def of_matrix(W: Tensor, terms: Sequence[Term]) -> list[Option]:
    """Return the cost of every candidate for W float32 [R, C], summed over `terms`."""
    R, C = W.shape
    fit = sum((term.F.mean().float() * term.c for term in terms), torch.zeros(C))
    at, times = _sample(sum((term.F * float(term.c.mean()) for term in terms), torch.zeros(R).double()))
    rows, seen = W[at], [Term(term.F[at] * times, term.c) for term in terms]
    return [
        Option(candidate, candidate.bytes(R, C), _cost(rows, Grid(candidate.grid, candidate.bits), seen, fit))
        for candidate in candidates(W)
    ]


def _sample(importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return places of `ROWS` rows, drawn in proportion to their importance [R], and how many each stands for: all of few.

    They are those at even steps of the running sum, so that a sum over them estimates that over all (systematic sampling).
    """
    total = float(importance.sum())
    if len(importance) <= ROWS or not 0 < total < math.inf:
        return torch.arange(len(importance)), torch.ones(len(importance), dtype=torch.float64)
    steps = (torch.arange(ROWS, dtype=torch.float64) + 0.5) * total / ROWS
    at = torch.searchsorted(importance.cumsum(0), steps).clamp_(max=len(importance) - 1)
    return at, total / (ROWS * importance[at])


def candidates(W: Tensor) -> list[Candidate]:
    """Return the candidates for W [R, C]: those whose blocks divide its rows, and that have a 0 where it was pruned.

    Like the solver, this looks at some rows at a time, so a matrix with only some pruned rows counts as pruned.
    """
    pruned = any(int((rows == 0).sum()) >= PRUNED * rows.numel() for rows in W.split(END_ROWS))  # type: ignore[no-untyped-call]
    return [
        each
        for each in CANDIDATES
        if each.fits(W.shape[1]) and (not pruned or Grid(each.grid, each.bits).holds_zero)
    ]


def _cost(W: Tensor, grid: Grid, terms: Sequence[Term], fit: Tensor) -> float:
    """Return the cost of rounding rows W to nearest on a grid that is fitted by the curvature `fit` [C]."""
    cost = 0.0
    size = max(1, TOGETHER // W.shape[1])
    for a in range(0, len(W), size):
        rows = W[a : a + size]
        squares = (rows - rounded(rows, grid, BLOCK, fit).dense()).double().square()
        cost += sum(float(term.F[a : a + size] @ (squares @ term.c.double())) for term in terms) / 2
    return cost
