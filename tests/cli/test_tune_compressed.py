"""A compressed model given as MODEL where its scales are trained: its file is written once, and the run is one of that file."""

import contextlib
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from deploy_harness import compressed, tiny

import fleetune
from command_line import FEW as BRIEF
from command_line import said
from fleetune import models
from fleetune.api import tuning
from fleetune.common.sums import sha256
from fleetune.deploy import harness
from fleetune.planning import plan as planning
from fleetune.tuning.recipe import recipe as recipes

FEW: dict[str, Any] = BRIEF | {"rounds": 2, "client_rows": 0}
PLAIN: dict[str, Any] = {"method": "fedit", "settings": {"r": 2, "lr": 1e-3, "steps": 1}, **FEW}
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
    tiny().save(folder / "tiny")
    rows = [{"prompt": f"say {w}", "response": f"{w} it is"} for w in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.chdir(folder):
        fleetune.compress("tiny", method="rtn")
    return folder


@pytest.fixture
def at(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "at"))
    return Path.cwd()


def tuned(model: object, way: str = "mezo", **options: Any) -> Any:
    method, settings = WAYS[way]
    options = {**FEW, "method": method, "train": "scales", "settings": settings, **options}
    return fleetune.tune(model, "rows.jsonl", **options)


def flags(way: str) -> list[str]:
    method, settings = WAYS[way]
    few = [f"--{n.replace('_', '-')}={v}" for n, v in FEW.items()]
    own = [word for n, v in settings.items() for word in ("--set", f"{n}={v}")]
    return [*few, f"--method={method}", "--train=scales", *own]


@pytest.mark.parametrize("way", ["fedkseed", "fedpetuning"])
def test_the_run_is_the_one_of_the_exported_file(way, at):
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
    merged = models.digest(models.named_tensors(run.load().merge().net))
    assert models.load(str(out), device="cpu").digest == merged
    shutil.copy(FILE, "device.gguf")
    assert out.stat().st_size == own.stat().st_size
    if WAYS[way][0] == "fedpetuning":
        assert "leaves an adapter, no ledger" in said("patch", "make", FILE, "2", "--to", "p", code=2)
    else:
        for word in ("make", FILE, "2", "--to", "p"), ("apply", "device.gguf", "p"):
            said("patch", *word)
        assert sha256(Path("device.gguf")) == sha256(out)
    said("verify", "tuned.gguf", "--from", "2")
    assert fleetune.evaluate(run, tasks=["loss"])["loss"] == pytest.approx(done.done.tuned["loss"], rel=1e-5)
    assert "now written" not in said("tune", "-c", f"runs/{run.name}/run.toml", "-q")


@pytest.mark.parametrize("name", [CODES, "1", "0001-rtn-tiny", "latest", f"{CODES}/model", f"./{CODES}"])
def test_every_name_of_it_means_it(name, at):
    recipe = recipes.make({"model": name, "data": "rows.jsonl", "method": "mezo", "train": "scales"})
    notes: list[str] = []
    for _ in range(2):
        assert tuning.with_file(recipe, Path("runs"), notes.append).model == FILE
    assert "now written" in notes[0]
    assert "there already" in notes[1]


def test_the_names_of_patch_make_are_those_of_tune(at):
    said("tune", CODES, "rows.jsonl", *flags("mezo"), "--rounds=1")
    said("patch", "make", FILE, "2", "--to", "p")
    said("patch", "make", f"{CODES}/model", "latest", "--to", "q")
    assert Path("q").read_bytes() == Path("p").read_bytes()
    assert "the model comes first" in said("patch", "make", "2", "1", "--to", "r", code=2)


def test_a_run_of_scales_as_model_is_written_out_as_its_file(at):
    """The hint's export is a file that has scales and codes, and it is the model to give."""
    said("tune", CODES, "rows.jsonl", *flags("mezo"), "--rounds=1")
    refused = said("tune", "latest", "rows.jsonl", *flags("mezo"), code=2)
    command, _, rest = refused.partition("try: ")[2].partition("   and then give ")
    file = rest.split()[0]
    said(*shlex.split(command)[1:])
    assert f"written out already: give {file} as" in said("tune", "2", "rows.jsonl", *flags("mezo"), code=2)
    said("tune", file, "rows.jsonl", *flags("mezo"), "--rounds=1")
    assert fleetune.open("3").recipe.model == file  # type: ignore[union-attr]


def test_an_artefact_without_a_compression_and_a_method_that_is_not_named(at):
    compressed(tiny(seed=3), Path("codes"))
    settings = {"module": "scales", "lr": 0.05, "batch_size": 2}
    recipe = fleetune.open(fleetune.tune("codes", "rows.jsonl", settings=settings, **FEW)).recipe
    assert (recipe.model, recipe.train) == ("codes/codes.gguf", "scales")


def test_a_compressed_run_is_tuned_on_and_measured(at, monkeypatch):
    monkeypatch.setattr(harness, "measured", harness.carry_out)  # here, and not in a process for each figure
    first = fleetune.tune("tiny", "rows.jsonl", **PLAIN)
    small = fleetune.compress(first, method="rtn")
    second = tuned(small, "fedpetuning")
    file = small.folder / f"{small.folder.name}.gguf"
    assert Path(fleetune.open(second).recipe.model).samefile(file)  # type: ignore[union-attr]
    assert second.done.tuned["loss"] < second.done.base["loss"]
    table = fleetune.measure(second, prompt_tokens=8, new_tokens=2, repeats=1)
    assert [row.name for row in table.rows] == ["base", "tuned"]
    losses = [row.loss for row in table.rows]
    assert losses == pytest.approx([second.done.base["loss"], second.done.tuned["loss"]], rel=1e-4)


def test_what_a_run_was_tuned_from_stays_unless_it_is_forced(at):
    """The file that `tune` wrote beside a compression, and a model that was exported from a run."""
    run = tuned(CODES)
    other = fleetune.tune("tiny", "rows.jsonl", **PLAIN)
    said("export", "3", "--to", "hf")
    onward = fleetune.tune(f"{other.folder}/hf", "rows.jsonl", **PLAIN)
    names = [Path("runs") / r.folder.name for r in (run, other, onward)]
    for number, needing in (("1", names[0]), ("3", names[2])):
        err = said("runs", "rm", number, code=2)
        assert f"is needed by {needing}: made from it" in err
        assert f"{needing}   or it alone, with --force" in err
    said("runs", "rm", "1", str(names[0]))
    said("runs", "rm", "3", "--force")
    assert [p.name for p in sorted(Path("runs").glob("0*"))] == [names[2].name]
    said("runs", "rm", "4")  # its base is gone


def test_a_dry_run_takes_it(at):
    checked = said("tune", CODES, "rows.jsonl", *flags("mezo"), "--dry-run")
    assert f"{FILE}, now written" in checked
    assert "the recipe is good" in checked
    assert not Path("runs/0002-mezo-0001-rtn-tiny").exists()


def test_a_plan_counts_it_and_writes_nothing(at):
    plan = fleetune.plan(CODES, train="scales")
    assert plan.settings().options().items() >= {"train": "scales", "base": "mapped"}.items()
    assert set(plan.search.shape.scales.values()) == {1}
    assert {row.method for row in plan.rows if row.tunes} == set(recipes.SCALE_METHODS)
    assert not Path(FILE).exists()
    unknown = planning.make(models.load_config("tiny"), "tiny", {"base": "mapped"}, train="scales")
    one, two = (next(r for r in p.rows if r.method == "fedpetuning").trainable for p in (plan, unknown))
    assert one * 2 == two, "Q4_0 has one scale a block; where the file is not known two are counted"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--train=weights"], "is a compressed model: codes, not plain weights"),
        (["--method=zosgd"], "train = scales is for mezo, fedkseed, onebyte, fedpetuning, not for zosgd"),
        (["--set", "tau=many"], "tau = 'many' is not an integer"),
    ],
)
def test_what_is_wrong_beside_it_is_said_before_its_file_is_written(changed, words, at):
    assert words in said("tune", CODES, "rows.jsonl", *flags("mezo"), *changed, code=2)
    assert not Path(FILE).exists()


def test_bits_by_llama_cpp_s_name_are_the_codes_that_there_are(at):
    told = said("export", CODES, "--to", "Q4_K_M", "-o", "out.gguf")
    assert "understood as: --to gguf, the type that holds the codes" in told
    assert "--path out.gguf" in told
    assert Path("out.gguf").is_file()
