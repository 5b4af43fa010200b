# SPDX-License-Identifier: Apache-2.0
"""Tokens that count by the gradient of the loss: the weights, the weighted sums, and commands that ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_harness import call
from spy_harness import Spy, text
from test_budget import lively
from test_calibrate import compressed_inputs, inputs_of, model_of
from test_experts import folder_of
from test_qronos import Corrected
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fleetune import compression, models
from fleetune.compression.budget import sensitivity, token_weights
from fleetune.compression.jobs import calibrating, progress, solve, weighing
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.blocks import block_file
from fleetune.compression.layerwise.driver import linears_of
from fleetune.compression.layerwise.federated import ClientHessians
from fleetune.compression.layerwise.hessian import accumulate, accumulate_drift, mirrored
from fleetune.errors import FleetuneError
from fleetune.models import Model
from fleetune.models.artefact import Master, Quantised
from fleetune.models.shapes import shape_of
from fleetune.planning import compression_cost

GRADIENT = ("--set", "tokens=gradient")


def every_linear(model: Model) -> dict[str, Any]:
    return {name: linear for _, found in linears_of(model) for name, linear in found.items()}


def some_weights(model: Model, windows: Tensor) -> dict[str, Tensor]:
    """Weights of each layer's tokens, the same for layers that read one tensor."""
    g, found = torch.Generator().manual_seed(1), dict[str, Tensor]()
    of = {
        "q_proj": "attention",
        "k_proj": "attention",
        "v_proj": "attention",
        "gate_proj": "mlp",
        "up_proj": "mlp",
    }
    drawn = dict[str, Tensor]()
    for name in every_linear(model):
        block, last = name.split(".")[2], name.rsplit(".", 1)[-1]
        key = block + of.get(last, last)
        if key not in drawn:
            drawn[key] = 4 * torch.rand(windows.shape, generator=g) ** 4
        found[name] = drawn[key]
    return found


def gradients(model: Model, windows: Tensor, seed: int) -> dict[str, Tensor]:
    """Mean square of the gradient of -log p(y) by each layer's outputs, float64 [n, length], by autograd on the whole net."""
    net, draw = model.net, torch.Generator().manual_seed(seed)
    linears, rows = every_linear(model), dict[str, list[Tensor]]()
    for window in windows:
        kept = dict[str, Tensor]()

        def keep(name: str, kept: dict[str, Tensor] = kept) -> Any:
            return lambda module, args, out: kept.__setitem__(name, out)

        handles = [linear.register_forward_hook(keep(name)) for name, linear in linears.items()]
        table = net.get_input_embeddings()
        handles.append(table.register_forward_hook(lambda m, a, out: out.detach().requires_grad_()))
        logits = net(input_ids=window[None]).logits[0, :-1]
        for handle in handles:
            handle.remove()
        p = logits.detach().softmax(-1)
        y = torch.searchsorted(p.cumsum(-1), torch.rand(len(p), 1, generator=draw).double())[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
        found = torch.autograd.grad(loss, [kept[n] for n in linears])
        for name, g in zip(linears, found, strict=True):
            rows.setdefault(name, []).append((g[0] ** 2).mean(-1))
    return {name: torch.stack(parts) for name, parts in rows.items()}


# The weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_squares_are_those_of_the_gradients(tied: bool) -> None:
    model, windows = lively(tie_word_embeddings=tied), text(3, 20)
    model.net.double()
    got = sensitivity.of_tokens(model, windows, list(every_linear(model)), 5)
    want = gradients(model, windows, 5)
    assert set(got) == set(want)
    for name, of in want.items():
        torch.testing.assert_close(got[name].double(), of, rtol=1e-4, atol=1e-6 * float(of.max()))
        assert not got[name][:, -1].any(), "nothing is predicted after a window's last token"


class Watched(TorchDispatchMode):
    """Counts how often 1 minus something of this width is computed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.count = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.rsub.Scalar and args[0].shape[-1] == self.width
        return func(*args, **(kwargs or {}))


def test_what_only_a_budget_needs_is_not_computed() -> None:
    model, windows = lively(), text(3, 20)
    names = list(every_linear(model))
    with Watched(len(model.net.get_input_embeddings().weight)) as watched:
        sensitivity.of_tokens(model, windows, names, 5)
        assert watched.count == 0
        sensitivity.measure(model, windows, names, 5)
        assert watched.count == len(windows)


def test_weights_have_mean_1_and_layers_that_read_one_tensor_share_them() -> None:
    model, windows = lively(), text(3, 20)
    squares = sensitivity.of_tokens(model, windows, list(every_linear(model)), 5)
    found = token_weights.measure(model, windows, 5)
    assert set(found) == set(every_linear(model))
    for number in range(len(linears_of(model))):
        at = f"model.layers.{number}"
        for readers in (
            [f"{at}.self_attn.{x}_proj" for x in "qkv"],
            [f"{at}.mlp.{x}_proj" for x in ("gate", "up")],
            [f"{at}.self_attn.o_proj"],
            [f"{at}.mlp.down_proj"],
        ):
            want = sum(squares[name] / squares[name].mean() for name in readers) / len(readers)
            for name in readers:
                torch.testing.assert_close(found[name], want)
                assert float(found[name].mean()) == pytest.approx(1, rel=1e-5)
    again = token_weights.measure(model, windows, 5)
    assert all(torch.equal(again[name], of) for name, of in found.items())
    other = token_weights.measure(model, windows, 6)
    assert not any(torch.equal(other[name], of) for name, of in found.items())


def test_layers_without_a_gradient_at_every_token_are_left_out() -> None:
    model = lively()
    model.net.get_submodule(
        "model.layers.2.self_attn.o_proj"
    ).weight.data.zero_()  # what q, k and v do is lost
    mlp: Any = linears_of(model)[1][0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: x * forward(x[:, :8]).mean()  # as where tokens are routed
    found = token_weights.measure(model, text(2, 16), 0)
    lost = {f"model.layers.2.self_attn.{x}_proj" for x in "qkv"}
    lost |= {f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert set(found) == set(every_linear(model)) - lost


def test_gradients_that_are_not_finite_are_an_error() -> None:
    model = lively()
    model.net.get_submodule("model.layers.1.mlp.down_proj").weight.data.fill_(1e38)
    with pytest.raises(FleetuneError, match="not finite") as caught:
        token_weights.measure(model, text(1, 8), 0)
    assert caught.value.hint == "--set tokens=equal"


# The sums -------------------------------------------------------------------------------------------


def test_sums_are_the_weighted_ones() -> None:
    g = torch.Generator().manual_seed(0)
    x, y, s = (torch.randn(5000, 140, generator=g, dtype=torch.float64) for _ in range(3))
    s = s[:, 0].abs()
    H, D = torch.zeros(140, 140, dtype=torch.float64), torch.zeros(140, 140, dtype=torch.float64)
    accumulate(H, y.view(50, 100, 140), s.view(50, 100))
    accumulate_drift(D, x, y, s)
    torch.testing.assert_close(mirrored(H), 2 * (y * s[:, None]).T @ y)
    torch.testing.assert_close(D, 2 * ((x - y) * s[:, None]).T @ y)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_hessians_are_weighted_in_the_compressed_model(true_sequential: bool, tmp_path: Path) -> None:
    model, spy, windows = model_of("llama"), Spy(), text(3, 20)
    weights = some_weights(model, windows)
    parts = driver.run(model, spy, windows, tmp_path, true_sequential=true_sequential, weights=weights)
    for at, (name, x) in enumerate(compressed_inputs(model, parts, windows, true_sequential)):
        got, s = spy.seen[at].double(), weights[name].double().reshape(-1, 1)
        torch.testing.assert_close(got, 2 * (s * x).T @ x, rtol=1e-4, atol=1e-4 * float(got.abs().max()))


def test_drifts_are_weighted(tmp_path: Path) -> None:
    model, spy, windows = model_of("llama"), Corrected(), text(3, 20)
    weights, every = some_weights(model, windows), every_linear(model)
    parts = driver.run(model, spy, windows, tmp_path, weights=weights)
    for at, (name, y) in enumerate(compressed_inputs(model, parts, windows, true_sequential=True)):
        x = inputs_of(model, {name: every[name]}, windows)[name]
        s = weights[name].double().reshape(-1, 1)
        tolerance = 1e-5 * float((s * y**2).sum())
        torch.testing.assert_close(spy.seen[at].double(), 2 * (s * y).T @ y, rtol=1e-4, atol=tolerance)
        torch.testing.assert_close(
            spy.drifts[at].double(), 2 * (s * (x - y)).T @ y, rtol=1e-4, atol=tolerance
        )


@pytest.mark.parametrize(
    ("method", "more"), [("optq", {}), ("optq", {"true_sequential": True}), ("qronos", {})]
)
def test_weights_of_1_change_no_bit(method: str, more: dict[str, bool], tmp_path: Path) -> None:
    model, solver, windows = models.tiny_llama(), compression.make(method, {"group": 8}), text(4, 16)
    assert isinstance(solver, compression.Solver)
    ones = dict.fromkeys(every_linear(model), torch.ones(4, 16))
    plain = driver.run(model, solver, windows, tmp_path / "plain", **more)
    same = driver.run(model, solver, windows, tmp_path / "ones", weights=ones, **more)
    other = driver.run(
        model, solver, windows, tmp_path / "other", weights=some_weights(model, windows), **more
    )
    for name in plain:
        a, b = plain[name], same[name]
        assert isinstance(a, Quantised)
        assert isinstance(b, Quantised)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scale, b.scale)
    assert any(not torch.equal(plain[n].codes, other[n].codes) for n in plain)  # type: ignore[union-attr]


def test_weights_are_of_windows(tmp_path: Path) -> None:
    model, solver, windows = models.tiny_llama(), compression.make("optq", {"group": 8}), text(2, 16)
    clients = ClientHessians(model, {0: windows}, tmp_path, lambda reply: None)
    with pytest.raises(ValueError, match="tokens of windows"):
        driver.run(model, solver, clients, tmp_path, weights=some_weights(model, windows))  # type: ignore[arg-type]


# Commands -------------------------------------------------------------------------------------------


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The heron stood still in the shallow water, as before. " * 30)
    models.save(lively().net, models.tiny_tokenizer(), tmp_path / "m")
    return tmp_path


TEXT = ("--text", "text.txt", "--windows", "4", "--length", "16")


def test_it_is_what_the_driver_does_with_the_weights(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digests = []
    for tokens in ((), ("--set", "tokens=equal"), GRADIENT):
        code, events, err = call(
            capsys, "compress", "m", "--method", "optq", "--set", "group=4", *TEXT, *tokens
        )
        assert code == 0, err
        digests.append(events[-1]["digest"])
    assert digests[0] == digests[1] != digests[2]
    model = models.load("m", device="cpu")
    solver: Any = compression.make("optq", {"group": 4, "tokens": "gradient"})
    ids = [model.tokenizer((at / "text.txt").read_text())["input_ids"]]
    windows = driver.windows([torch.tensor(ids[0]).numpy()], 16, 4)
    weights = token_weights.measure(model, windows, 42)
    parts = driver.run(model, solver, windows, at / "parts", weights=weights)
    written = Master(Path(events[-1]["folder"]) / "model")
    assert written.head.settings["tokens"] == "gradient"
    for name, own in parts.items():
        found = written.quantised(name)
        assert isinstance(own, Quantised)
        assert found is not None
        assert torch.equal(own.codes, found.codes)


def stopped(
    args: tuple[str, ...], at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder of a compression that was stopped after its second block."""
    written, block = progress.report_block, list[int]()

    def stop(*about: Any) -> None:
        written(*about)
        block.append(0)
        if len(block) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress, "report_block", stop)
        assert call(capsys, "compress", *args)[0] == 130
    return sorted((at / "runs").iterdir())[-1]


def test_blocks_of_before_there_was_a_choice_are_gone_on_with(
    at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("m", "--method", "optq", "--set", "group=4", *TEXT)
    stated = [
        (stopped((*args, *more), at, capsys, monkeypatch) / "parts" / calibrating.ORIGIN).read_text()
        for more in ((), GRADIENT)
    ]
    assert ["tokens" in text for text in stated] == [False, True]


@pytest.mark.parametrize("method", ["optq", "qronos"])
def test_a_stopped_one_resumes_with_the_same_bits(
    method: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("m", "--method", method, "--set", "group=4", *TEXT, *GRADIENT)
    code, events, err = call(capsys, "compress", *args)
    assert code == 0, err
    folder = stopped(args, at, capsys, monkeypatch)
    assert block_file(folder / "parts", 1).is_file()
    with monkeypatch.context() as patch:
        patch.setattr(token_weights, "measure", None)  # they are kept
        code, again, err = call(capsys, "compress", "--resume", str(folder))
    assert code == 0, err
    assert again[-1]["digest"] == events[-1]["digest"]
    assert not (folder / "parts").exists()


@pytest.mark.parametrize("spoilt", ["bit", "gone", "noise", "other"])
def test_kept_weights_that_are_damaged_or_of_something_else_are_measured_again(
    spoilt: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("m", "--method", "optq", "--set", "group=4", *TEXT, *GRADIENT)
    folder = stopped(args, at, capsys, monkeypatch)
    file = folder / "parts" / weighing.FILE
    raw = bytearray(file.read_bytes())
    if spoilt == "other":
        other = stopped((*args, "--seed", "7"), at, capsys, monkeypatch)
        raw = bytearray((other / "parts" / weighing.FILE).read_bytes())
    raw[-5] ^= spoilt == "bit"
    file.unlink() if spoilt == "gone" else file.write_bytes(b"x" * 90 if spoilt == "noise" else raw)
    measured, real = list[Any](), token_weights.measure
    monkeypatch.setattr(token_weights, "measure", lambda *given: measured.append(real(*given)) or measured[0])
    code, again, err = call(capsys, "compress", "--resume", str(folder))
    assert code == 0, err
    assert len(measured) == 1
    code, whole, err = call(capsys, "compress", *args)
    assert code == 0, err
    assert again[-1]["digest"] == whole[-1]["digest"]


def test_a_mixtures_experts_count_their_tokens_alike(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of("qwen3_moe", at / "moe")
    model = models.load("moe", device="cpu")
    found = token_weights.measure(model, text(2, 16), 0)
    assert set(found) == {name for name in every_linear(model) if ".self_attn." in name}
    code, _, said = call(capsys, "compress", "moe", "--method", "optq", "--set", "group=8", *TEXT, *GRADIENT)
    assert code == 0, said
    assert "all layers but the experts" in said


def test_memory_counts_the_pass_back() -> None:
    shape = shape_of(lively().net.config)
    plain = compression_cost.CompressionSize(16, 256)
    sizes = [compression_cost.memory(shape, plain._replace(weighted=w)) for w in (False, True)]
    assert sizes[1]["work"] >= compression_cost.LOGITS
    assert sizes[1]["states"] - sizes[0]["states"] == 4 * 16 * 256 * len(shape.linears)
    assert solve.size_of(compression.make("optq", {"tokens": "gradient"}), 16, 256).weighted  # type: ignore[arg-type]
    assert not solve.size_of(compression.make("optq", {}), 16, 256).weighted  # type: ignore[arg-type]
