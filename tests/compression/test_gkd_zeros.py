# SPDX-License-Identifier: Apache-2.0
"""GKD on a pruned student: its zeros stay zero where that is asked for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from gkd_harness import pair, rows, trainer
from torch import Tensor

from fleetune.compression.methods import gkd
from fleetune.errors import Interrupted, RecipeError
from fleetune.models import Model, digest, named_tensors


def pruned() -> tuple[Model, Model]:
    """A student without the smaller half of each linear layer's weights, and its teacher."""
    student, teacher = pair()
    for name, weight in named_tensors(student.net):
        if "_proj" in name:
            weight.masked_fill_(weight.abs() < weight.abs().median(), 0.0)
    return student, teacher


def holes(model: Model) -> dict[str, Tensor]:
    return {name: weight == 0 for name, weight in named_tensors(model.net)}


@pytest.mark.parametrize("keep", [True, False])
def test_zeros_stay_where_it_is_asked_for(keep: bool, tmp_path: Path) -> None:
    student, teacher = pruned()
    before = {name: weight.clone() for name, weight in named_tensors(student.net)}
    t = trainer(keep_zeros=keep, steps=20, batch_size=8, lr=1e-2, lmbda=0)
    apart = t.distance(student, teacher, rows(9, 8))
    t.train(student, teacher, rows(0, 16), 0, tmp_path / "p")
    assert t.distance(student, teacher, rows(9, 8)) < apart
    for name, weight in named_tensors(student.net):
        zero = before[name] == 0
        if keep:
            assert torch.equal(weight == 0, zero), name
        elif "_proj" in name:
            assert (weight[zero] == 0).sum() < 0.1 * zero.sum(), name
        assert (weight[~zero] != before[name][~zero]).float().mean() > 0.5, name


def test_a_vector_of_zeros_is_no_hole(tmp_path: Path) -> None:
    student, teacher = pruned()
    norm = student.net.model.norm.weight
    norm[0] = 0.0
    trainer(keep_zeros=True, steps=1).train(student, teacher, rows(0, 4), 0, tmp_path / "p")
    assert norm[0] != 0


def test_the_bound_of_the_gradient_is_of_what_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda parameters, bound: norms.append(float(found := real(parameters, bound))) or found,
    )
    for keep in (True, False):
        student, teacher = pruned()
        trainer(keep_zeros=keep, steps=1, lmbda=0).train(
            student, teacher, rows(0, 4), 0, tmp_path / str(keep)
        )
    assert norms[0] < norms[1]


def test_a_stopped_training_keeps_its_zeros_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: Path, last: int) -> str:
        student, teacher = pruned()

        def stop(step: int, steps: int, loss: float, mean: float | None) -> None:
            if step == last:
                raise Interrupted("now")

        trainer(keep_zeros=True, lr=1e-2).train(student, teacher, rows(0, 7), 3, folder, stop)
        return digest(named_tensors(student.net))

    want = run(tmp_path / "whole", 0)
    with pytest.raises(Interrupted):
        run(tmp_path / "p", 4)
    assert run(tmp_path / "p", 0) == want


def test_what_has_no_zeros_and_what_will_lose_them_is_said(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = pair()
    with pytest.raises(RecipeError, match="keep_zeros: no matrix of tiny-llama has a zero to keep"):
        trainer(keep_zeros=True).check(student, teacher, 10)
    trainer().check(student, teacher, 10)
    assert not caplog.records
    student, teacher = pruned()
    linear = [w for n, w in named_tensors(student.net) if w.ndim == 2]
    share = sum(int((w == 0).sum()) for w in linear) / sum(w.numel() for w in linear)
    assert gkd.zero_share(student.net) == pytest.approx(share)
    with caplog.at_level(logging.WARNING, "fleetune"):
        trainer(keep_zeros=True).check(student, teacher, 10)
        assert not caplog.records
        trainer().check(student, teacher, 10)
    assert f"{100 * share:.0f} % of the weights are 0 and will not stay so" in caplog.text
