"""A run, an adapter or a compressed model given as MODEL is refused at once, with the command that makes a plain model of it."""

import contextlib
import json
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fleetune
from command_line import FEW, said
from fleetune import models
from fleetune.api import tuning
from fleetune.cli.main import main

QUICK: Any = {**FEW, "method": "fedit", "settings": {"r": 2, "steps": 1}, "limit": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a run of it, and codes of it."""
    folder = tmp_path_factory.mktemp("plain")
    models.tiny_llama().save(folder / "tiny")
    with contextlib.chdir(folder):
        fleetune.tune("tiny", "demo", **QUICK)
        fleetune.compress("tiny", method="rtn", settings={"group": 8})
    return folder


@pytest.fixture(autouse=True)
def at(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


RUN, CODES = "runs/0001-fedit-tiny", "runs/0002-rtn-tiny"
refused = partial(said, code=2)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        *((name, "is a run") for name in ("1", RUN, "0001-fedit-tiny", f"{RUN}/adapter")),
        *((name, "is a compressed model") for name in ("latest", CODES, f"{CODES}/model")),
    ],
)
def test_the_command_that_is_named_makes_the_model_that_is_named(model, what):
    said = refused("tune", model, "demo", "--method", "fedit")
    assert what in said
    assert "hub" not in said
    command, _, rest = said.partition("try: ")[2].partition("   and then give ")
    place = rest.split()[0]
    assert not Path(place).exists()
    assert main([*shlex.split(command)[1:], "-qq"]) == 0
    try:
        tuning.check_plain(place, Path("runs"))
        assert models.load(place).n_params == models.load("tiny").n_params
        again = refused("tune", model, "demo")
        assert f"written out already: give {place} as the model" in again
    finally:
        shutil.rmtree(place)


def test_every_command_that_tunes_says_it(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'model = "{RUN}"\ndata = "demo"\nmethod = "fedit"\n')
    lines = [f"tune -c {recipe}", f"tune -c {recipe} --dry-run", f"sweep {recipe} --vary r=2,4"]
    for line in (*lines, f"fleet serve -c {recipe}", f"plan {RUN}"):
        assert f"fleetune export {RUN} --to hf" in refused(*line.split()), line
    recipe.write_text(f'model = "{CODES}"\ndata = "demo"\nmethod = "mezo"\n')
    assert "is a compressed model: codes" in refused("fleet", "serve", "-c", str(recipe), "--port", "0")


def test_what_was_exported_is_taken_as_it_is(tmp_path):
    (run,) = fleetune.list_runs()
    written = fleetune.export(run, to="hf", path=tmp_path / "hf")
    again = fleetune.tune(written, "demo", out=tmp_path / "runs", **QUICK)
    assert fleetune.open(again).recipe.model == str(tmp_path / "hf")
    assert again.done.base["loss"] == pytest.approx(run.done.tuned["loss"], abs=1e-4)


def test_a_folder_of_peft_is_refused_with_where_it_is_told(tmp_path):
    (run,) = fleetune.list_runs()
    shutil.copytree(run.folder / "adapter", tmp_path / "mine")
    said = refused("tune", str(tmp_path / "mine"), "demo")
    assert "is an adapter, not a model" in said
    assert "fleetune help models#tuning-on-from-an-adapter" in said


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT itself
def test_every_command_says_that_an_adapter_is_merged_first(place, tmp_path):
    (run,) = fleetune.list_runs()
    mine = str(tmp_path / "mine")
    shutil.copytree(run.folder / "adapter", mine)
    name_base(Path(mine), str(place / "tiny"))
    told = set()
    plain = [[verb, mine] for verb in ("export", "compress", "plan", "chat", "measure", "serve")]
    more = [["tune", mine, "demo"], ["eval", mine, "demo"], ["export", mine, "--to", "gguf:f16"]]
    for words in (*plain, *more):
        said = refused(*words)
        assert "is an adapter, not a model: its base without it is another model" in said, words
        told.add(said.partition("python -c ")[2])
    (rest,) = told
    code = shlex.split("python -c " + rest)[2]
    (tmp_path / "work").mkdir()
    with contextlib.chdir(tmp_path / "work"):
        exec(code, {})  # as it is to be pasted
        merged = models.load("merged")
    net = fleetune.open(RUN).load().net
    assert merged.tokenizer.get_vocab() == models.load("tiny").tokenizer.get_vocab()
    ids = torch.arange(24)[None]
    assert torch.allclose(merged.net(ids).logits, net(ids).logits, atol=1e-5)
    assert not torch.allclose(merged.net(ids).logits, models.load("tiny").net(ids).logits, atol=1e-5)


def name_base(adapter: Path, base: str) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
