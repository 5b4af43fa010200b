# SPDX-License-Identifier: Apache-2.0
"""`fleetune recipes`, and recipes by name where a command takes a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fleetune import recipes
from fleetune.cli.commands import tune
from fleetune.cli.main import build_parser, main
from fleetune.errors import RecipeError


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_every_recipe_is_listed_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "recipes", "--json")
    listed = {e["name"]: e for e in map(json.loads, out.splitlines())}
    assert (code, sorted(listed)) == (0, sorted(p.stem for p in recipes.FOLDER.glob("*.toml")))
    assert all(20 < len(e["about"]) < 200 for e in listed.values()), "one line each"
    assert not any("Expected" in e["about"] for e in listed.values())
    assert listed["fedit"]["expected"].startswith("validation loss ")
    assert listed["case_study"]["sweeps"]
    assert not listed["fedit"]["sweeps"]
    code, out, _ = call(capsys, "recipes")
    assert code == 0
    assert listed["fedit"]["about"] in out


def test_a_recipe_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = (recipes.FOLDER / "fedpetuning_cross_silo.toml").read_text(encoding="utf-8")
    assert call(capsys, "recipes", "fedpetuning-cross-silo")[:2] == (0, text)


def test_a_run_takes_a_recipe_by_name_with_a_model_and_data_of_ones_own() -> None:
    words = ["-c", "recipe:mezo", "tiny", "rows.jsonl", "--rounds", "1", "--set", "tau=2"]
    made = tune.recipe_of(build_parser("tune").parse_args(["tune", *words]))
    stated = recipes.named("mezo").values
    assert (made.method, made.model, made.data, made.rounds) == ("mezo", "tiny", "rows.jsonl", 1)
    assert made.set == {**stated["set"], "tau": "2"}
    assert made.max_length == stated["max_length"]


def test_a_file_of_the_name_is_taken_before_a_recipe_and_a_missing_one_is_told(at: Path) -> None:
    (at / "fedit.toml").write_text("rounds = 2\n")
    assert recipes.find("fedit.toml") == Path("fedit.toml")
    assert recipes.find("recipe:fedit") == recipes.FOLDER / "fedit.toml"
    assert recipes.find("other.toml") == Path("other.toml"), "the reader says that it is missing"
    with pytest.raises(RecipeError) as error:
        recipes.find("recipes/mezo.toml")
    assert error.value.hint is not None
    assert "recipe:mezo" in error.value.hint
