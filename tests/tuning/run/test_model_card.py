"""Model cards say what a run recorded, are valid for the Hub, and tell nothing of rows, clients or this machine."""

import dataclasses
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

import fleetune
from fleetune import models
from fleetune.cli.commands import tune
from fleetune.cli.main import build_parser
from fleetune.common import sums
from fleetune.tuning.result import finished
from fleetune.tuning.result.finished import TuneResult
from fleetune.tuning.run import describe, model_card

SECRET = "the otter's passphrase"
QUICK: dict[str, Any] = {"rounds": 2, "samples": 1, "answer_tokens": 2, "held_out": 4, "max_length": 64}
QUICK |= {"partition": "column:ward", "offline": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "fedit": {"r": 2, "lr": 0.01, "steps": 2},
    "mezo": {"tau": 2, "K": 16, "lr": 1e-3},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TuneResult]:
    folder = tmp_path_factory.mktemp("cards")
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, folder / "tiny", card="---\nlicense: mit\n---\n\n# tiny\n")
    row = '{{"instruction": "Say {0}", "response": "{1} {0}.", "ward": "ward-{2}"}}\n'
    (folder / "rows.jsonl").write_text("".join(row.format(n, SECRET, n % 3) for n in range(30)))
    tune = partial(fleetune.tune, folder / "tiny", folder / "rows.jsonl", out=folder / "runs", **QUICK)
    return {method: tune(method=method, settings=settings) for method, settings in SETTINGS.items()}


@pytest.fixture(params=["adapter", "fedit", "mezo"])
def written(request: pytest.FixtureRequest, runs: Any, tmp_path: Path) -> tuple[TuneResult, Path]:
    if request.param == "adapter":
        return runs["fedit"], runs["fedit"].path
    folder = tmp_path / "hf"
    fleetune.export(runs[request.param], to="hf", path=folder, offline=True)
    return runs[request.param], folder


def test_a_card_is_valid_and_says_what_the_run_recorded(written):
    run, folder = written
    card = ModelCard.load(folder / "README.md")
    head = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    known = {*vars(ModelCardData()), "base_model"}
    assert set(head) <= known, "fields that the Hub knows"
    assert card.data.license == "mit", "the licence of the base"
    assert card.data.library_name in ("peft", "transformers")
    method = finished.recipe_of(run.folder).method
    assert {"fleetune", method} <= set(card.data.tags)
    text = card.text
    base, tuned = run.done.base["loss"], run.done.tuned["loss"]
    assert f"| loss | {base:.3f} | {tuned:.3f} |" in text
    assert "on 4 held-out rows" in text
    assert "26 of 3 clients" in text
    assert "| data | rows.jsonl |" in text
    for name, value in SETTINGS[method].items():
        assert f"| `{name}` | {value} |" in text
    assert {run.done.digest, str(run.done.result_sha256)} <= set(text.replace("`", " ").split())
    assert "from_pretrained(" in text


def test_a_card_tells_nothing_of_rows_clients_and_this_machine(written):
    run, folder = written
    text = (folder / "README.md").read_text()
    for kept in (SECRET, "ward-1", str(run.folder.parent.parent), str(Path.home()) + "/"):
        assert kept not in text


def test_the_command_on_a_card_makes_the_recipe_again(written):
    run, folder = written
    lines = (folder / "README.md").read_text().splitlines()
    (line,) = (text for text in lines if text.startswith("    fleetune tune "))
    recipe = finished.recipe_of(run.folder)
    made = tune.recipe_of(build_parser("tune").parse_args(shlex.split(line)[1:]), print)
    named = {n: describe.public(getattr(recipe, n)) for n in describe.NAMED}
    assert describe.recipe_facts(made) == describe.recipe_facts(dataclasses.replace(recipe, **named))
    assert (made.model, made.data) == ("tiny", "rows.jsonl")


def test_the_adapters_folder_is_whole_with_its_card(runs):
    run = runs["fedit"]
    sums.check(run.path, remedy="")
    sizes = [p.stat().st_size for p in run.path.iterdir()]
    assert run.done.result_bytes == sum(sizes)
    before = (run.path / "README.md").read_text()
    model_card.complete(run.path, finished.stated_by(run.folder))
    assert (run.path / "README.md").read_text() == before, "written twice, it is the same"
    assert before.count("## Result") == 1
    assert "from peft import PeftModel" in before


def test_a_name_is_public_without_its_folders():
    places = {
        "/home/me/models/tiny": "tiny",
        "~/data/rows.jsonl": "rows.jsonl",
        "a/b/rows.jsonl": "rows.jsonl",
    }
    names = {name: name for name in ("owner/name", "smollm2-135m")}
    assert {text: describe.public(text) for text in places | names} == places | names


def test_a_built_in_base_is_linked_with_its_licence(runs):
    recipe = dataclasses.replace(finished.recipe_of(runs["fedit"].folder), model="smollm2-135m")
    assert model_card.base_name(recipe) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert model_card.licence_of(recipe) == "apache-2.0"
    head = model_card._front_matter(recipe, library="transformers", tags=())
    assert yaml.safe_load(head.split("---")[1])["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
