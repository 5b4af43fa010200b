"""Compress a model block by block, each block on the outputs of the compressed blocks before it.

Calibration windows run through a block and its Hessians are summed; the layers are solved; then the windows run through the
compressed block.  For a `Corrector` layers are solved in turn, each on the outputs of the compressed layers before it: two layers
in a row would else both correct the same error.  Norms and routers are not compressed, and embedding and head only with a
`SolverPlan`.  Every finished block is a file, from which a killed run resumes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fleetune.common.display import counted
from fleetune.compression import Corrector, Solver
from fleetune.compression.layerwise.activations import HessianSource, HiddenStates, StatesInTurn
from fleetune.compression.layerwise.blocks import BlockResult, FinishedBlocks, MatrixResult
from fleetune.compression.layerwise.experts import (
    Experts,
    Routed,
    experts_of,
    has_experts,
    matrices_of,
    parameters_of,
    solve_experts,
)
from fleetune.compression.layerwise.grids import DEFAULTS, GROUPS, INSTEAD
from fleetune.compression.layerwise.hessian import lost, share, trace
from fleetune.errors import DataError, ModelError, RecipeError
from fleetune.models.artefact import Quantised, dense, joined
from fleetune.models.lazy import in_memory
from fleetune.models.net.layers import layers_of
from fleetune.models.net.model import Model
from fleetune.planning.compression_cost import END_ROWS


def linears_of(model: Model) -> list[tuple[nn.Module, dict[str, nn.Linear]]]:
    """Return (block, its linear layers by name in the net) for every decoder block, without gates of a single output."""
    modules = dict(model.net.named_modules())
    found = []
    for layer in layers_of(model.net):
        inside = modules[layer.name].named_modules()
        linears = {
            f"{layer.name}.{n}": m for n, m in inside if isinstance(m, nn.Linear) and m.out_features > 1
        }
        found.append((modules[layer.name], linears))
    return found


def experts_in(model: Model) -> list[list[Experts]]:
    """Return the experts of every decoder block whose matrices can be solved."""
    modules = dict(model.net.named_modules())
    return [experts_of(layer.name, modules[layer.name]) for layer in layers_of(model.net)]


def experts_left(model: Model, *, taken: bool) -> int:
    """Return how many blocks have experts that stay as they are; `taken` tells whether experts are compressed at all."""
    solved = experts_in(model) if taken else [[] for _ in layers_of(model.net)]
    blocks = [block for block, _ in linears_of(model)]
    return sum(has_experts(block) and not found for block, found in zip(blocks, solved, strict=True))


def check(model: Model, solver: Solver, *, experts: bool = False) -> None:
    """Raise RecipeError with every matrix that the settings do not fit or that holds values that are not finite.

    `experts` tells whether those of a mixture are compressed too.
    """
    found = linears_of(model)
    of_blocks = experts_in(model) if experts else [[] for _ in found]
    if not any(linears for _, linears in found):
        raise ModelError(
            f"the blocks of a {type(model.net).__name__} have no matrices of torch's linear layers, which are what is "
            "compressed",
            hint="GPT-2's layers store theirs the other way round",
        )
    alike: dict[str, list[str]] = {}  # a problem without the matrix's name -> those that have it
    shapes = []
    for (block, linears), inside in zip(found, of_blocks, strict=True):
        with in_memory(block):
            for name, weight in matrices_of(linears, inside).items():
                shapes.append((name, *weight.shape[-2:]))
                if problem := solver.check(*shapes[-1]):
                    alike.setdefault(problem.replace(name.removesuffix(".weight"), ""), []).append(problem)
                # by their sum in float64: no mask of the size of the weights is made
                if not torch.isfinite(weight.sum(dtype=torch.float64)):
                    alike.setdefault("values", []).append(f"{name} holds values that are not finite")
    if alike:
        problems = [
            same[0] + (f"; and {counted(len(same) - 1, 'matrix', 'matrices')} more" if same[1:] else "")
            for same in alike.values()
        ]
        more = [f"and {len(problems) - 6} more"] if len(problems) > 6 else []
        raise RecipeError(problems[:6] + more, hint=_fitting(solver, shapes))


def _fitting(solver: Solver, shapes: Sequence[tuple[str, int, int]]) -> str:
    """Return the hint for settings that do not fit: the largest smaller group that fits every matrix, if there is one."""
    if (grid := getattr(solver, "grid", "")) in INSTEAD:
        instead, bits = INSTEAD[grid]
        of_groups = replace(solver, grid=instead, bits=bits, group=DEFAULTS[1])  # type: ignore[type-var]
        if not any(of_groups.check(*shape) for shape in shapes):
            return f"--set grid={instead} --set bits={bits} fits every layer: GGUF's blocks of {DEFAULTS[1]} columns"
        return "choose a grid whose groups fit every layer"
    group = getattr(solver, "group", 0)
    for smaller in (*(g for g in GROUPS if g < group), 0) if group else ():
        with suppress(ValueError):
            if not any(replace(solver, group=smaller).check(*shape) for shape in shapes):  # type: ignore[type-var]
                whole = " (a row is one group)" * (not smaller)
                return f"--set group={smaller} fits every layer{whole}"
    return "choose settings that fit every layer"


def windows(ids: Sequence[np.ndarray], length: int, count: int) -> Tensor:
    """Join the tokens of all texts and return the first `count` windows or fewer, int64 [n, length].

    DataError when they do not fill one window.
    """
    joined = np.concatenate([np.zeros(0, np.int64), *ids])[: length * count]
    whole = len(joined) // length
    if not whole:
        raise DataError(
            f"the calibration text has {len(joined)} tokens, a window needs {length}",
            hint="give more text, or a smaller --length",
        )
    return torch.from_numpy(joined[: whole * length].astype(np.int64)).view(whole, length)


class SolverPlan(NamedTuple):
    """Solvers for single matrices, and the embedding and the head, which are not compressed without a plan."""

    solvers: Mapping[str, Solver]  # by the weight's name
    ends: Sequence[End]


class End(NamedTuple):
    """The embedding or the head (or both in one matrix), and what its Hessian is a sum of."""

    name: str  # of the weight
    head: float  # weight of the mean of x x' over the head's inputs x
    table: Tensor | None  # added to it, float32 [H, H]


@torch.inference_mode()
def run(
    model: Model,
    solver: Solver,
    calibration: Tensor | HessianSource | None,
    folder: Path,
    on_matrix: Callable[[int, int, str], None] = lambda block, blocks, name: None,
    on_block: Callable[[BlockResult, int], None] = lambda block, blocks: None,
    *,
    plan: SolverPlan | None = None,
    experts: bool = False,
) -> FinishedBlocks:
    """Compress every block of `model`; blocks that are finished in `folder` are read from there.

    calibration: int64 [N, length] windows of tokens, or another source of Hessians; None for a solver without data.
    `on_matrix(block, blocks, name)` is called before every matrix and may raise to stop; finished blocks stay in
    `folder`.  The weights of `model` are restored afterwards.  A `plan` is for windows.  With `experts` those of a mixture are
    compressed too, from windows or without data.
    """
    source: HessianSource | None
    if isinstance(calibration, Tensor):
        source = (StatesInTurn if isinstance(solver, Corrector) else HiddenStates)(model, calibration)
    elif isinstance(solver, Corrector):
        raise ValueError("a solver that corrects the weights needs windows")
    else:
        source = calibration
    folder.mkdir(parents=True, exist_ok=True)
    parts, blocks = FinishedBlocks(folder), linears_of(model)
    of_blocks = experts_in(model) if experts else [[] for _ in blocks]
    placing = isinstance(source, StatesInTurn)

    def solver_of(name: str) -> Solver:
        return plan.solvers[name] if plan else solver

    for number, (block, linears) in enumerate(blocks):
        inside = of_blocks[number]
        with in_memory(block), restored_weights(linears, inside):
            if not (found := parts.open(number)):
                on_name = functools.partial(on_matrix, number, len(blocks))
                _solve_block(number, linears, inside, source, parts, solver_of, on_name)
            on_block(parts.blocks[-1], len(blocks) + bool(plan))
            if source and (plan or number + 1 < len(blocks)):
                if found and isinstance(source, StatesInTurn):
                    source.pass_over(number)
                if found or not placing:
                    place_weights(linears, parts, inside)
                source.advance(number)
    if plan:
        assert isinstance(source, HiddenStates)
        if not parts.open(len(blocks)):
            _solve_ends(model, plan, source, parts, functools.partial(on_matrix, len(blocks), len(blocks)))
        on_block(parts.blocks[-1], len(blocks) + 1)
    return parts


def _solve_ends(
    model: Model,
    plan: SolverPlan,
    source: HiddenStates,
    parts: FinishedBlocks,
    on_name: Callable[[str], None],
) -> None:
    """Solve the embedding and the head as the last part, some rows at a time, and write them."""
    began, found, matrices = time.monotonic(), dict[str, Quantised | Tensor](), list[MatrixResult]()
    inputs = source.head_hessian() / (2 * source.tokens)
    for end in plan.ends:
        layer = end.name.removesuffix(".weight")
        on_name(layer)
        H = end.head * inputs if end.table is None else end.head * inputs + end.table
        W, solver = model.net.get_parameter(end.name).detach().float().cpu(), plan.solvers[end.name]
        pieces = W.split(END_ROWS)
        solved = [solver.solve(rows, H) for rows in pieces]
        found[end.name] = joined([s.weight for s in solved])
        loss = sum(lost(rows, s, H) for rows, s in zip(pieces, solved, strict=True))
        error = share(loss, sum(trace(rows, H) for rows in pieces))
        matrices.append(MatrixResult(layer, error, solved[0].notes))
    parts.put(BlockResult(len(parts.blocks), tuple(matrices), round(time.monotonic() - began, 3)), found)


def _solve_block(
    number: int,
    linears: Mapping[str, nn.Linear],
    experts: Sequence[Experts],
    source: HessianSource | None,
    parts: FinishedBlocks,
    solver_of: Callable[[str], Solver],
    on_name: Callable[[str], None],
) -> None:
    """Solve a block and write it; where layers are solved in turn, each gets its compressed weights as soon as it is."""
    began, placing = time.monotonic(), isinstance(source, StatesInTurn)
    weights, matrices = dict[str, Quantised | Tensor](), list[MatrixResult]()

    def solve(name: str, H: Tensor | None, D: Tensor | None = None) -> None:
        on_name(name)
        linear = linears[name]
        weight, matrix = _solve_layer(solver_of(f"{name}.weight"), name, linear, H, D)
        weights[f"{name}.weight"] = weight
        matrices.append(matrix)
        if placing:
            linear.weight.data = dense(weight).to(linear.weight)

    def solve_routed(each: Experts, routed: Routed | None) -> None:
        for name, weight, matrix in solve_experts(solver_of, each, routed, on_name, placing=placing):
            weights[name] = weight
            matrices.append(matrix)

    if isinstance(source, HiddenStates):
        source.solve_layers(number, linears, solve, experts, solve_routed)
    elif source:
        source.solve_layers(number, linears, solve)
    for name in linears:
        if f"{name}.weight" not in weights:  # no window used it, or the solver needs no data
            solve(name, None)
    for each in experts:
        if not each.parameters.keys() & weights.keys():
            solve_routed(each, None)
    parts.put(BlockResult(number, tuple(matrices), round(time.monotonic() - began, 3)), weights)


def _solve_layer(
    solver: Solver, name: str, linear: nn.Linear, H: Tensor | None, D: Tensor | None
) -> tuple[Quantised | Tensor, MatrixResult]:
    W = linear.weight.detach().float().cpu()
    C = W.shape[1]
    if isinstance(solver, Corrector) and H is not None and D is not None:
        W = solver.correct(W, H, D)
    solved = solver.solve(W, torch.zeros(C, C) if H is None else H)
    error = float("nan") if H is None else share(lost(W, solved, H), trace(W, H))
    weight = solved.weight if isinstance(solved.weight, Quantised) else solved.weight.to(linear.weight.dtype)
    return weight, MatrixResult(name, error, solved.notes)


@contextmanager
def restored_weights(linears: Mapping[str, nn.Linear], experts: Sequence[Experts] = ()) -> Iterator[None]:
    """Restore the weights of a block's layers afterwards."""
    parameters = parameters_of(linears, experts)
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def place_weights(
    linears: Mapping[str, nn.Linear], parts: Mapping[str, Quantised | Tensor], experts: Sequence[Experts] = ()
) -> None:
    """Give a block's layers their compressed weights."""
    for name, parameter in parameters_of(linears, experts).items():
        parameter.data = dense(parts[name]).to(parameter)
