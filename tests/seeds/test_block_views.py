# SPDX-License-Identifier: Apache-2.0
"""A view of a quantised base: pieces, and both signs in one forward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_harness import BLOCKS, gguf_of

from fleetune import models
from fleetune.data import Batch
from fleetune.models.net.model import Model
from fleetune.seeds import descent
from fleetune.seeds.noise import passes, probe
from fleetune.seeds.scale_view import view_on
from fleetune.seeds.view import View

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module", params=BLOCKS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a GGUF file of each kind of blocks."""
    return gguf_of(tmp_path_factory.mktemp("gguf"), request.param)


def moved(file: Path, dtype: str = "fp32") -> tuple[Model, View]:
    """A model, and a view of it at a point."""
    model = models.load(str(file), device="cpu", base="mapped", dtype=dtype)
    model.trains = "scales"
    view = view_on(model, run_key=11, law="hashed", grid=1e-5)
    coefficients = np.random.default_rng(3).integers(-2000, 2000, 5)
    view.place(passes("hashed", 64, np.arange(5, dtype=np.uint64), coefficients))
    return model, view


def test_a_piece_is_part_of_the_whole_wherever_it_begins(file: Path) -> None:
    _, view = moved(file)
    for slot in view.slots[:3]:
        whole = view.whole(slot).view(-1)
        for first, last in ((0, 1), (5, 70), (63, 64), (64, 192), (1, len(whole))):
            assert torch.equal(view.piece(slot, first, last), whole[first:last])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_signs_in_one_forward_are_two_forwards(dtype: str, file: Path) -> None:
    model, view = moved(file, dtype)
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    batch, direction = Batch(ids, torch.ones_like(ids), ids), probe("hashed", 64, 3)
    with torch.inference_mode():
        two = descent.two_point(view, direction, 0.02, lambda: descent.batch_loss(model, batch))
        assert descent._in_one_forward(model, view, direction, batch, 0.02) == two
    assert two[0] != two[1]
