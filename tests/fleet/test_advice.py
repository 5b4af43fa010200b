# SPDX-License-Identifier: Apache-2.0
"""The server's one line about the plain mean."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fleetune.fleet.server import advice
from fleetune.tuning import methods
from fleetune.tuning.robust import REDUCE


def job(method: str, aggregation: str = "mean", **values: Any) -> Any:
    """What is known of a run."""
    return SimpleNamespace(
        recipe=SimpleNamespace(aggregation=aggregation), method=methods.make(method, values)
    )


def test_with_keys_and_five_devices_a_rule_is_named_that_fits() -> None:
    first = next(iter(REDUCE))
    assert f"all 5 devices; where some may lie, serve with --aggregation {first}" in advice(
        job("fedit"), 5, registered=True
    )
    assert "--aggregation norm-clip" in advice(job("fwdllm"), 8, registered=True)
    assert "--aggregation sign-vote" in advice(job("onebyte", wire="sign"), 8, registered=True)


@pytest.mark.parametrize(
    ("told", "count", "registered"),
    [
        (job("fedit"), 4, True),
        (job("fedit"), 5, False),
        (job("fedit", "median"), 5, True),
        (job("fedit", average="product"), 5, True),
    ],
)
def test_else_nothing_is_said(told: Any, count: int, registered: bool) -> None:
    assert advice(told, count, registered=registered) == ""
