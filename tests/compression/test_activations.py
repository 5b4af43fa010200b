"""Hessians: their sums and factors, what a compressed model really feeds its layers, and drifts from the dense model's inputs."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from solver_harness import curvature, damped, dense, relative_error, work
from spy_harness import FAMILIES, Spy, compressed_inputs, inputs_of, model_of, text
from torch import Tensor

import fleetune
from fleetune import compression, models
from fleetune.compression import Corrector, Solved
from fleetune.compression.layerwise import driver, hessian
from fleetune.compression.layerwise.activations import HiddenStates, StatesInTurn
from fleetune.compression.layerwise.blocks import FinishedBlocks, block_file
from fleetune.compression.layerwise.driver import linears_of
from fleetune.compression.layerwise.federated import ClientHessians
from fleetune.errors import Interrupted
from fleetune.models import artefact
from fleetune.models.artefact import Quantised
from heard import Heard


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_hessians_are_of_the_inputs_in_the_compressed_model(family: str, tmp_path: Path) -> None:
    """Layer by layer what the compressed model feeds it, with its own block as it was."""
    model, spy, windows = model_of(family), Spy(), text(3, 20)
    before = {n: p.clone() for n, p in model.net.named_parameters()}
    parts = driver.run(model, spy, windows, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in model.net.named_parameters())  # the model is as it was
    blocks = linears_of(model)
    # in the order they were solved
    names = [matrix.name for block in parts.blocks for matrix in block.matrices]
    assert sorted(names) == sorted(name for _, linears in blocks for name in linears)
    assert len(spy.seen) == len(names) == len(parts)
    for at, (_, x) in enumerate(compressed_inputs(model, parts, windows, in_turn=False)):
        assert len(x) == 60
        got = spy.seen[at].double()
        torch.testing.assert_close(got, 2 * x.T @ x, rtol=1e-4, atol=1e-4 * got.abs().max().item())


def test_a_layer_that_is_read_twice_counts_twice() -> None:
    model, windows = models.tiny_llama(), text(3, 16)
    block, linears = linears_of(model)[0]
    mlp: Any = block.mlp

    def forward(x: Tensor) -> Tensor:
        h = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return mlp.down_proj(h) + mlp.down_proj(h / 2 + 1)

    mlp.forward = forward
    with torch.inference_mode():
        H = HiddenStates(model, windows).hessians(0, linears)
    for name, x in inputs_of(model, linears, windows).items():
        torch.testing.assert_close(H[name].double(), 2 * x.T @ x, rtol=1e-4, atol=1e-3)


def test_layers_that_read_one_tensor_share_a_hessian() -> None:
    model = models.tiny_llama()
    _, linears = linears_of(model)[0]
    with torch.inference_mode():
        H = HiddenStates(model, text(2, 8)).hessians(0, linears)
    by = {name.rsplit(".", 1)[-1]: h for name, h in H.items()}
    assert by["q_proj"] is by["k_proj"] is by["v_proj"]
    assert by["gate_proj"] is by["up_proj"]
    assert len({id(h) for h in H.values()}) == 4


def test_layers_that_share_a_hessian_share_its_factor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Qronos corrects and solves with one factor; once without sharing, the codes are the same."""
    model, made, factor = models.tiny_llama(), list[int](), hessian._inverse_factor
    monkeypatch.setattr(hessian, "_inverse_factor", lambda H: made.append(len(H)) or factor(H))
    solver = compression.make("qronos", {"group": 8})
    blocks = len(linears_of(model))
    shared = driver.run(model, solver, text(2, 8), tmp_path / "shared")
    assert len(made) == 4 * blocks  # what q, k, v read; o; gate and up; down
    monkeypatch.setattr("fleetune.compression.layerwise.activations.factor_kept", contextlib.nullcontext)
    alone = driver.run(model, solver, text(2, 8), tmp_path / "alone")
    assert len(made) == (4 + 2 * 7) * blocks
    assert all(torch.equal(artefact.dense(shared[name]), artefact.dense(alone[name])) for name in shared)


class Corrected(Spy):
    """A spy that keeps the drifts as well, and moves the weights by a step of the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.drifts: list[Tensor] = []

    def correct(self, W: Tensor, H: Tensor, D: Tensor) -> Tensor:
        self.drifts.append(D.clone())
        return W + 1 / 16


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_drifts_are_of_the_inputs_in_both_models(family: str, tmp_path: Path) -> None:
    """The compressed model with all layers solved so far, those of its own block as well."""
    model, spy, windows = model_of(family), Corrected(), text(3, 20)
    assert isinstance(spy, Corrector)
    parts = driver.run(model, spy, windows, tmp_path)
    names = [matrix.name for block in parts.blocks for matrix in block.matrices]
    every = {name: m for _, linears in linears_of(model) for name, m in linears.items()}
    assert len(spy.drifts) == len(spy.seen) == len(names)
    for at, (name, y) in enumerate(compressed_inputs(model, parts, windows, in_turn=True)):
        x = inputs_of(model, {name: every[name]}, windows)[name]
        tolerance = 1e-5 * float(y.square().sum())
        torch.testing.assert_close(spy.seen[at].double(), 2 * y.T @ y, rtol=1e-4, atol=tolerance)
        torch.testing.assert_close(spy.drifts[at].double(), 2 * (x - y).T @ y, rtol=1e-4, atol=tolerance)
        assert spy.drifts[at].any() == (at > 2), "the first three layers read what the first norm gives"
        want = torch.round(16 * (every[name].weight + 1 / 16)) / 16
        assert torch.equal(dense(Solved(parts[f"{name}.weight"])), want)


def test_the_dense_stream_is_that_of_the_model() -> None:
    """Bit for bit, through blocks that are solved and blocks that are passed over after a stop."""
    model, windows = models.tiny_llama(layers=3), text(3, 20)
    blocks = [linears for _, linears in linears_of(model)]
    streams = []
    with torch.inference_mode():
        for solved in (True, False):
            stream = StatesInTurn(model, windows)
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
        stream = StatesInTurn(model, windows)
        stream.solve_layers(0, linears, solve)
    assert signs == {True, False}
    assert all(torch.equal(a, b) for a, b in zip(stream.dense, own.states, strict=True))


def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run() -> FinishedBlocks:
        solver: Any = compression.make("qronos", {"group": 8})
        return driver.run(models.tiny_llama(layers=4), solver, text(4, 16), tmp_path)

    whole = run()
    codes = {name: found.codes for name, found in whole.items() if isinstance(found, Quantised)}
    for last in (2, 3):
        block_file(tmp_path, last).unlink()
    again = run()
    assert len(codes) == len(whole) == 28
    assert all(torch.equal(own, again[name].codes) for name, own in codes.items())  # type: ignore[union-attr]


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
        stream = StatesInTurn(model, text(3, 16))
        stream.pass_over(0)
        stream.states = [state + torch.randn_like(state) for state in stream.states]
        stream.solve_layers(1, linears, solve)
    q, up = found["q_proj"], found["up_proj"]
    assert q[1] is not None
    assert q[1].any()
    assert up[0] is not None
    assert up[1] is None


def test_a_source_without_a_dense_model_is_refused(tmp_path: Path) -> None:
    model, solver = models.tiny_llama(), compression.make("qronos", {"group": 8})
    assert isinstance(solver, compression.Solver)
    clients = ClientHessians(model, {0: text(2, 16)}, tmp_path, lambda reply: None)
    with pytest.raises(ValueError, match="needs windows"):
        driver.run(model, solver, clients, tmp_path)


@pytest.mark.parametrize("C", [7, 128, 129, 300])  # less than a strip, one, and several
def test_sums_and_errors_are_those_of_the_inputs_and_outputs(C: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(50, C, generator=g).double(), torch.randn(3, C, generator=g).double()
    Q, H = torch.round(W), torch.zeros(C, C).double()
    for part in x.split(20):
        hessian.accumulate(H, part[None])
    H = hessian.mirrored(H)
    torch.testing.assert_close(H, 2 * x.T @ x)
    assert torch.equal(H, H.T)
    want = ((x @ (W - Q).T) ** 2).sum() / ((x @ W.T) ** 2).sum()
    assert relative_error(W, Q, H) == pytest.approx(want.item(), rel=1e-12)


def test_the_curvature_is_that_of_the_columns_that_are_left_and_0_for_dead_inputs() -> None:
    _, H = work(9, 1, 12)
    H[:, [2, 11]] = 0
    H[[2, 11]] = 0
    factor = hessian.inverse_cholesky(H.clone(), 0.0)
    left = H.clone()
    left[[2, 11], [2, 11]] = 1
    want = curvature(left)
    want[[2, 11]] = 0
    assert factor.curvature is not None
    torch.testing.assert_close(factor.curvature, want, rtol=1e-9, atol=1e-12)
    assert hessian.inverse_cholesky(torch.zeros(3, 3), 0.01).curvature is None


def test_u_holds_every_inverse() -> None:
    """U_ii^2 and U_ii U[i, i:] against explicit inverses of what is left."""
    _, H = work(9, 1, 12)
    U, _, _, notes = hessian.inverse_cholesky(H.clone(), 0.05)
    assert notes == ()
    for i in range(12):
        left = torch.linalg.inv(damped(H, 0.05)[i:, i:])
        torch.testing.assert_close(U[i, i] * U[i, i:], left[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("C", [1, 64, 65, 200])
def test_u_of_a_wide_layer_is_put_together_of_halves(C: int) -> None:
    _, H = work(4, 1, C)
    U, *_ = hessian.inverse_cholesky(H.clone(), 0.05)
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(damped(H, 0.05)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["optq", "qronos"])
def test_ctrl_c_ends_it_between_windows(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models.tiny_llama().save(Path("little"))
    Path("text.txt").write_text("one two three four five six seven " * 200)
    ran, forward = list[int](), HiddenStates.forward
    monkeypatch.setattr(HiddenStates, "forward", lambda *args: (ran.append(1), forward(*args))[1])
    with pytest.raises(Interrupted, match="stopped in a block; finished blocks are kept"):
        few = {"settings": {"group": 8}, "windows": 12, "length": 16}
        stop = Heard(lambda heard: len(ran) == 3)
        fleetune.compress("little", text="text.txt", method=method, listener=stop, **few)
    assert len(ran) == 3
