# SPDX-License-Identifier: Apache-2.0
"""The choice of kernels by the device's owner: what it refuses, what it leaves unloaded, and that results are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fleetune import models, seeds
from fleetune.cli.main import main
from fleetune.errors import UsageError
from fleetune.models import shapes, tiny_llama
from fleetune.planning import device_cost, plan
from fleetune.seeds.weights import kernels

CPU, META = torch.device("cpu"), torch.device("meta")

# A run with a ledger and its replay; the digests, and whether Numba came in.
WORK = """
import contextlib, io, json, sys
from fleetune.cli import main as cli

model, data, out = sys.argv[1:]
said = io.StringIO()
with contextlib.redirect_stdout(said):
    command = ["tune", model, data, "--method", "fedkseed", "--set", "K=8", "--set", "tau=2", "--set", "batch_size=2"]
    few = ["--rounds", "1", "--clients", "1", "--eval-rows", "2", "--rouge-rows", "0", "--samples", "0"]
    assert cli.main([*command, *few, "--out", out, "--json", "--quiet"]) == 0
    done = json.loads(said.getvalue().splitlines()[-1])
    assert cli.main(["ledger", "replay", done["run"], "--json"]) == 0
replay = json.loads(said.getvalue().splitlines()[-1])
found = [done["digest"], replay["digest"], done["base"], done["tuned"]]
print(json.dumps({"found": found, "numba": "numba" in sys.modules}))
"""


def _work(folder: Path, wanted: str) -> dict:
    model = tiny_llama()
    models.save(model.net, model.tokenizer, folder / "model")
    rows = [{"instruction": f"say {i}", "response": f"{i} it is"} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable,
        "-c",
        WORK,
        *map(str, (folder / "model", folder / "rows.jsonl", folder / "runs")),
    ]
    done = subprocess.run(
        command, env=os.environ | {seeds.VARIABLE: wanted}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_either_kernels_give_the_same_digests_and_torchs_load_no_numba(tmp_path):
    one, other = (_work(tmp_path / wanted, wanted) for wanted in ("numba", "torch"))
    assert (one["numba"], other["numba"]) == (True, False)
    assert one["found"] == other["found"]
    assert one["found"][0] == one["found"][1]


@pytest.mark.parametrize(
    ("word", "device", "want"),
    [
        (None, CPU, "numba"),
        ("", CPU, "numba"),
        ("auto", CPU, "numba"),
        ("numba", CPU, "numba"),
        ("torch", CPU, "torch"),
        (None, META, "torch"),
        ("auto", META, "torch"),
        ("torch", META, "torch"),
    ],
)
def test_the_environment_chooses(monkeypatch, word, device, want):
    monkeypatch.delenv(seeds.VARIABLE, raising=False)
    if word is not None:
        monkeypatch.setenv(seeds.VARIABLE, word)
    assert kernels(device).__name__ == f"fleetune.seeds.kernels_{want}"


def test_what_a_caller_asks_for_goes_before_the_environment(monkeypatch):
    for word, other in (("numba", "torch"), ("torch", "numba")):
        monkeypatch.setenv(seeds.VARIABLE, word)
        assert kernels(CPU, other).__name__ == f"fleetune.seeds.kernels_{other}"


def test_numba_where_it_cannot_be_is_refused(monkeypatch):
    monkeypatch.setenv(seeds.VARIABLE, "numba")
    with pytest.raises(UsageError, match="on meta") as error:
        kernels(META)
    assert "FLEETUNE_KERNELS=auto" in error.value.hint
    monkeypatch.setitem(sys.modules, "fleetune.seeds.kernels_numba", None)  # as if Numba were not there
    with pytest.raises(UsageError, match="not usable here"):
        kernels(CPU)
    monkeypatch.setenv(seeds.VARIABLE, "auto")
    assert kernels(CPU).__name__ == "fleetune.seeds.kernels_torch"


def test_another_word_is_refused_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(seeds.VARIABLE, "moon")
    assert main(["tune", "no such model", "no such data", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no kernels named 'moon'" in said
    assert "FLEETUNE_KERNELS to auto, numba or torch" in said
    with pytest.raises(UsageError, match="moon"):
        kernels(CPU)


@pytest.mark.parametrize(("word", "counted"), [("auto", 104), ("numba", 104), ("torch", 10)])
def test_the_plan_counts_the_chosen_kernels(monkeypatch, word, counted):
    monkeypatch.setenv(seeds.VARIABLE, word)
    rows = plan.table(tiny_llama().net.config, device_cost.Workload(), rates=device_cost.Rates(1e11, 1e10))
    floor = {row.method: row.parts["floor"] for row in rows}
    for name in ("mezo", "zosgd", "fedkseed", "onebyte"):
        assert floor[name] - floor["inference"] == counted * device_cost.MIB
    assert floor["full SGD"] == floor["inference"]


def test_the_plan_counts_the_time_of_the_chosen_kernels(monkeypatch):
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
