"""CONTRIBUTING.md's worked example, registered by another package, is a method like any other: everywhere."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import contract_harness
import pytest
import test_contract
from safetensors.numpy import load_file

from command_line import ok
from fleetune import models
from fleetune.cli.main import main
from fleetune.common import registry
from fleetune.tuning import methods

ROOT = Path(__file__).parents[2]


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Register a module of this text as the method fedmedian, as an installed package would."""

    def register(code: str) -> str:
        (tmp_path / "fedmedian_example.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        point = EntryPoint("fedmedian", "fedmedian_example", methods.REGISTRY.group)
        monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
        monkeypatch.setitem(contract_harness.QUICK, "fedmedian", {"lr": 1e-2})
        return "fedmedian"

    yield register
    sys.modules.pop("fedmedian_example", None)


@pytest.fixture
def fedmedian(registered: Callable[[str], str]) -> str:
    return registered(example())


def example() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "\nclass Method" in c]
    return code


def test_the_example_tunes(fedmedian, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models.tiny_llama().save(tmp_path / "tiny")
    args = ["--method", fedmedian, "--set", "lr=1e-2", "--clients", "3", "--rounds", "2"]
    done = ok(
        capsys, "tune", "./tiny", "demo", *args, "--limit", "60", "--max-length", "96", "--samples", "0"
    )[-1]
    assert done["tuned"]["loss"] < done["base"]["loss"]
    assert (Path(done["result"]) / "adapter_model.safetensors").exists()
    assert main(["methods", fedmedian]) == 0
    assert "Yin et al." in capsys.readouterr().out


PROPERTIES = [
    check
    for name, check in vars(test_contract).items()
    if name.startswith("test_")
    and name != "test_5c_more_rows_weigh_more"  # of means; a median gives every client one vote
    and name != "test_7b_defaults_are_the_papers"  # of methods whose papers' defaults are listed there
]


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_the_example_keeps_the_contract(fedmedian: str, tmp_path: Path, check: Callable[..., None]) -> None:
    more = {"tmp_path": tmp_path} if "tmp_path" in inspect.signature(check).parameters else {}
    check(name=fedmedian, **more)


def test_the_example_is_listed_and_planned(fedmedian, tmp_path, capsys):
    assert fedmedian in [event.get("name") for event in ok(capsys, "methods")]
    models.tiny_llama().save(tmp_path / "tiny")
    told = ok(capsys, "plan", tmp_path / "tiny")
    rows = {event["method"]: event for event in told if event["event"] == "plan"}
    assert set(rows) >= {fedmedian, "fedit", "fedkseed", "inference"}
    assert rows[fedmedian]["note"] == "r=8"
    assert rows[fedmedian]["trainable"] * 2 == rows["fedit"]["trainable"]
    assert list(rows).index(fedmedian) < list(rows).index("inference")


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
    models.tiny_llama().save(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_compressor_compresses(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compress", "--list", "magnitude"]) == 0
    assert "share of each row" in capsys.readouterr().out
    folder = ok(capsys, "compress", "./tiny", "--method", "magnitude", "--set", "sparsity=0.25")[-1]["folder"]
    assert main(["export", folder, "--to", "hf", "--path", "small"]) == 0
    matrix = load_file("small/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert ((matrix == 0).sum(axis=1) == matrix.shape[1] // 4).all()


def test_the_command_counts(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["count", "./tiny"]) == 0
    assert f"{models.load('./tiny').n_params:,}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "count the weights" in capsys.readouterr().out
