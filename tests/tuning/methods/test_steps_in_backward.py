"""AdamW's steps in backward: those of one optimizer after it, bit for bit, with one gradient in memory at a time."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fleetune import adapters, models
from fleetune.data import Batches, Encoded
from fleetune.evaluation.losses import pad_id
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.net.layers import by_layer
from fleetune.tuning.methods import _adapter, fedit

ROWS = [Encoded(np.arange(5 + i, 25 + 2 * i, dtype=np.int32), 1) for i in range(6)]


def with_lora() -> models.Model:
    model = models.tiny_llama(layers=3)
    adapters.attach(model, adapters.Lora(r=4, alpha=8, dropout=0.1), seed=3)
    return model


def after_backward(model: models.Model, key: int, how: fedit.Method, correction: dict[str, Any]) -> None:
    """The reference: one AdamW over all parameters, a step when all gradients are there."""
    parameters = adapters.trainable(model)
    origin = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=how.weight_decay)
    batches = Batches(ROWS, pad_id(model), key).epochs(how.epochs, how.batch_size)
    with adapters.training(model, key), by_layer(model.net, small=0):
        for batch, rate in zip(batches, how.rates(len(ROWS)), strict=True):
            loss_tensor(model, batch).backward()  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items():
                parameter.grad.add_(parameter.detach() - origin[name], alpha=how.mu)
            if how.clip:
                nn.utils.clip_grad_norm_(parameters.values(), how.clip)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, away in correction.items():
                    parameters[name].sub_(torch.from_numpy(away), alpha=rate)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mu": 0.5},
        {"weight_decay": 0.3, "warmup": 1, "decay": True},
        {"clip": 0.1, "mu": 0.5},
        {"scaffold": True},
    ],
)
def test_they_are_the_steps_after_backward(more, monkeypatch):
    monkeypatch.setattr(_adapter, "by_layer", lambda net, room: by_layer(net, small=0, room=room))
    how = fedit.Method(**({"lr": 0.01, "epochs": 3, "batch_size": 2} | more))
    one, other = with_lora(), with_lora()
    rng = np.random.default_rng(5)
    correction = {n: rng.normal(size=p.shape).astype(np.float32) for n, p in adapters.trainable(one).items()}
    correction = correction if how.scaffold else {}
    before = adapters.export(one)
    how.train(one, Batches(ROWS, pad_id(one), 9), 9, correction)
    after_backward(other, 9, how, correction)
    ours, theirs = adapters.export(one), adapters.export(other)
    assert all(np.array_equal(ours[n], theirs[n]) for n in before)
    assert not any(np.array_equal(ours[n], before[n]) for n in before)
    assert not any(p._post_accumulate_grad_hooks for p in adapters.trainable(one).values())


def steps_of(parameters: list[nn.Parameter], loss: Tensor, how: fedit.Method) -> None:
    steps = _adapter.Steps(parameters, how, "cpu")
    with steps.in_backward():
        loss.backward()  # type: ignore[no-untyped-call]
        steps.after_backward()


def test_a_parameter_that_is_used_twice_takes_one_step_of_its_whole_gradient():
    torch.manual_seed(0)
    one = nn.Linear(6, 6)
    other, x = copy.deepcopy(one), torch.randn(4, 6)
    steps_of(list(one.parameters()), one(one(x).sin()).square().sum(), fedit.Method(lr=0.1))
    optimizer = torch.optim.AdamW(other.parameters(), 0.1, weight_decay=0.0)
    other(other(x).sin()).square().sum().backward()
    optimizer.step()
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


@pytest.mark.parametrize(("clip", "most"), [(0.0, 1), (1.0, 8)])
def test_without_a_clip_one_gradient_exists_at_a_time(clip, most):
    layers = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(8)))
    parameters, alive = list(layers.parameters()), []
    for parameter in parameters:  # before the steps' own
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in parameters))
        )
    steps_of(parameters, layers(torch.randn(4, 6)).square().sum(), fedit.Method(lr=0.1, clip=clip))
    assert max(alive) == most
    assert all(p.grad is None for p in parameters)
