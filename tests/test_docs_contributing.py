# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING.md's compressor and command work as they stand there, registered by another package."""

from __future__ import annotations

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from fleetune import models
from fleetune.cli.main import main
from fleetune.common import registry

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
EXAMPLES = {"fleetune.compressors": ("magnitude", "\nclass Solver"), "fleetune.commands": ("count", "\nHELP")}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, where the examples are registered."""
    points = {}
    for group, (name, mark) in EXAMPLES.items():
        (code,) = [block for block in BLOCKS if mark in block]
        (tmp_path / f"{name}_example.py").write_text(code, encoding="utf-8")
        points[group] = [EntryPoint(name, f"{name}_example", group)]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "entry_points", lambda group: points.get(group, []))
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_compressor_compresses(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compress", "--list", "magnitude"]) == 0
    assert "share of each row" in capsys.readouterr().out
    words = ["compress", "./tiny", "--method", "magnitude", "--set", "sparsity=0.25", "--json"]
    assert main(words) == 0
    folder = json.loads(capsys.readouterr().out.splitlines()[-1])["folder"]
    assert main(["export", folder, "--to", "hf", "--path", "small"]) == 0
    matrix = load_file("small/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert ((matrix == 0).sum(axis=1) == matrix.shape[1] // 4).all()


def test_the_command_counts(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["count", "./tiny"]) == 0
    assert f"{models.load('./tiny').n_params:,}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "count the weights" in capsys.readouterr().out
