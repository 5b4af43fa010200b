"""Every recipe names what exists, and those that state an outcome (`# Expected: validation loss 3.857 -> 3.112.`) give it.

`make slow` runs and compares these: they need only what comes built in.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import fleetune
from command_line import call
from fleetune import recipes
from fleetune import recipes as named_recipes
from fleetune.cli.commands import tune
from fleetune.cli.main import build_parser
from fleetune.errors import RecipeError
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe

RECIPES = [found.path for found in named_recipes.every().values()]
LINE = re.compile(r"# Expected: validation loss (\d+\.\d{3}) -> (\d+\.\d{3})\.")
NEAR = 0.03  # processors and versions of torch round differently, and thirty steps later that is seen


class Expected(NamedTuple):
    """Validation loss before and after."""

    base: float
    tuned: float


def expected(path: Path) -> Expected | None:
    """What the recipe's first line promises; None when it promises nothing."""
    found = LINE.fullmatch(path.read_text(encoding="utf-8").split("\n", 1)[0])
    return Expected(float(found[1]), float(found[2])) if found else None


PROMISING = [path for path in RECIPES if expected(path)]


def named(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_names_options_settings_and_a_method_that_exist(path):
    values = recipe.read(path)
    values.pop("sweep", None)  # what `fleetune sweep` varies
    made = recipe.make(values)
    entry, _ = prepare.check(made)
    assert entry.name == made.method


@pytest.mark.slow
@pytest.mark.parametrize("path", PROMISING, ids=named)
def test_a_recipe_gives_what_it_promises(path, tmp_path):
    promise = expected(path)
    done = fleetune.tune(recipe.make(recipe.read(path)), out=tmp_path).done
    base, tuned = done.base["loss"], done.tuned["loss"]
    assert base == pytest.approx(promise.base, rel=NEAR)
    assert tuned == pytest.approx(promise.tuned, rel=NEAR)
    change = tuned - base
    assert 0.5 < change / (promise.tuned - promise.base) < 2, "small steps change little, but something"


def test_every_recipe_is_listed_with_what_it_does(capsys):
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


def test_a_recipe_is_shown_as_it_is(capsys):
    text = (recipes.FOLDER / "fedpetuning_cross_silo.toml").read_text(encoding="utf-8")
    assert call(capsys, "recipes", "fedpetuning-cross-silo")[:2] == (0, text)


def test_a_run_takes_a_recipe_by_name_with_a_model_and_data_of_ones_own():
    words = ["-c", "recipe:mezo", "tiny", "rows.jsonl", "--rounds", "1", "--set", "tau=2"]
    made = tune.recipe_of(build_parser("tune").parse_args(["tune", *words]), print)
    stated = recipes.named("mezo").values
    assert (made.method, made.model, made.data, made.rounds) == ("mezo", "tiny", "rows.jsonl", 1)
    assert made.set == {**stated["set"], "tau": "2"}
    assert made.max_length == stated["max_length"]


def test_a_file_of_the_name_is_taken_before_a_recipe_and_a_missing_one_is_told(at):
    (at / "fedit.toml").write_text("rounds = 2\n")
    assert recipes.find("fedit.toml") == Path("fedit.toml")
    assert recipes.find("recipe:fedit") == recipes.FOLDER / "fedit.toml"
    assert recipes.find("other.toml") == Path("other.toml"), "the reader says that it is missing"
    with pytest.raises(RecipeError) as error:
        recipes.find("recipes/mezo.toml")
    assert error.value.hint is not None
    assert "recipe:mezo" in error.value.hint
