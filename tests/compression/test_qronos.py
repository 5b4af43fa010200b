# SPDX-License-Identifier: Apache-2.0
"""Qronos against the paper's algorithm written with a least-squares problem for every column, and what the driver gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_calibrate import FAMILIES, Spy, compressed_inputs, inputs_of, model_of, text
from test_solvers import curvature, damped, dense, onto
from torch import Tensor

from fleetune import compression, models
from fleetune.compression import Corrector, Solved
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.activations import HiddenStates
from fleetune.compression.layerwise.blocks import FinishedBlocks, block_file
from fleetune.compression.layerwise.driver import linears_of
from fleetune.compression.layerwise.federated import ClientHessians
from fleetune.compression.layerwise.grids import KINDS, Grid
from fleetune.compression.layerwise.in_turn import StatesInTurn
from fleetune.compression.methods import optq
from fleetune.errors import RecipeError
from fleetune.models.artefact import Quantised

C, GROUP, DAMPING = 32, 8, 0.02


def drifted(seed: int, share: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [R, C], inputs X and Y [tokens, C] in the dense and the compressed model), float64."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(C, C, generator=g, dtype=torch.float64))[0]
    X = torch.randn(4 * C, C, generator=g, dtype=torch.float64) @ (
        torch.arange(1, C + 1)[:, None] ** -0.7 * turn
    )
    Y = X + share * X.std() * torch.randn(X.shape, generator=g, dtype=torch.float64)
    return torch.randn(5, C, generator=g, dtype=torch.float64), X, Y


def sums(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """(H, D) in float64."""
    return 2 * Y.T @ Y, 2 * (X - Y).T @ Y


def paper(W: Tensor, X: Tensor, Y: Tensor, order: list[int], settle: Any) -> Tensor:
    """Algorithm 1, [R, C] in the order of the columns: for each of them its best value with the others held, then least squares
    for all later ones.  settle(i, updated W) gives column i.

    Damping is data: rows that ask every weight to stay as it is.
    """
    lam = (DAMPING * (2 * Y.T @ Y).diagonal().mean() / 2).sqrt()
    rows = lam * torch.eye(C, dtype=W.dtype)
    X, Y = torch.cat([X, rows])[:, order], torch.cat([Y, rows])[:, order]
    W = W[:, order]
    wanted, now = X @ W.T, W.T.clone()
    for i in range(C):
        y = Y[:, i : i + 1]
        others = [j for j in range(C) if j != i]
        now[i] = torch.linalg.lstsq(y, wanted - Y[:, others] @ now[others]).solution[0]
        if i == 0:  # what the first grid is fitted to: the later columns as they are best with this value
            now[1:] = torch.linalg.lstsq(Y[:, 1:], wanted - y @ now[:1]).solution
        now[i] = settle(i, now.T)
        now[i + 1 :] = torch.linalg.lstsq(Y[:, i + 1 :], wanted - Y[:, : i + 1] @ now[: i + 1]).solution
    return now.T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["none", "static", "gar"])
def test_it_is_the_papers_algorithm_in_any_order(kind: str, order: str) -> None:
    W, X, Y = drifted(2)
    H, D = sums(X, Y)
    values = {"group": GROUP, "grid": kind, "order": order, "damping": DAMPING}
    solver: Any = compression.make("qronos", values)
    got = dense(solver.solve(solver.correct(W, H, D), H))
    found = optq.column_order(H.diagonal(), GROUP, order)
    sort = list(range(C)) if found is None else found.tolist()
    grid, fits = Grid(kind, 4), dict[int, tuple[Tensor, Tensor]]()
    h = curvature(damped(H, DAMPING)[sort][:, sort])

    def settle(i: int, now: Tensor) -> Tensor:
        if order == "static" and not fits:  # all grids beforehand
            back = torch.tensor(sort).argsort()
            for g, a in enumerate(range(0, C, GROUP)):
                fits[g] = grid.find(now[:, back][:, a : a + GROUP], h[back][a : a + GROUP])
        g = sort[i] // GROUP
        if g not in fits:
            fits[g] = grid.find(now[:, i : i + GROUP], h[i : i + GROUP])
        return onto(grid, now[:, i], *fits[g])

    want = paper(W, X, Y, sort, settle)
    torch.testing.assert_close(got.double()[:, sort], want, rtol=0, atol=1e-6)
    plain: Any = compression.make("optq", values)
    assert not torch.equal(dense(plain.solve(W, H)), got)


@pytest.mark.parametrize("kind", [*KINDS, "q4_k"])
def test_without_drift_it_is_optq(kind: str) -> None:
    g = torch.Generator().manual_seed(4)
    W, x = torch.randn(6, 256, generator=g), torch.randn(600, 256, generator=g)
    H, D = sums(x, x)
    values = {"grid": kind, "damping": DAMPING}
    solver: Any = compression.make("qronos", values)
    assert torch.equal(solver.correct(W, H, D), W)
    same = compression.make("optq", values)
    assert isinstance(same, compression.Solver)
    assert torch.equal(dense(solver.solve(W, H)), dense(same.solve(W, H)))


def test_outputs_come_closer_to_the_dense_models() -> None:
    W, X, Y = drifted(3)
    H, D = sums(X, Y)
    solver: Any = compression.make("qronos", {"group": GROUP})
    plain: Any = compression.make("optq", {"group": GROUP})

    def off(Q: Tensor) -> float:
        return float((X @ W.T - Y @ Q.double().T).square().sum())

    best = torch.linalg.lstsq(Y, X @ W.T).solution.T
    ours, theirs = off(dense(solver.solve(solver.correct(W, H, D), H))), off(dense(plain.solve(W, H)))
    assert off(best) < ours < 0.9 * theirs


def test_zeros_stay_and_dead_inputs_go() -> None:
    W, X, Y = drifted(5)
    W[:, ::3] = 0.0
    Y[:, 7] = 0.0
    H, D = sums(X, Y)
    solver: Any = compression.make("qronos", {"group": GROUP})
    Q = dense(solver.solve(solver.correct(W, H, D), H))
    assert not Q[:, ::3].any()
    assert not Q[:, 7].any()
    assert Q[:, 1].any()
    assert torch.isfinite(Q).all()
    with pytest.raises(RecipeError, match="exactly 0"):
        compression.make("qronos", {"group": GROUP, "grid": "iq4_nl"}).correct(W, H, D)  # type: ignore[union-attr]


def test_a_first_input_that_is_always_zero_does_no_harm() -> None:
    W, X, Y = drifted(7)
    Y[:, 0] = 0.0
    H, D = sums(X, Y)
    solver: Any = compression.make("qronos", {"group": GROUP, "damping": 0})
    rest = torch.linalg.lstsq(Y[:, 1:], X @ W.T).solution.T
    torch.testing.assert_close(solver.correct(W, H, D)[:, 1:], rest)


def test_without_a_factor_nothing_is_corrected() -> None:
    W, X, Y = drifted(6)
    solver: Any = compression.make("qronos", {"group": GROUP})
    _, D = sums(X, Y)
    assert solver.correct(W, torch.zeros(C, C, dtype=W.dtype), D) is W


# The driver -----------------------------------------------------------------------------------------


class Corrected(Spy):
    """A spy that keeps the drifts as well, and moves the weights by a step of the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.drifts: list[Tensor] = []

    def correct(self, W: Tensor, H: Tensor, D: Tensor) -> Tensor:
        self.drifts.append(D.clone())
        return W + 1 / 16

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        return super().solve(W, H)


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_drifts_are_of_the_inputs_in_both_models(family: str, tmp_path: Path) -> None:
    """The compressed model with all layers solved so far, those of its own block as well."""
    model, spy, windows = model_of(family), Corrected(), text(3, 20)
    assert isinstance(spy, Corrector)
    parts = driver.run(model, spy, windows, tmp_path)
    names = [matrix.name for block in parts.blocks for matrix in block.matrices]
    every = {name: m for _, linears in linears_of(model) for name, m in linears.items()}
    assert len(spy.drifts) == len(spy.seen) == len(names)
    for at, (name, y) in enumerate(compressed_inputs(model, parts, windows, true_sequential=True)):
        x = inputs_of(model, {name: every[name]}, windows)[name]
        tolerance = 1e-5 * float(y.square().sum())
        torch.testing.assert_close(spy.seen[at].double(), 2 * y.T @ y, rtol=1e-4, atol=tolerance)
        torch.testing.assert_close(spy.drifts[at].double(), 2 * (x - y).T @ y, rtol=1e-4, atol=tolerance)
        assert spy.drifts[at].any() == (at > 2), (
            "the first three layers read what the model's first norm gives"
        )
        want = torch.round(16 * (every[name].weight + 1 / 16)) / 16
        assert torch.equal(dense(Solved(parts[f"{name}.weight"])), want)


def test_the_dense_stream_is_that_of_the_model(tmp_path: Path) -> None:
    """Bit for bit, through blocks that are solved and blocks that are passed over after a stop."""
    model, windows = models.tiny_llama(layers=3), text(3, 20)
    blocks = [linears for _, linears in linears_of(model)]
    streams = []
    with torch.inference_mode():
        for solved in (True, False):
            stream = StatesInTurn(model, windows, drift=True)
            for number, linears in enumerate(blocks[:2]):
                if solved:
                    stream.solve_layers(number, linears, lambda name, H, D=None: None)
                else:
                    stream.pass_over(number)
            streams.append(stream.dense)
        own = HiddenStates(model, windows)
        own.advance(0)
        own.advance(1)
    for found in streams:
        assert len(found) == len(own.states) == 3
        assert all(torch.equal(a, b) for a, b in zip(found, own.states, strict=True))


def test_the_dense_stream_of_a_window_that_misses_a_layer_is_that_of_the_model() -> None:
    """Such a window goes through the block once more, with the dense weights although others are in place by then."""
    model, windows = models.tiny_llama(layers=2), text(6, 16)
    block, linears = linears_of(model)[0]
    mlp: Any = block.mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) if x.sum() > 0 else 0 * x
    signs = set[bool]()
    mlp.register_forward_pre_hook(lambda module, args: signs.add(bool(args[0].sum() > 0)))

    def solve(name: str, H: Tensor | None, D: Tensor | None = None) -> None:
        linears[name].weight.data = torch.zeros_like(linears[name].weight)

    with torch.inference_mode(), driver.restored_weights(linears):
        own = HiddenStates(model, windows)
        own.advance(0)
        stream = StatesInTurn(model, windows, drift=True)
        stream.solve_layers(0, linears, solve)
    assert signs == {True, False}
    assert all(torch.equal(a, b) for a, b in zip(stream.dense, own.states, strict=True))


def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(method: str, folder: str, **more: bool) -> FinishedBlocks:
        solver = compression.make(method, {"group": 8, "damping": DAMPING})
        assert isinstance(solver, compression.Solver)
        return driver.run(models.tiny_llama(layers=4), solver, text(4, 16), tmp_path / folder, **more)

    whole = run("qronos", "q")
    codes = {name: found.codes for name, found in whole.items() if isinstance(found, Quantised)}
    for last in (2, 3):
        block_file(tmp_path / "q", last).unlink()
    again, plain = run("qronos", "q"), run("optq", "o", true_sequential=True)
    assert len(codes) == len(whole) == 28
    for name, own in codes.items():
        found, other = again[name], plain[name]
        assert isinstance(found, Quantised)
        assert isinstance(other, Quantised)
        assert torch.equal(own, found.codes)
        early = ".layers.0." in name and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        assert torch.equal(own, other.codes) == early, "nothing is compressed before these"


def test_inputs_of_other_tokens_have_no_drift() -> None:
    """As those of experts, which a token may reach in one model and not in the other."""
    model, found = models.tiny_llama(layers=2), dict[str, tuple[Tensor | None, Tensor | None]]()
    block, linears = linears_of(model)[1]
    mlp: Any = block.mlp
    forward = mlp.forward

    def half(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[x.sum(-1).flatten().topk(8).indices]

    mlp.forward = lambda x: x * forward(half(x)).sum()

    def solve(name: str, H: Tensor | None, D: Tensor | None = None) -> None:
        found[name.rsplit(".", 1)[-1]] = H, D

    with torch.inference_mode():
        stream = StatesInTurn(model, text(3, 16), drift=True)
        stream.pass_over(0)
        stream.states = [state + torch.randn_like(state) for state in stream.states]
        stream.solve_layers(1, linears, solve)
    q, up = found["q_proj"], found["up_proj"]
    assert q[1] is not None
    assert q[1].any()
    assert up[0] is not None
    assert up[1] is None


def test_a_layer_that_reads_a_tensor_twice_is_not_taken_for_two() -> None:
    """So the pass up to it does not go on, in the dense model, where that calls no other layer, through the whole block."""
    model, windows = models.tiny_llama(layers=2), text(6, 16)
    block, found = linears_of(model)[0]
    linears = {name: layer for name, layer in found.items() if name.endswith(("gate_proj", "down_proj"))}
    mlp: Any = block.mlp

    def forward(x: Tensor) -> Tensor:
        value = mlp.gate_proj(x) * mlp.gate_proj(x)
        return mlp.down_proj(value) if x.sum() > 0 else x

    mlp.forward = forward
    signs = list[bool]()
    with torch.inference_mode():
        own = HiddenStates(model, windows)
        handle = mlp.register_forward_pre_hook(lambda module, args: signs.append(bool(args[0].sum() > 0)))
        own.advance(0)
        stream = StatesInTurn(model, windows, drift=True)
        stream.states = [-state for state in stream.states]
        handle.remove()
        stream.solve_layers(0, linears, lambda name, H, D=None: None)
    assert set(signs) == {True, False}
    assert all(torch.equal(a, b) for a, b in zip(stream.dense, own.states, strict=True))


def test_layers_that_windows_reach_in_different_order_have_all_their_inputs() -> None:
    model, found = models.tiny_llama(layers=2), dict[str, tuple[Tensor | None, Tensor | None]]()
    block, linears = linears_of(model)[1]
    mlp: Any = block.mlp

    def forward(x: Tensor) -> Tensor:
        calls = (lambda: mlp.gate_proj(x), lambda: mlp.up_proj(3 * x))
        values = [call() for call in (calls if x.sum() > 0 else reversed(calls))]
        return mlp.down_proj(values[0] * values[1])

    mlp.forward = forward

    def solve(name: str, H: Tensor | None, D: Tensor | None = None) -> None:
        assert name not in found
        found[name.rsplit(".", 1)[-1]] = H, D

    signs = set[bool]()
    with torch.inference_mode():
        stream = StatesInTurn(model, text(6, 16), drift=True)
        stream.pass_over(0)
        stream.states = [state + torch.randn_like(state) for state in stream.states]
        mlp.register_forward_pre_hook(lambda module, args: signs.add(bool(args[0].sum() > 0)))
        stream.solve_layers(1, linears, solve)
    assert signs == {True, False}
    assert len(found) == 7
    for gate, up in zip(found["gate_proj"], found["up_proj"], strict=True):
        assert gate is not None
        assert up is not None
        assert gate.any()
        torch.testing.assert_close(up, 9 * gate, rtol=1e-4, atol=1e-4 * float(up.abs().max()))


def test_a_source_without_a_dense_model_is_refused(tmp_path: Path) -> None:
    model, solver = models.tiny_llama(), compression.make("qronos", {"group": 8})
    assert isinstance(solver, compression.Solver)
    clients = ClientHessians(model, {0: text(2, 16)}, tmp_path, lambda reply: None)
    with pytest.raises(ValueError, match="needs windows"):
        driver.run(model, solver, clients, tmp_path)
