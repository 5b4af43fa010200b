# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING.md's worked example is a method like any other: listed, tuned with, resumed, reported."""

from __future__ import annotations

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from contract_harness import fleet, key, logits, reply

from fleetune import models
from fleetune.cli.main import main
from fleetune.common import registry
from fleetune.tuning import methods
from fleetune.tuning.messages import Payload

ROOT = Path(__file__).parent.parent


@pytest.fixture
def fedmedian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "\nclass Method" in c]
    (tmp_path / "fedmedian_example.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("fedmedian", "fedmedian_example", wanted := methods.REGISTRY.group)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == wanted else [])
    return "fedmedian"


def test_the_example_tunes(fedmedian, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, tmp_path / "tiny")
    args = [
        "tune",
        "./tiny",
        "demo",
        "--method",
        fedmedian,
        "--set",
        "lr=1e-2",
        "--clients",
        "3",
        "--rounds",
        "2",
    ]
    assert main([*args, "--limit", "60", "--max-length", "96", "--samples", "0", "--json"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["tuned"]["loss"] < done["base"]["loss"]
    assert (Path(done["result"]) / "adapter_model.safetensors").exists()
    assert main(["methods", fedmedian]) == 0
    assert "Yin et al." in capsys.readouterr().out


def test_the_example_keeps_the_first_contract_and_its_promise(fedmedian):
    model, chosen = models.tiny_llama(), methods.make(fedmedian, {"lr": "1e-2"})
    state = chosen.init(model, key())
    good = reply(fleet(model, chosen), chosen, state)
    on_the_device = logits(model)
    chosen.apply(model, chosen.aggregate(state, iter([good])))
    assert torch.equal(logits(model), on_the_device)
    wild = Payload({n: np.full_like(a, 1e6) for n, a in good.payload.arrays.items()}, good.payload.scalars)
    three = chosen.aggregate(state, iter([good, good._replace(payload=wild), good]))
    assert all(np.array_equal(three.tensors[n], a) for n, a in good.payload.arrays.items())
