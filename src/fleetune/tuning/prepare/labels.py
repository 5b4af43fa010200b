# SPDX-License-Identifier: Apache-2.0
"""Check the label words of a recipe against its data, before the model is loaded.

Two options name label words: `labels` (what an encoder chooses among, and what accuracy is measured by) and the objective
`accuracy:yes,no` (what is trained).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from fleetune import models
from fleetune.common import settings
from fleetune.common.display import counted
from fleetune.data import Example
from fleetune.data.encode import check_answers
from fleetune.errors import RecipeError
from fleetune.evaluation import objectives
from fleetune.models.checks import is_encoder
from fleetune.models.encoders import MAX_LABELS
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe

COVER: Final = "name every label word as the data has it (a comma in a word: \\,), or leave the option out"


def problems(recipe: Recipe) -> list[str]:
    """List what is wrong with the recipe's label words, whatever the data."""
    given = settings.split_words(recipe.labels) if recipe.labels else []
    trained = objectives.label_words(str(recipe.set.get("objective", "loss")))
    found = []
    if given and not 2 <= len(given) <= MAX_LABELS:
        found.append(
            f"labels = {recipe.labels!r} has {counted(len(given), 'word')}: 2 to {MAX_LABELS} are possible"
        )
    if "" in given:
        found.append(f"labels = {recipe.labels!r} has an empty word")
    if twice := [word for i, word in enumerate(given) if word and word in given[:i]]:
        found.append(f"labels = {recipe.labels!r} has {twice[0]!r} twice")
    if given and trained and set(given) != set(trained):
        found.append(f"labels = {recipe.labels!r} and objective = {recipe.set['objective']!r} differ")
    return found


def check_rows(
    recipe: Recipe,
    objective: str,
    batch_size: int,
    examples: Sequence[Example],
    held: Sequence[Example],
    *,
    offline: bool,
) -> None:
    """Raise DataError for an answer that is none of the label words; RecipeError for an accuracy that needs them named.

    Rows that are given for validation alone are the only ones that `labels` must cover, unless an encoder is trained.
    """
    given, trained = recipes.label_words(recipe.labels), objectives.label_words(objective)
    if trained:
        check_answers(_answers(examples), trained, f"objective = {objective}", COVER)
    if given:
        every = not recipe.eval_data or _encoder(recipe, offline)
        check_answers(_answers(examples if every else held), given, f"labels = {recipe.labels}", COVER)
    if objective == "accuracy" and batch_size == 1 and not _encoder(recipe, offline):
        raise RecipeError(
            ["objective 'accuracy' compares a row's answer with the others of its batch, and batch_size = 1"],
            hint="name the label words, for example accuracy:yes,no, or raise batch_size",
        )


def measured(recipe: Recipe, objective: str, examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the label words that a causal model's accuracy is measured by; () where it is not.

    Those of the recipe, else those that are trained; with the objective `accuracy` alone all answers of the data, unless
    they are too many to be label words.
    """
    words = recipes.label_words(recipe.labels) or tuple(objectives.label_words(objective))
    if words or objective.partition(":")[0] != "accuracy":
        return words
    different = sorted(set(_answers(examples)))
    return tuple(different) if len(different) <= MAX_LABELS else ()


def _answers(examples: Iterable[Example]) -> list[str]:
    return [example.response.strip() for example in examples]


def _encoder(recipe: Recipe, offline: bool) -> bool:
    return is_encoder(models.load_config(recipe.model, offline=offline))
