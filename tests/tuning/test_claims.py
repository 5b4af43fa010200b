# SPDX-License-Identifier: Apache-2.0
"""Liars that claim rows which they do not have, on a real model: `python -m benchmarks.liars .. --claims` in small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # the benchmarks are no package of the wheel

from benchmarks import liars

from fleetune.data import Example, encode_rows
from fleetune.models import Model, tiny_llama

ANY = 2**31 - 1
CLAIMS = [(1, 3.0, 0), (1, 3.0, ANY), (1, 1.0, ANY)]


@pytest.fixture(scope="module")
def fleet() -> tuple[Model, liars.Rows]:
    """A model, the rows of six clients, and those held out."""
    torch.set_num_threads(1)
    model = tiny_llama()
    words = ["one two three four", "five six seven eight", "nine ten one two"]
    rows = [Example((("user", f"count {i % 3}"),), words[i % 3], {}) for i in range(6 * 8 + 6)]
    encoded, _ = encode_rows(model, rows, 48)
    return model, [*(encoded[c:48:6] for c in range(6)), encoded[48:]]


def after(
    fleet: tuple[Model, liars.Rows], rule: str, count: int, factor: float, claim: int
) -> tuple[float, float]:
    """The loss before and after."""
    lie = liars.at_the_bound(factor) if count else None
    found = liars.played(*fleet, "fedit epochs=1", lie, rule, count, claim)
    assert found["refused_honest"] == 0
    return found["before"], found["after"]


def test_a_mean_of_any_weights_is_the_liars(fleet: tuple[Model, liars.Rows]) -> None:
    before, lost = after(fleet, "mean", 1, 3.0, ANY)
    assert lost > before + 0.1


@pytest.mark.parametrize(("count", "factor", "claim"), CLAIMS)
def test_with_bounded_weights_one_liar_of_six_does_not_turn_the_fleet(
    fleet: tuple[Model, liars.Rows], count: int, factor: float, claim: int
) -> None:
    before, tuned = after(fleet, "mean:1", count, factor, claim)
    assert tuned < before


@pytest.mark.parametrize(("count", "factor", "claim"), [*CLAIMS, (2, 3.5, 0), (2, 3.5, ANY)])
def test_clipped_and_counted_once_two_liars_of_six_do_not(
    fleet: tuple[Model, liars.Rows], count: int, factor: float, claim: int
) -> None:
    before, honest = after(fleet, "norm-clip", 0, 0.0, 0)
    _, tuned = after(fleet, "norm-clip", count, factor, claim)
    assert before - tuned > (before - honest) / 4
    assert after(fleet, "norm-clip", count, factor, 0)[1] == tuned  # whatever is claimed
