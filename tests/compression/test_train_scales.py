"""Scales that are trained to follow the dense model: exact gradients, a result on its grid, a training that resumes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_harness import tokenizer
from pruner_harness import SIZES, tiny

from command_line import Capture, Patch, ok, pressed_when
from command_line import call_json as call
from fleetune import compression, models
from fleetune.compression.jobs import scales
from fleetune.compression.jobs.scales import MovableScales
from fleetune.compression.layerwise.grids import Grid, rounded
from fleetune.compression.methods import gkd
from fleetune.data.encode import Encoded, collate
from fleetune.deploy.formats import _ggml_blocks
from fleetune.evaluation.losses import pad_id
from fleetune.models.artefact import Master, Quantised
from fleetune.runs.compression_folder import CompressRequest
from heard import Heard

SMALL = ("--method", "optq", "--text", "text.txt", "--windows", "4", "--length", "32")
GRIDS = {"ggml": 4, "iq4_nl": 4, "universal": 5, "asymmetric": 3, "q4_k": 4, "q6_k": 6, "iq4_xs": 4}.items()


def matrix(kind: str, bits: int, seed: int = 0) -> Quantised:
    g = torch.Generator().manual_seed(seed)
    return rounded(torch.randn(6, 256, generator=g), Grid(kind, bits), 32)


@pytest.mark.parametrize(("kind", "bits"), GRIDS)
def test_gradients_are_those_of_the_dense_formula(kind: str, bits: int) -> None:
    """Against torch's own gradient of x (s n - o)' by delta, in float64."""
    q = matrix(kind, bits)
    found, g = MovableScales(q), torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 256, generator=g, requires_grad=True)
    back = torch.randn(2, 5, 6, generator=g)
    y = found.product(x)
    torch.testing.assert_close(y, x @ q.dense().T, rtol=1e-5, atol=1e-4)
    torch.autograd.backward(y, back)

    x64 = x.detach().double().requires_grad_()
    deltas = {n: torch.zeros_like(p).double().requires_grad_() for n, p in found.named_parameters()}
    units = {"delta": found.unit, "low": found.low_unit}
    multiples = {"delta": found.multiples, "low": found.minima}
    made = {}
    for name, delta in deltas.items():
        unit = units[name].double() * (1 + delta)
        times = multiples[name]
        made[name] = unit if times is None else unit.repeat_interleave(times.shape[1], 1) * times.double()
    groups = q.steps().double().view(6, made["delta"].shape[1], -1) * made["delta"][..., None]
    if "low" in made:
        groups = groups - made["low"][..., None]
    torch.autograd.backward(x64 @ groups.reshape(6, 256).T, back.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    for name, p in found.named_parameters():
        torch.testing.assert_close(p.grad.double(), deltas[name].grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("kind", "bits"), GRIDS)
def test_moved_scales_stay_on_the_grid(kind: str, bits: int) -> None:
    """Codes and small integers are kept; the type that held the matrix holds it still."""
    q = matrix(kind, bits)
    found, g = MovableScales(q), torch.Generator().manual_seed(2)
    assert torch.equal(found.on_grid(q).dense(), q.dense()), "nothing moved"
    with torch.no_grad():
        for p in found.parameters():
            p.uniform_(-0.05, 0.05, generator=g)
    moved = found.on_grid(q)
    assert torch.equal(moved.codes, q.codes)
    assert not torch.equal(moved.dense(), q.dense())
    fits = {k for k in _ggml_blocks.PACKERS if _ggml_blocks.misfit(q, k) is None}
    assert {k for k in _ggml_blocks.PACKERS if _ggml_blocks.misfit(moved, k) is None} == fits
    torch.testing.assert_close(moved.dense(), found.product(torch.eye(256)).T.detach(), rtol=2e-2, atol=1e-3)


def test_a_pruned_weight_stays_zero() -> None:
    W = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    W[:, ::3] = 0.0
    q = compression.make("rtn", {}).solve(W, torch.zeros(64, 64)).weight  # type: ignore[union-attr]
    assert isinstance(q, Quantised)
    found = MovableScales(q)
    with torch.no_grad():
        found.delta.fill_(0.1)
    assert bool((found.on_grid(q).dense()[:, ::3] == 0).all())


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_a_step_is_that_of_the_divergence(tied: bool) -> None:
    """The step's own way, by pieces and under checkpoints, against the whole divergence by torch, with a quantised head."""
    model = tiny("llama", tie_word_embeddings=tied, biases=True, **SIZES)
    wide = {name: tensor.detach() for name, tensor in models.named_tensors(model.net) if tensor.dim() == 2}
    weights: Any = {name: rounded(tensor, Grid("ggml", 4), 32) for name, tensor in wide.items()}
    student = scales.student_of(model, weights)
    assert len(student.scales) == 14
    windows = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(3))
    batch = collate([Encoded(ids=w.numpy(), n_prompt=1) for w in windows], pad_id(model), "cpu")
    loss = scales._backward(model, student, batch)
    with torch.no_grad():
        P = model.net(input_ids=windows).logits[:, :-1].flatten(0, 1)
    before = {n: p.data for n, p in model.net.named_parameters()}
    own = {n: p.grad.clone() for n, p in student.parameters().items()}
    for p in student.parameters().values():
        p.grad = None
    with student.on(), torch.enable_grad():
        Q = model.net(input_ids=windows).logits[:, :-1].flatten(0, 1)
        whole = gkd.divergence(Q, P, 0.0).mean()
        torch.autograd.backward(whole)
    assert float(loss) == pytest.approx(float(whole.detach()), rel=1e-4)
    assert float(loss) > 0
    for name, p in student.parameters().items():
        torch.testing.assert_close(own[name], p.grad, rtol=2e-3, atol=1e-7)
    assert all(before[n] is p.data or torch.equal(before[n], p.data) for n, p in model.net.named_parameters())
    with torch.no_grad():
        again = model.net(input_ids=windows).logits[:, :-1].flatten(0, 1)
    assert torch.equal(again, P), "the dense model is as it was"


@pytest.fixture
def model(at: Path) -> str:
    made = dataclasses.replace(tiny("llama", **SIZES), tokenizer=tokenizer())
    with torch.no_grad():
        for p in made.net.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    models.save(made.net, made.tokenizer, at / "tiny")
    return "tiny"


def after(capsys: Capture, *flags: str) -> tuple[float, str, Path]:
    """The divergence on the text, the digest and the folder of a compression."""
    events = ok(capsys, "compress", *SMALL, "--eval-text", "text.txt", *flags)
    return events[-1]["after"]["kl_divergence"], events[-1]["digest"], Path(events[-1]["folder"])


def test_training_brings_the_model_nearer_to_the_dense_one(model: str, capsys: Capture) -> None:
    flags = (model, "--set", "bits=3", "--set", "grid=asymmetric")
    plain, _, one = after(capsys, *flags)
    trained, _, two = after(capsys, *flags, "--train-scales", "40")
    assert trained < 0.95 * plain
    first, second = (Master(folder / "model") for folder in (one, two))
    for name in first.head.grids:
        assert torch.equal(first.quantised(name).codes, second.quantised(name).codes)  # type: ignore[union-attr]
    assert second.head.settings["train_scales"] == 40


def test_little_text_is_said() -> None:
    for steps, tokens, said in ((1, 4095, True), (0, 4095, False), (1, 4096, False)):
        heard = Heard()
        request = CompressRequest("m", False, "optq", train_scales=steps)
        scales.warn(request, torch.zeros(1, tokens), heard, experts=False)
        assert bool(heard.notes) == said


def test_it_resumes_with_the_same_bits(model: str, at: Path, capsys: Capture, monkeypatch: Patch) -> None:
    flags = (model, *SMALL, "--bytes", "150kB", "--train-scales", "9")
    events = ok(capsys, "compress", *flags)
    whole, kept = events[-1]["digest"], at / "runs" / "0002-optq-tiny" / "parts" / "scales"
    pressed = pressed_when(lambda: any(kept.rglob("*.*")))
    with monkeypatch.context() as patch:
        patch.setattr("fleetune.cli.console.InterruptHandler", pressed)
        patch.setattr(scales, "EVERY", 3)
        code, events, _ = call(capsys, "compress", *flags)
    assert code == 130
    assert kept.is_dir(), "stopped within the training"
    assert sum(event["event"] == "step" for event in events) < 9
    events = ok(capsys, "compress", "--resume", "2")
    assert 0 < sum(event["event"] == "step" for event in events) < 9
    assert events[-1]["digest"] == whole
    assert not kept.exists()
