"""What a run was made of: it is said in its folder, repeated from that, and not gone on with where data or base changed."""

import copy
import hashlib
import io
import json
import shlex
import shutil
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fleetune
from command_line import FEW, Capture
from fleetune import models
from fleetune.cli.main import main
from fleetune.common import files
from fleetune.errors import ModelError
from fleetune.models.net.model import named_tensors
from fleetune.tuning import methods
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.defaults import settled_options
from fleetune.tuning.result import foundations
from fleetune.tuning.run import resume  # noqa: F401  so that it has the `tune` that no test has replaced
from fleetune.tuning.run import run as jobs

RUN = shlex.split(
    "--method fedit --set r=2 --set steps=1 --clients 2 --rounds 1 --held-out 6 --eval-rows 3 "
    "--max-length 48 --samples 0 --device cpu"
)
SWEEP = """\
model = "tiny"
data = "data.jsonl"
method = "fedit"
clients = 2
rounds = 1
held_out = 6
max_length = 48
samples = 0
device = "cpu"
[set]
r = 2
steps = 1
[sweep]
lr = [1e-3, 1e-2]
"""


@pytest.fixture
def changing(place: Path) -> None:
    """A sweep in the working folder, whose data may change."""
    Path("rows.jsonl").rename("data.jsonl")
    Path("sweep.toml").write_text(SWEEP)


def reverse(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[::-1]))


def test_a_run_whose_data_changed_is_not_measured_on_them(changing, capsys):
    assert main(["tune", "tiny", "data.jsonl", *RUN]) == 0
    assert main(["eval", "1", "--tasks", "loss"]) == 0
    shutil.copy("data.jsonl", "kept.jsonl")
    reverse(Path("data.jsonl"))
    capsys.readouterr()
    for words in (["eval", "1", "--tasks", "loss"], ["measure", "1"], ["compress", "1", "--method", "optq"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "data.jsonl was changed since" in said
        assert "other clients' and held-out rows" in said
        assert "fleetune eval runs/0001-fedit-tiny FILE" in said
    # rows that are named are no held-out ones
    assert main(["eval", "1", "data.jsonl", "--tasks", "loss"]) == 0
    shutil.copy("kept.jsonl", "data.jsonl")
    assert main(["eval", "1", "--tasks", "loss"]) == 0


@pytest.fixture
def half(changing: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Callable[[], int]:
    """A sweep of which one of two runs is finished; what continues it."""
    tune = jobs.tune
    begun: list[object] = []

    def once(job: object, run: object, listener: object) -> object:
        begun.append(job)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return tune(job, run, listener)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "tune", once)
    assert main(["sweep", "sweep.toml"]) == 130
    assert "resume: fleetune sweep --resume runs/0001-sweep-sweep\n" in capsys.readouterr().err
    return lambda: main(["sweep", "--resume", "latest"])


@pytest.mark.parametrize("what", ["data", "base"])
def test_a_sweep_that_goes_on_with_other_rows_or_base_says_so(what, half, capsys):
    if what == "data":
        reverse(Path("data.jsonl"))
    else:
        Path("tiny").unlink()
        models.tiny_llama(seed=9).save("tiny")
    capsys.readouterr()
    assert half() == 0
    said = capsys.readouterr().err.replace("\n", " ")
    why = "different rows (the data changed between them)" if what == "data" else "different base models"
    assert why in said
    assert "their losses do not compare" in said


OPTIONS: dict[str, Any] = FEW | {"max_length": 48}


@pytest.fixture(scope="module")
def runs(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("provenance")
    (folder / "tiny").symlink_to(tiny)
    rows = [{"instruction": f"count to {i}", "response": f"one to {i}"} for i in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tune("fedit", {"r": 2, "steps": 1})
        tune("mezo", {"tau": 1, "lr": 1e-3})
    return folder


@pytest.fixture
def made(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)


def tune(method: str, settings: dict[str, Any], **more: Any) -> fleetune.TuneResult:
    return fleetune.tune("tiny", "data.jsonl", method=method, settings=settings, **(OPTIONS | more))


def folder_of(method: str) -> Path:
    return next(Path("runs").glob(f"000?-{method}-tiny"))


@pytest.mark.parametrize("method", ["fedit", "mezo"])
def test_run_toml_has_every_setting_and_repeats_the_run(made, method, tmp_path):
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
    told = {
        "method": "fedpetuning",
        "clients": 0,
        "partition": "iid",
        **{f"set.{n}": v for n, v in chosen.items()},
    }
    full = settled_options(told)
    assert [full[f"set.{name}"] for name in ("size", "server_lr", "lr")] == [20, 1e-3, 3e-2]
    assert full["clients"] == methods.entry("fedpetuning").clients
    assert settled_options(full) == full
    assert settled_options(told | {"partition": "column:role"})["clients"] == 0


def test_env_json_has_the_digests_of_the_file_the_rows_and_the_split(made):
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
def test_a_tuned_model_is_saved_whole_or_says_how(made, method, tmp_path):
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
