# SPDX-License-Identifier: Apache-2.0
"""The plan counts the memory and the time of the kernels that this device's owner has chosen."""

from __future__ import annotations

import pytest

from fleetune import seeds
from fleetune.models import shapes, tiny_llama
from fleetune.planning import device_cost, plan


@pytest.mark.parametrize(("word", "counted"), [("auto", 104), ("numba", 104), ("torch", 10)])
def test_the_plan_counts_the_memory_of_the_chosen_kernels(
    monkeypatch: pytest.MonkeyPatch, word: str, counted: int
) -> None:
    monkeypatch.setenv(seeds.VARIABLE, word)
    rows = plan.table(tiny_llama().net.config, device_cost.Workload(), rates=device_cost.Rates(1e11, 1e10))
    floor = {row.method: row.parts["floor"] for row in rows}
    for name in ("mezo", "zosgd", "fedkseed", "onebyte"):
        assert floor[name] - floor["inference"] == counted * device_cost.MIB
    assert floor["full SGD"] == floor["inference"]


def test_the_plan_counts_the_time_of_the_chosen_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    config, work, rates = (
        tiny_llama().net.config,
        device_cost.Workload(steps=5),
        device_cost.Rates(1e11, 1e10),
    )
    seconds = {}
    for word in ("auto", "numba", "torch"):
        monkeypatch.setenv(seeds.VARIABLE, word)
        seconds[word] = {row.method: row.seconds for row in plan.table(config, work, rates=rates)}
    assert seconds["auto"] == seconds["numba"]
    more = device_cost.SWEEP["torch"] - device_cost.SWEEP["numba"]
    weights = 4 * shapes.shape_of(config).params
    assert seconds["torch"]["mezo"] - seconds["numba"]["mezo"] == pytest.approx(5 * 2 * more * weights / 1e10)
    assert seconds["torch"]["full SGD"] == seconds["numba"]["full SGD"]
