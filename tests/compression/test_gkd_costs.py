# SPDX-License-Identifier: Apache-2.0
"""What distillation takes of memory and disk: as it is planned, said and measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_harness import call

from fleetune import compression, models
from fleetune.common import memory
from fleetune.compression.pruning import depth
from fleetune.models.shapes import shape_of
from fleetune.planning import compression_cost


def test_the_plan_of_distillation_counts_every_model_and_the_training() -> None:
    model, other = models.tiny_llama(layers=4, hidden=64), models.tiny_llama(layers=2, hidden=64)

    def peak(teacher: models.Model = model, length: int = 32, **values: Any) -> int:
        made: Any = compression.make("gkd", {"teacher": "t", "lmbda": 0, "batch_size": 2, **values})
        return int(made.memory(model, teacher, length))

    def params(m: models.Model) -> int:
        return sum(p.numel() for p in m.net.parameters())

    block = sum(p.numel() for p in model.net.model.layers[0].parameters())
    halved = peak(keep_layers=2)  # half of the model beside it, which teaches
    parts = compression_cost.training(shape_of(model.net.config), 2, 32, 0)
    assert parts["weights"] == parts["gradients"] == parts["optimizer"] // 2 == 4 * params(model)
    assert peak(other) - sum(parts.values()) == 4 * params(other)
    assert peak(other, keep_layers=2) - halved == 4 * params(other)
    few = compression_cost.training(shape_of(depth.shallow(model.net, 2).config), 2, 32, 0)
    assert few["weights"] == 4 * (params(model) - 2 * block)
    assert halved == sum(few.values()) + 4 * params(model)
    longer = peak(keep_layers=2, lmbda=0.5, max_new_tokens=48)  # with the student's own answers
    assert longer == peak(keep_layers=2, length=80) > halved
    assert peak(keep_layers=2, batch_size=4) == peak(
        keep_layers=2, batch_size=1, lmbda=1, max_new_tokens=1, length=31, reward="f1", reward_samples=4
    )


def test_distillation_says_what_it_takes_and_what_is_missing(
    at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        x
        for s in ("teacher=same", "keep_layers=2", "lmbda=0", "steps=3", "save_every=1")
        for x in ("--set", s)
    ]
    model = models.tiny_llama(layers=3)
    models.save(model.net, model.tokenizer, at / "m")
    args = ["compress", str(at / "m"), "--method", "gkd", "--data", "demo", *given]
    code, events, err = call(capsys, *args, "--dry-run")
    assert code == 0
    assert "memory: about 4" in err
    code, events, err = call(capsys, *args)
    assert code == 0, err
    assert events[-1]["planned"] == events[0]["planned"] > 4e8
    assert "of memory are free" not in err
    made = models.load(str(at / "runs/0001-gkd-m/model"), device="cpu")
    weights = 4 * sum(p.numel() for p in made.net.parameters())
    used = SimpleNamespace(free=6 * weights - 2000)  # two states of three copies; the record is there already
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: used)
    monkeypatch.setattr(compression_cost, "available", lambda: 1000)
    monkeypatch.setattr(memory, "rss", lambda: 0)
    code, events, err = call(capsys, *args)
    assert code == 1
    assert "1.0 kB of memory are free; with a smaller batch_size it takes less" in err
    assert "the state that is kept and the result take" in events[-1]["message"]
    assert "fleetune compress --resume runs/0002-gkd-m" in events[-1]["hint"]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=6 * weights))
    code, _, err = call(capsys, *args)
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["teacher=same", "keep_layers=15"], ["teacher=smollm2-135m"]])
def test_the_planned_memory_of_distillation_is_that_of_the_real_model(
    settings: list[str], tmp_path: Path
) -> None:
    given = [x for s in [*settings, "lmbda=0", "steps=2", "batch_size=4"] for x in ("--set", s)]
    command = [
        sys.executable,
        "-m",
        "fleetune",
        "compress",
        "smollm2-135m",
        "--method",
        "gkd",
        "--data",
        "demo",
    ]
    done = subprocess.run(
        [*command, "--length", "128", *given, "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["planned"] == pytest.approx(told["peak_rss"], rel=0.1)
