# SPDX-License-Identifier: Apache-2.0
"""A compressed model given as MODEL where its scales are trained: its file is written once, and the run is one of that file."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from deploy_harness import compressed, tiny

import fleetune
from fleetune import models
from fleetune.cli.main import main
from fleetune.common.events import Event, RoundDone
from fleetune.common.sums import sha256
from fleetune.deploy import harness
from fleetune.errors import Interrupted, ModelError, RecipeError, UsageError
from fleetune.planning import plan as planning
from fleetune.runs.listener import Silent
from fleetune.tuning.recipe import recipe as recipes

FEW: dict[str, Any] = {
    "clients": 2,
    "rounds": 2,
    "held_out": 4,
    "eval_rows": 4,
    "samples": 0,
    "client_rows": 0,
    "threads": 1,
    "device": "cpu",
}
CODES, FILE = "runs/0001-rtn-tiny", "runs/0001-rtn-tiny/0001-rtn-tiny.gguf"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "mezo": ("mezo", {"tau": 4, "lr": 0.05}),
    "fedkseed": ("fedkseed", {"tau": 3, "K": 64, "lr": 0.05}),
    "fedpetuning": ("fedpetuning", {"lr": 0.05, "batch_size": 2}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, codes of it, and rows."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny()
    models.save(model.net, model.tokenizer, folder / "tiny")
    rows = [{"prompt": f"say {w}", "response": f"{w} it is"} for w in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.chdir(folder):
        fleetune.compress("tiny", method="rtn")
    return folder


@pytest.fixture
def at(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "at"))
    return Path.cwd()


def said(*words: str, code: int = 0) -> str:
    """What a command says on standard error."""
    err, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        assert main(list(words)) == code, err.getvalue()
    return err.getvalue()


def tuned(model: object, way: str = "mezo", **options: Any) -> Any:
    method, settings = WAYS[way]
    return fleetune.tune(
        model, "rows.jsonl", method=method, train="scales", settings=settings, **{**FEW, **options}
    )


def flags(way: str) -> list[str]:
    method, settings = WAYS[way]
    words = [
        *(f"--{n.replace('_', '-')}={v}" for n, v in FEW.items()),
        f"--method={method}",
        "--train=scales",
    ]
    return [*words, *(word for n, v in settings.items() for word in ("--set", f"{n}={v}"))]


@pytest.mark.parametrize("way", WAYS)
def test_the_run_is_the_one_of_the_exported_file(way: str, at: Path) -> None:
    """From the codes to the patched file; export, patch, replay and evaluation agree with a run of the file itself."""
    notes = said("tune", CODES, "rows.jsonl", *flags(way))
    assert notes.count(f"{FILE}, now written") == 1
    run = fleetune.open("2")
    assert isinstance(run, fleetune.Run)
    assert run.recipe.model == FILE
    own = fleetune.export(CODES, path=at / "own" / Path(FILE).name).path
    assert Path(FILE).read_bytes() == own.read_bytes()
    by_hand = tuned(own, way, out="by-hand")
    done = next(r for r in fleetune.list_runs() if r.folder.name == run.name)
    assert done.done.digest == by_hand.done.digest
    assert done.history["loss"] == by_hand.history["loss"]

    out = fleetune.export(run, path=at / "tuned.gguf").path
    assert models.load(str(out), device="cpu").digest == models.digest(
        models.named_tensors(run.load().merge().net)
    )
    shutil.copy(FILE, "device.gguf")
    for word in ("make", FILE, "2", "--to", "p"), ("apply", "device.gguf", "p"):
        said("patch", *word)
    assert sha256(Path("device.gguf")) == sha256(out)
    assert out.stat().st_size == own.stat().st_size
    if WAYS[way][0] != "fedpetuning":
        said("ledger", "verify", "2")
    assert fleetune.evaluate(run, tasks=["loss"])["loss"] == pytest.approx(done.done.tuned["loss"], rel=1e-5)
    again = said("tune", "-c", f"runs/{run.name}/run.toml", "-q")
    assert "now written" not in again
    assert (
        next(r for r in fleetune.list_runs() if r.folder.name.startswith("0003")).done.digest
        == done.done.digest
    )


@pytest.mark.parametrize("name", [CODES, "1", "0001-rtn-tiny", "latest", f"{CODES}/model", f"./{CODES}"])
def test_every_name_of_it_means_it(name: str, at: Path) -> None:
    said("tune", name, "rows.jsonl", *flags("mezo"), "--rounds=1")
    before = Path(FILE).stat().st_mtime_ns
    assert "which is there already" in said("tune", CODES, "rows.jsonl", *flags("fedkseed"), "--rounds=1")
    assert Path(FILE).stat().st_mtime_ns == before
    assert {fleetune.open(n).recipe.model for n in "23"} == {FILE}  # type: ignore[union-attr]


@pytest.mark.parametrize("way", ["mezo", "fedpetuning"])
def test_the_names_of_patch_make_are_those_of_tune(way: str, at: Path) -> None:
    said("tune", CODES, "rows.jsonl", *flags(way), "--rounds=1")
    said("patch", "make", FILE, "2", "--to", "p")
    own = Path("p").read_bytes()
    for name in ("1", CODES, "0001-rtn-tiny", f"{CODES}/model"):
        said("patch", "make", name, "latest", "--to", "q")
        assert Path("q").read_bytes() == own
        Path("q").unlink()

    assert "the model comes first" in said("patch", "make", "2", "1", "--to", "q", code=2)
    Path("copy.gguf").write_bytes(Path(FILE).read_bytes())
    said("patch", "make", "copy.gguf", "2", "--to", "q")
    assert Path("q").read_bytes() == own
    assert "hub cache" not in said("patch", "make", "1", "1", "--to", "r", code=2)
    assert "make it first: mkdir -p no/such" in said("patch", "make", "1", "2", "--to", "no/such/r", code=2)


@pytest.mark.parametrize("way", ["mezo", "fedpetuning"])
def test_a_run_of_scales_as_model_is_written_out_as_its_file(way: str, at: Path) -> None:
    """The hint's export is a file that has scales and codes, and it is the model to give; one of fewer rounds is not."""
    said("tune", CODES, "rows.jsonl", *flags(way), "--rounds=1")
    ended = Path(fleetune.open("2").argument, "status")
    for later in (0, 60):
        at_end = ended.stat().st_mtime + later
        os.utime(ended, (at_end, at_end))
        refused = said("tune", "latest", "rows.jsonl", *flags(way), code=2)
        command, _, rest = refused.partition("try: ")[2].partition("   and then give ")
        file = Path(rest.split()[0])
        assert "--to gguf" in command
        assert file.suffix == ".gguf"
        assert not file.exists()
        said(*shlex.split(command)[1:])
        os.utime(file, (at_end, at_end))
        assert f"written out already: give {file} as" in said("tune", "2", "rows.jsonl", *flags(way), code=2)
    said("tune", str(file), "rows.jsonl", *flags(way), "--rounds=1")
    assert fleetune.open("3").recipe.model == str(file)  # type: ignore[union-attr]


def test_the_folder_that_a_command_runs_in_means_it_too(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name in ((CODES, "."), (f"{CODES}/model", "..")):
        monkeypatch.chdir(at / folder)
        notes = said(
            "tune", name, str(at / "rows.jsonl"), *flags("mezo"), "--rounds=1", "--out", str(at / "new")
        )
        assert f"{Path(name, '0001-rtn-tiny.gguf')}, " in notes
    assert (at / FILE).is_file()


def test_a_compression_of_a_models_name_is_no_misspelling_of_it(at: Path) -> None:
    """`0001-rtn-smollm2-135m` is like smollm2-135m, which is no hub id either."""
    Path(CODES).rename("runs/0001-rtn-smollm2-135m")
    notes = said("tune", "0001-rtn-smollm2-135m", "rows.jsonl", *flags("mezo"), "--rounds=1")
    assert "runs/0001-rtn-smollm2-135m/0001-rtn-smollm2-135m.gguf, now written" in notes


def test_python_takes_names_results_subjects_and_recipes(at: Path) -> None:
    codes = fleetune.open(CODES)
    recipe = recipes.make(
        {
            "model": CODES,
            "data": "rows.jsonl",
            "method": "mezo",
            "train": "scales",
            "set": WAYS["mezo"][1],
            **FEW,
        }
    )
    runs = [tuned(given) for given in (CODES, Path(CODES), codes)]
    runs.append(fleetune.tune(recipe))
    assert len({run.done.digest for run in runs}) == 1
    assert {fleetune.open(run).recipe.model for run in runs} == {FILE}  # type: ignore[union-attr]


def test_an_artefact_without_a_compression_and_a_method_that_is_not_named(at: Path) -> None:
    compressed(tiny(seed=3), Path("codes"))
    done = fleetune.tune(
        "codes", "rows.jsonl", settings={"module": "scales", "lr": 0.05, "batch_size": 2}, **FEW
    )
    assert fleetune.open(done).recipe.model == "codes/codes.gguf"  # type: ignore[union-attr]
    assert fleetune.open(done).recipe.train == "scales"  # type: ignore[union-attr]
    auto = fleetune.tune("codes", "rows.jsonl", train="scales", settings={"lr": 0.05}, **{**FEW, "rounds": 1})
    assert fleetune.open(auto).recipe.method in recipes.SCALE_METHODS  # type: ignore[union-attr]


class Stops(Silent):
    """Ends a run after its first round."""

    def event(self, event: Event) -> None:
        if isinstance(event, RoundDone) and event.round == 1:
            raise Interrupted("stopped")


@pytest.mark.parametrize("way", ["mezo", "fedpetuning"])
def test_a_stopped_run_goes_on_to_the_same_bits(way: str, at: Path) -> None:
    whole = tuned(CODES, way)
    with pytest.raises(Interrupted):
        tuned(CODES, way, listener=Stops())
    before = Path(FILE).stat().st_mtime_ns
    said("tune", "--resume", "latest")
    runs = fleetune.list_runs()
    assert [run.done.digest for run in runs] == [whole.done.digest] * 2
    said("tune", "--resume", "latest", "--rounds", "3")
    assert Path(FILE).stat().st_mtime_ns == before


def test_a_compressed_run_is_tuned_on_and_measured(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "measured", harness.carry_out)  # here, and not in a process for each figure
    first = fleetune.tune(
        "tiny", "rows.jsonl", method="fedit", settings={"r": 2, "lr": 1e-3, "steps": 2}, **FEW
    )
    small = fleetune.compress(first, method="rtn")
    second = tuned(small, "fedpetuning")
    file = small.folder / f"{small.folder.name}.gguf"
    assert Path(fleetune.open(second).recipe.model).samefile(file)  # type: ignore[union-attr]
    assert second.done.tuned["loss"] < second.done.base["loss"]
    table = fleetune.measure(second, prompt_tokens=8, new_tokens=2, repeats=1)
    assert [row.name for row in table.rows] == ["base", "tuned"]
    losses = [row.loss for row in table.rows]
    assert losses == pytest.approx([second.done.base["loss"], second.done.tuned["loss"]], rel=1e-4)


def test_what_a_run_was_tuned_from_stays_unless_it_is_forced(
    at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that `tune` wrote beside a compression, and a model that was exported from a run."""
    run = tuned(CODES)
    plain: dict[str, Any] = {"method": "fedit", "settings": {"r": 2, "lr": 1e-3, "steps": 1}, **FEW}
    other = fleetune.tune("tiny", "rows.jsonl", **plain)
    said("export", "3", "--to", "hf")
    onward = fleetune.tune(f"{other.folder}/hf", "rows.jsonl", **plain)
    names = [Path("runs") / r.folder.name for r in (run, other, onward)]
    for number, needing in (("1", names[0]), ("3", names[2])):
        err = said("runs", "rm", number, code=2)
        assert f"is needed by {needing}: made from it" in err
        assert f"{needing}   or it alone, with --force" in err
    inside = at / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)  # run.toml names the files as they are seen from where the run was started
    assert "0002-mezo" in said("runs", "rm", "1", "--out", "../runs", code=2)
    monkeypatch.chdir(at)
    said("runs", "rm", "1", str(names[0]))
    said("runs", "rm", "3", "--force")
    assert [p.name for p in sorted(Path("runs").glob("0*"))] == [names[2].name]
    said("runs", "rm", "4")  # its base is gone


def test_a_run_of_a_sweep_needs_its_base_too(at: Path) -> None:
    done = fleetune.sweep(
        CODES,
        "rows.jsonl",
        method="mezo",
        settings={"tau": 2},
        vary={"lr": [0.05]},
        train="scales",
        **{**FEW, "rounds": 1},
    )
    (run,) = (file.parent.name for file in done.folder.glob("*/run.toml"))
    assert f"is needed by runs/{done.folder.name}/{run}: made" in said("runs", "rm", "1", code=2)


def test_a_dry_run_and_a_sweep_take_it(at: Path) -> None:
    checked = said("tune", CODES, "rows.jsonl", *flags("mezo"), "--dry-run")
    assert f"{FILE}, now written" in checked
    assert "the recipe is good" in checked
    assert not Path("runs/0002-mezo-0001-rtn-tiny").exists()
    done = fleetune.sweep(
        "latest",
        "rows.jsonl",
        method="mezo",
        settings={"tau": 2, "lr": 0.05},
        vary={"lr": [0.05, 0.02]},
        train="scales",
        **{**FEW, "rounds": 1},
    )
    stated = recipes.read(done.folder / "sweep.toml")
    assert stated["model"] == FILE
    Path("r.toml").write_text(
        'model = "runs/0001-rtn-tiny"\ndata = "rows.jsonl"\nmethod = "mezo"\ntrain = "scales"\nclients = 2\nheld_out = 4\n'
        "rounds = 1\nsamples = 0\n[set]\ntau = 2\nlr = 0.05\n"
    )
    said("sweep", "r.toml", "--vary", "tau=1,2", "-q")
    found = sorted(Path("runs").glob("*-sweep-r/*/run.toml"))
    assert [recipes.read(file)["model"] for file in found] == [FILE, FILE]


def test_a_sweep_chooses_its_method_by_the_compressed_models_configuration(at: Path) -> None:
    Path("r.toml").write_text(
        'model = "runs/0001-rtn-tiny"\ndata = "rows.jsonl"\ntrain = "scales"\nclients = 2\nheld_out = 4\n[set]\nlr = 0.05\n'
    )
    notes = said("sweep", "r.toml", "--vary", "lr=0.01,0.02", "--dry-run")
    assert "method fedpetuning, since none was given: it learns most" in notes
    assert "of this machine's" in notes
    assert not Path(FILE).exists()


def test_a_sweep_over_compressed_models_is_resumed(at: Path) -> None:
    fleetune.compress("tiny", method="rtn", settings={"bits": 8})
    names = [CODES, "runs/0002-rtn-tiny"]
    files = [f"{name}/{Path(name).name}.gguf" for name in names]
    options = {**FEW, "rounds": 1, "train": "scales", "method": "mezo", "settings": {"tau": 2, "lr": 0.05}}
    done = fleetune.sweep(CODES, "rows.jsonl", vary={"model": names}, **options)
    runs = sorted(done.folder.glob("*/run.toml"))
    assert [recipes.read(run)["model"] for run in runs] == files
    assert fleetune.resume_sweep(done).folder == done.folder
    shutil.rmtree(runs[1].parent)
    said("sweep", "--resume", "latest", "-q")
    assert [recipes.read(run)["model"] for run in runs] == files


def test_a_plan_counts_it_and_writes_nothing(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = fleetune.plan(CODES, train="scales")
    assert plan.settings().options()["train"] == "scales"
    assert plan.settings().options()["base"] == "mapped"
    assert set(plan.search.shape.scales.values()) == {1}
    assert {row.method for row in plan.rows if row.tunes} == set(recipes.SCALE_METHODS)
    assert not Path(FILE).exists()
    unknown = planning.make(models.load_config("tiny"), "tiny", {"base": "mapped"}, train="scales")
    one, two = (_trained(plan) for plan in (plan, unknown))
    assert one * 2 == two, "Q4_0 has one scale a block; where the file is not known two are counted"
    assert main(["plan", CODES, "--train", "scales", "--batch", "4", "--length", "64"]) == 0
    command = capsys.readouterr().out.partition("fleetune tune ")[2].split()
    told = said(
        "tune",
        *(word if word != "DATA" else "rows.jsonl" for word in command),
        *(f"--{n.replace('_', '-')}={v}" for n, v in FEW.items()),
    )
    assert f"{FILE}, now written" in told
    shutil.copy(FILE, "DEVICE.GGUF")  # as a file from another system may be named
    for file in (FILE, "DEVICE.GGUF"):
        own = fleetune.plan(file, train="scales")
        assert (own.rows[0].trainable, _trained(own)) == (plan.rows[0].trainable, one)


def test_a_plan_of_what_has_no_blocks_is_refused_as_tune_refuses_it(
    at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain directory, and a GGUF file of floats; a name whose file is not fetched yet is not."""
    fleetune.export("tiny", to="gguf:f16", path="plain.gguf")
    for model in ("tiny", "plain.gguf"):
        assert main(["plan", model, "--train", "scales"]) == 2
        planned = capsys.readouterr()
        assert "this base has no scales that could be trained" in planned.err
        assert "GGUF file of Q4_0" in planned.err
        assert "fleetune compress" in planned.err
        assert "fleetune tune" not in planned.out
        few = (f"--{name.replace('_', '-')}={value}" for name, value in FEW.items())
        assert (
            main(["tune", model, "rows.jsonl", "--method=mezo", "--train=scales", "--set=lr=0.1", *few]) == 2
        )
        tuned = capsys.readouterr().err
        assert (
            tuned[tuned.index("this base") :].split() == planned.err[planned.err.index("this base") :].split()
        )
        with pytest.raises(ModelError, match="this base has no scales"):
            fleetune.plan(model, train="scales")
    with pytest.raises(ModelError, match="this base has no scales"):
        fleetune.plan("minilm-l6", train="scales", offline=True)
    assert (
        fleetune.plan("smollm2-135m", train="scales", offline=True).settings().options()["train"] == "scales"
    )
    artefact = fleetune.plan(f"{CODES}/model", train="scales")
    assert set(artefact.search.shape.scales.values()) == {1}, "of the artefact itself"


def _trained(plan: Any) -> int:
    """Numbers that fedpetuning trains."""
    return int(next(row for row in plan.rows if row.method == "fedpetuning").trainable)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "is a compressed model: codes, not plain weights"),
        ({"train": "norms"}, "train = 'norms' is none of weights, scales"),
        ({"train": "scales", "base": "memory"}, "train = scales reads the base from its GGUF file"),
    ],
)
def test_a_plan_of_what_cannot_be_is_refused(given: dict[str, Any], words: str, at: Path) -> None:
    with pytest.raises(UsageError, match=words):
        fleetune.plan(CODES, **given)


# What is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--train=weights"], "is a compressed model: codes, not plain weights"),
        (["--method=fedit", "--train=weights"], "or tune its scales as they are: --train scales"),
        (["--method=zosgd"], "train = scales is for mezo, fedkseed, onebyte, fedpetuning, not for zosgd"),
        (["--base=memory"], "base = memory does not"),
        (["--method=auto", "--set", "r=4"], "no method has all of the settings"),
        (["--set", "tau=many"], "tau = 'many' is not an integer"),
        (["--data=other.jsonl"], "two values of data"),
        (["--partition=dirichlet:0.5"], "dirichlet:ALPHA:COLUMN"),
        (["--stragglers=0.5"], "does nothing without a deadline"),
    ],
)
def test_what_is_wrong_beside_it_is_said_before_its_file_is_written(
    changed: list[str], words: str, at: Path
) -> None:
    assert words in said("tune", CODES, "rows.jsonl", *flags("mezo"), *changed, code=2)
    assert not Path(FILE).exists()


def test_what_else_is_no_plain_model_is_refused_as_ever(at: Path) -> None:
    run = tuned(CODES, rounds=1)
    with pytest.raises(UsageError, match="is a run: a change of its base"):
        tuned(run)
    with pytest.raises(UsageError, match="is a run: a change of its base"):
        tuned("2")
    with pytest.raises(RecipeError, match="not for fedit"):
        fleetune.tune(CODES, "rows.jsonl", method="fedit", train="scales", **FEW)
    with pytest.raises(UsageError, match="is a compressed model"):
        fleetune.tune(CODES, "rows.jsonl", method="mezo", **FEW)
    with pytest.raises(UsageError, match="is a compressed model"):
        fleetune.sweep(
            CODES, "rows.jsonl", method="mezo", train="scales", vary={"train": ["scales", "weights"]}
        )
    Path(FILE).write_bytes(b"mine")
    assert "is not what fleetune export --to gguf writes" in said(
        "tune", CODES, "rows.jsonl", *flags("mezo"), code=2
    )
    assert Path(FILE).read_bytes() == b"mine"


def test_a_damaged_compressed_model_is_refused_as_such(at: Path) -> None:
    codes = Path(CODES, "model", "master.safetensors")
    raw = bytearray(codes.read_bytes())
    raw[-1] ^= 1
    codes.write_bytes(raw)
    assert "master.safetensors is not what was written" in said(
        "tune", CODES, "rows.jsonl", *flags("mezo"), code=2
    )
    assert not Path(FILE).exists()
