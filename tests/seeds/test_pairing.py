# SPDX-License-Identifier: Apache-2.0
"""Both signs of a probe in one forward: the losses of two forwards bit for bit, from one read of the base."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fleetune import models
from fleetune.data import Batch, Encoded, collate
from fleetune.evaluation import objectives
from fleetune.evaluation.losses import batch_loss
from fleetune.models import Model, named_tensors
from fleetune.seeds import descent
from fleetune.seeds import view as view_module
from fleetune.seeds import weights as views
from fleetune.seeds.descent import slope, two_point
from fleetune.seeds.noise import LAWS, passes, probe, run_key
from fleetune.seeds.view import Unpaired, View
from fleetune.seeds.weights import WeightSlot, read_stored

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import tiny_families

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
EPS, K = 1e-2, 16


def rows(count: int = 3) -> Batch:
    """Rows of different lengths, so that some are padded."""
    return collate([Encoded(np.arange(5 + i, 17 + 2 * i, dtype=np.int32), 4) for i in range(count)], 0, "cpu")


def view_of(model: Model, law: str = "hashed", many: int = 1) -> View:
    """A view of a model somewhere, `many` passes away from its base."""
    view = View(named_tensors(model.net), model.net, run_key=run_key(b"12345678"), law=law, grid=1e-5)
    size = K if law == "hashed" else 1
    ids = np.arange(many, dtype=np.uint64) << np.uint64(32)
    view.place(passes(law, size, ids, np.arange(1, many + 1, dtype=np.int64)))
    return view


def both_ways(model: Model, view: View, batch: Batch) -> tuple[Any, Any]:
    """(losses of one forward or None, losses of two)."""
    direction = probe(view.law, K if view.law == "hashed" else 1, 7)
    one = descent._in_one_forward(model, view, direction, batch, EPS)
    return one, two_point(view, direction, EPS, functools.partial(batch_loss, model, batch))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("many", [0, 1, 3, 20])  # 20 passes are folded
def test_the_losses_are_those_of_two_forwards(law: str, dtype: torch.dtype, many: int) -> None:
    model = models.tiny_llama(seed=2)
    model.net.to(dtype)
    one, two = both_ways(model, view_of(model, law, many), rows())
    assert one == two
    assert one is not None
    assert one[0] != one[1]


PAIRED = ["llama", "gpt2", "qwen3", "gemma3_text", "gpt_neox", "falcon"]
# experts get rows of their own choice; a mixer reads its convolution's weights; a head with a bias; positions by a mask
APART = ["gpt_oss", "mamba", "phi", "opt"]


@pytest.mark.parametrize("family", [*PAIRED, *APART])
def test_any_family_has_the_losses_of_two_forwards(family: str) -> None:
    net = tiny_families.build(family)
    net.eval().requires_grad_(False)
    tiny = models.tiny_llama()
    model = Model(net, tiny.tokenizer, family, Path(), "", "", "fp32", "cpu")
    view, batch = view_of(model), rows()
    one, two = both_ways(model, view, batch)
    assert one == (two if family in PAIRED else None)
    g, loss = slope(model, view, probe("hashed", K, 7), batch, batch_loss, eps=EPS, clip=0.0)
    assert (g, loss) == ((two[0] - two[1]) / (2 * EPS), (two[0] + two[1]) / 2)
    assert descent._can_pair(view, batch, batch_loss) == (family in PAIRED)
    if family in PAIRED:
        assert slope(model, view, probe("hashed", K, 7), batch, batch_loss, eps=EPS, clip=0.0) == (g, loss)


@pytest.mark.parametrize("chunk", [1 << 20, 1000])
def test_every_weight_is_read_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "CHUNK", chunk)
    model, seen = models.tiny_llama(), dict[str, int]()
    view = view_of(model)

    def read(slot: WeightSlot, first: int, last: int) -> torch.Tensor:
        seen[slot.name] = seen.get(slot.name, 0) + last - first
        return read_stored(slot, first, last)

    view.read = read
    one, two = both_ways(model, view, rows())
    assert one == two
    seen.clear()
    descent._in_one_forward(model, view, probe("hashed", K, 7), rows(), EPS)
    sizes = {s.name: s.tensor.numel() for s in view.slots}
    used, words, width = (
        len(rows().input_ids.unique()),
        model.net.config.vocab_size,
        model.net.config.hidden_size,
    )
    at_once = words <= min(chunk // width, views.CALL * used)
    sizes["lm_head.weight"] += (words if at_once else used) * width  # a tied table
    assert seen == sizes


def test_it_is_taken_where_the_batch_is_small_and_the_objective_is_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = models.tiny_llama(), rows()
    view, forwards = view_of(model), 0

    def counted(*args: Any) -> None:
        nonlocal forwards
        forwards += 1

    model.net.model.register_forward_pre_hook(counted)

    def count(objective: Any = batch_loss) -> int:
        nonlocal forwards
        forwards = 0
        slope(model, view, probe("hashed", K, 7), batch, objective, eps=EPS, clip=0.0)
        return forwards

    assert count() == 3  # a net's first step is taken both ways
    assert count() == 1
    assert count(objectives.get("loss")) == 1
    assert count(lambda model, batch: batch_loss(model, batch)) == 2
    with view.storing():
        assert count() == 2
    monkeypatch.setattr(descent, "PAIRED", batch.labels.numel() - 1)
    assert count() == 2
    monkeypatch.setattr(descent, "PAIRED", 10**6)
    batch = collate(
        [Encoded(np.arange(6, dtype=np.int32), 2) for _ in range(3)], 0, "cpu"
    )  # 6 x 3: which are the rows?
    assert count() == 2


class TokensFirst(torch.nn.Module):
    """An MLP that is run on [tokens, rows, width]."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def test_a_net_whose_first_step_differs_runs_each_sign_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = models.tiny_llama(), rows()
    view = view_of(model)
    two = both_ways(model, view, batch)[1]
    monkeypatch.setattr(descent, "_in_one_forward", lambda *args: (two[0], two[1] + 1e-6))
    expected = ((two[0] - two[1]) / (2 * EPS), (two[0] + two[1]) / 2)
    for _ in range(2):
        assert slope(model, view, probe("hashed", K, 7), batch, batch_loss, eps=EPS, clip=0.0) == expected


def test_rows_that_are_not_first_are_refused_or_not_paired() -> None:
    model = models.tiny_llama()
    for layer in model.net.model.layers:
        layer.mlp = TokensFirst(layer.mlp)
    view = view_of(model)
    batch = rows()
    assert both_ways(model, view, batch)[0] is None
    square = collate([Encoded(np.arange(6, dtype=np.int32), 2) for _ in range(3)], 0, "cpu")
    one, two = both_ways(model, view, square)
    assert one != two  # it could not be told
    assert not descent._can_pair(view, square, batch_loss)


def test_a_view_is_as_before_after_it_failed() -> None:
    model, batch = models.tiny_llama(), rows()
    view = view_of(model)
    before = batch_loss(model, batch)
    bad = batch._replace(input_ids=batch.input_ids + 10**6)
    with pytest.raises((IndexError, ValueError)):
        descent._in_one_forward(model, view, probe("hashed", K, 7), bad, EPS)
    assert view.paired == 0
    assert view.direction is None
    assert batch_loss(model, batch) == before


def test_rows_without_an_answer_have_no_slope() -> None:
    model, batch = models.tiny_llama(), rows()
    nothing = batch._replace(labels=torch.full_like(batch.labels, -100))
    g, loss = slope(model, view_of(model), probe("hashed", K, 7), nothing, batch_loss, eps=EPS, clip=1.0)
    assert np.isnan([g, loss]).all()


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 4)])
def test_ids_of_other_rows_than_the_batchs_are_refused(shape: tuple[int, ...]) -> None:
    view = view_of(models.tiny_llama())
    slot = next(s for s in view.slots if s.tensor.dim() == 2)
    view.probe(probe("hashed", K, 7), EPS)
    with view.pairing(4), pytest.raises(Unpaired):
        view_module._embedding(view, slot, torch.zeros(shape, dtype=torch.int64))
