# SPDX-License-Identifier: Apache-2.0
"""Folded sums change the time that independent directions take, never a bit of the point."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fleetune import models
from fleetune.seeds import weights as views
from fleetune.seeds.noise import passes, probe
from fleetune.seeds.view import View


def view_of(model: models.Model, law: str = "rademacher") -> View:
    return View(models.named_tensors(model.net), model.net, run_key=99, law=law, grid=float(np.float32(3e-6)))


def point(law: str, K: int, count: int, seed: int, scale: int = 3000):
    rng = np.random.default_rng(seed)
    ids = (rng.integers(0, count, 3 * count).astype(np.uint64) << np.uint64(32)) | rng.integers(
        0, K, 3 * count
    ).astype(np.uint64)
    return passes(law, K, ids, rng.integers(-scale, scale, 3 * count))


def digest(view: View) -> str:
    return models.digest(view.tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("law", "K"), [("rademacher", 1), ("hashed", 8)])
def test_a_walk_of_points_has_the_bits_of_plain_passes(dtype, law, K):
    model = models.tiny_llama()
    model.net.to(dtype)
    view = view_of(model, law)
    direction = probe(law, K, 5)
    # many passes, a few more, many others, fewer than are worth folding, none
    for count, seed in ((60, 0), (61, 0), (64, 1), (70, 2), (3, 3), (0, 4), (30, 5)):
        at = point(law, K, count, seed) if count else None
        view.place(at, fold=False)
        plain = digest(view)
        view.probe(direction, 1e-3)
        plain_probe = digest(view)
        view.probe(None)
        view.place(at)
        assert digest(view) == plain
        view.probe(direction, 1e-3)
        assert digest(view) == plain_probe
        view.probe(None)


def test_many_passes_are_folded_and_few_are_computed():
    view = view_of(models.tiny_llama())
    first = point("rademacher", 1, 60, 0)
    view.place(first)
    assert view.point is None
    assert view.folded.sums
    more = passes("rademacher", 1, np.append(first.ids, np.uint64(7)), np.append(first.tables[:, 0], 5))
    view.place(more)
    assert view.point is not None
    assert view.point.ids.tolist() == [7]
    view.folded.forget()
    assert not view.folded.sums


def test_sums_that_could_pass_2_to_24_are_not_folded(monkeypatch):
    model = models.tiny_llama()
    view = view_of(model)
    big = point("rademacher", 1, 40, 1, scale=1 << 22)
    view.place(big, fold=False)
    plain = digest(view)
    view.place(big)
    assert not view.folded.sums
    assert digest(view) == plain


def test_difference_leads_from_one_point_to_the_other():
    a, b = point("hashed", 4, 9, 0), point("hashed", 4, 9, 1)
    left = views.difference(b, a)
    for id in np.union1d(a.ids, b.ids):
        rows = [p.tables[p.ids == id].sum(axis=0) for p in (a, b, left)]
        assert np.array_equal(rows[0] + rows[2], rows[1])
    assert len(views.difference(a, a).ids) == 0
