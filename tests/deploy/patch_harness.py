# SPDX-License-Identifier: Apache-2.0
"""What tests of patches share: a mapped model of a GGUF file, and a ledger on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fleetune import models
from fleetune.models.net.model import Model
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.view import View
from fleetune.tuning.methods import _zeroth


def visible(folder: Path) -> list[str]:
    """The files of a folder, hidden ones as well."""
    return sorted(p.name for p in folder.iterdir())


def load(file: Path) -> Model:
    model = models.load(str(file), device="cpu", base="mapped")
    model.trains = "scales"
    return model


def ledger_on(file: Path) -> tuple[Ledger, str]:
    """A ledger of 40 steps, and the digest of the weights that it leads to."""
    model = load(file)
    made = _zeroth.new_ledger(
        model,
        5,
        law="hashed",
        K=64,
        lr=0.02,
        eps=0.01,
        rule="constant",
        method="mezo",
        hyper={},
        aggregation="mean",
    )
    rng = np.random.default_rng(1)
    made = made.append(np.arange(40, dtype=np.uint64), rng.integers(-90, 90, 40), 1)
    view = _zeroth.place_at(model, made)
    assert isinstance(view, View)
    digest = models.digest(view.pieces())
    return made.with_check(1, digest), digest
