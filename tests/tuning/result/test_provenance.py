"""A run's folder says what it was made of: every setting, the data, the rows, the split; and it is repeated from that."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fleetune
from command_line import FEW
from fleetune import models
from fleetune.common import files
from fleetune.errors import ModelError
from fleetune.models.net.model import named_tensors
from fleetune.tuning import methods
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.defaults import settled
from fleetune.tuning.result import foundations

OPTIONS: dict[str, Any] = FEW | {"max_length": 48}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and a run of either kind."""
    folder = tmp_path_factory.mktemp("provenance")
    models.tiny_llama().save(folder / "tiny")
    rows = [{"instruction": f"count to {i}", "response": f"one to {i}"} for i in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tune("fedit", {"r": 2, "steps": 1})
        tune("mezo", {"tau": 1, "lr": 1e-3})
    return folder


@pytest.fixture
def at(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def tune(method: str, settings: dict[str, Any], **more: Any) -> fleetune.TuneResult:
    return fleetune.tune("tiny", "data.jsonl", method=method, settings=settings, **(OPTIONS | more))


def folder_of(method: str) -> Path:
    return next(Path("runs").glob(f"000?-{method}-tiny"))


@pytest.mark.parametrize("method", ["fedit", "mezo"])
def test_run_toml_has_every_setting_and_repeats_the_run(at, method, tmp_path):
    run = folder_of(method)
    stated = tomllib.loads((run / "run.toml").read_text())["set"]
    assert set(stated) == {s.name for s in methods.settings(method)}
    again = fleetune.tune(recipes.make(recipes.read(run / "run.toml")), out=tmp_path)
    assert again.digest == digest_of(run)


def digest_of(run: Path) -> str:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return str(events[-1]["digest"])


def test_what_stands_for_another_value_is_written_out_and_means_the_same():
    chosen = {"server": "adam", "module": "prompt"}
    plain = recipes.make({"model": "m", "data": "d", "method": "fedpetuning", "set": chosen})
    full = settled(plain)
    assert [full.set[name] for name in ("size", "server_lr", "lr")] == [20, 1e-3, 3e-2]
    assert full.clients == methods.entry("fedpetuning").clients
    assert settled(full) == full
    by_column = dataclasses.replace(plain, partition="column:role")
    assert settled(by_column).clients == 0


def test_env_json_has_the_digests_of_the_file_the_rows_and_the_split(at):
    env = files.read_json(folder_of("fedit") / "env.json", "")
    assert env["data_sha256"] == {"data.jsonl": hashlib.sha256(Path("data.jsonl").read_bytes()).hexdigest()}
    recipe = recipes.make(recipes.read(folder_of("fedit") / "run.toml"))
    parts = prepare.split(recipe, methods.entry("fedit"))
    sha = hashlib.sha256()
    for part in (parts.held, *parts.clients):
        sha.update(b"part" + part.astype("<i8").tobytes())
    assert env["split_sha256"] == sha.hexdigest()
    stands_on = foundations.of_job(prepare.prepare(recipe))
    assert (env["rows_sha256"], env["held_out_sha256"]) == (stands_on.rows, stands_on.held_out)
    assert {"tokenizers", "jinja2", "threads"} <= set(env)


@pytest.mark.parametrize("method", ["fedit", "mezo"])
def test_a_tuned_model_is_saved_whole_or_says_how(at, method, tmp_path):
    from transformers import AutoModelForCausalLM

    model = fleetune.open(str(folder_of(method))).load()
    inside = model.net.get_submodule("model")
    calls = {
        "state_dict": (model.net.state_dict, inside.state_dict),
        "save_pretrained": (lambda: model.net.save_pretrained(tmp_path / "lost"),),
        "copy.deepcopy": [partial(copy.deepcopy, what) for what in (model.net, inside, model)],
        "torch.save": (lambda: torch.save(model.net, io.BytesIO()),),
    }
    for name, ways in calls.items():
        for way in ways:
            with pytest.raises(ModelError, match=f"{name} would lose the tuning") as refused:
                way()
            assert "model.save(FOLDER)" in (refused.value.hint or "")
    assert not (tmp_path / "lost").exists()
    base = dict(named_tensors(models.load("tiny").net))
    assert model.save(tmp_path / "saved") == tmp_path / "saved"
    with pytest.raises(ModelError, match="exists already"):
        model.save(tmp_path / "saved")
    loaded = dict(named_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")))
    own = dict(named_tensors(model.net))
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[n], loaded[n]) for n in own)
    assert any(not torch.equal(own[n], base[n]) for n in own)
    assert model.digest == models.digest(named_tensors(model.net))
    if method == "mezo":
        assert model.digest == digest_of(folder_of(method))
    copied = copy.deepcopy(model.net)
    assert len(copied.state_dict()) == len(model.net.state_dict())
