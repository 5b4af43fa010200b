# SPDX-License-Identifier: Apache-2.0
"""Give a run more rounds than it was begun with, so that it goes on from its last checkpoint.

No method looks at the number of rounds to come, so the result has the bits of a run that had as many from the start, and the
same learning rate.  Every checkpoint states the recipe; those of the run are written anew with the new number, then run.toml.
Before all that the run is no longer said to be finished, so that the same command goes on after a stop at any point of it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

from fleetune.common.display import counted
from fleetune.common.files import PRIVATE, read_bytes, write_atomic
from fleetune.common.shell import quoted
from fleetune.errors import MessageError, UsageError
from fleetune.runs import rundir
from fleetune.runs.rundir import RunDir
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe
from fleetune.tuning.result import places
from fleetune.tuning.rounds import checkpoint

SWEEP: Final = "sweep.toml"  # beside the runs of a sweep


def number(rounds: object) -> int:
    """Return a number of rounds, given as a number or a text; RecipeError for what no recipe can have."""
    return recipes.make({"model": "m", "data": "demo", "rounds": rounds}).rounds


def longer(recipe: Recipe, run: Path, rounds: int) -> Recipe:
    """Return a run's recipe with so many rounds; UsageError where it has more already, or cannot have more."""
    onwards = f"tune on from its result instead: fleetune export {quoted(run)} --to hf"
    had = checkpoint_rounds(run) or recipe.rounds
    if rounds < had:
        raise UsageError(
            f"{run} has {counted(had, 'round')}, and {rounds} are fewer: --rounds with --resume gives a run more",
            hint=f"resume it as it is: fleetune tune --resume {quoted(run)}",
        )
    if (run.resolve().parent / SWEEP).is_file():
        raise UsageError(f"{run} is a run of a sweep, whose runs all have {had} rounds", hint=onwards)
    if (run / rundir.FLEET).is_file():
        raise UsageError(f"{run} is a run of real devices, which is not given more rounds", hint=onwards)
    if any(event["event"] == "done" and event.get("stopped_early") for event in rundir.events(run)):
        raise UsageError(
            f"{run} ended before its last round, since patience = {recipe.patience} was over: more rounds would not be run",
            hint=onwards,
        )
    if not rundir.checkpoints(run):
        raise UsageError(f"{run} has no checkpoint left to go on from", hint=onwards)
    return dataclasses.replace(recipe, rounds=rounds)


def checkpoint_rounds(run: Path) -> int:
    """Return the rounds of the recipe that the newest checkpoint states; 0 where none states it."""
    stated = (checkpoint.stated_in(file) for _, file in reversed(rundir.checkpoints(run)))
    return next((int(on.recipe.get("rounds", 0)) for on in stated if on is not None), 0)


def write(recipe: Recipe, run: RunDir) -> None:
    """Write the recipe's number of rounds into the checkpoints and run.toml of an open run; it is no longer finished.

    Call it once all else is found to be as the run was begun with (`foundations.check`).
    """
    run.status("interrupted")
    for _, file in rundir.checkpoints(run.path):
        try:
            data = checkpoint.with_rounds(read_bytes(file), recipe.rounds)
        except MessageError:  # a damaged one is told when it is read
            continue
        write_atomic(file, data, mode=PRIVATE)
    run.write("run.toml", recipes.to_toml(places.as_stated(recipe, run.path)))
    run.log(f"given more rounds: {recipe.rounds} in all")
