"""Resume a run by its own recipe, also with more rounds than it was begun with.

No method looks at the number of rounds to come, so the result has the bits of a run that had as many from the start.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fleetune.common import sums
from fleetune.common.display import counted, quoted
from fleetune.common.files import PRIVATE, read_bytes, write_atomic
from fleetune.errors import MessageError, StorageError, UsageError
from fleetune.runs import rundir
from fleetune.runs.listener import Listener
from fleetune.tuning.methods import entry
from fleetune.tuning.prepare import private
from fleetune.tuning.prepare.prepare import check, prepare, timed
from fleetune.tuning.recipe import objects
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.result import finished, foundations
from fleetune.tuning.rounds import checkpoint
from fleetune.tuning.run.run import ONE_AT_A_TIME, SIMULATED, Fleets, goes_on, tune

SWEEP: Final = "sweep.toml"  # beside the runs of a sweep


def resume(
    path: Path,
    listener: Listener,
    *,
    offline: bool,
    fleets: Fleets = SIMULATED,
    rounds: int = 0,
    base: str = "",
) -> finished.TuneResult:
    """Resume a stopped run by its own recipe; return the result of a finished one.

    With more `rounds` than it has it goes on until it has as many, finished or not; UsageError, with nothing written,
    where it cannot.
    `base` is where the base's weights are from now on, which changes no bit of the result.
    A file of a finished run that is damaged, its result among them, is made again from the last checkpoint.
    """
    recipe, had = _own_recipe(path, rounds, base)
    if recipe.rounds == had and is_done(path, listener.note):
        found = finished.read(path)
        more = "; --rounds N gives it more rounds" if fleets.simulated else ""
        listener.note(f"{path} is finished already{more}")
        listener.event(found.done)
        return found
    foundations.check_files(recipe, path)
    if private.is_accounted(recipe):
        checkpoint.released(path)
    with ONE_AT_A_TIME, goes_on(path, fleets), rundir.RunDir(path) as folder:
        rundir.check_writable(path)
        job = prepare(
            recipe,
            offline=offline,
            simulated=fleets.simulated,
            find=False,
            measure=False,
            progress=listener.progress,
        )
        if not any(round for round, _ in rundir.checkpoints(path)):  # no round tells how long one takes
            job = dataclasses.replace(job, estimate=timed(job))
        if recipe.rounds != had:
            foundations.check(job, path, longer=True)  # a refusal leaves a finished run as it is
            write_rounds(job.recipe, folder)
        return finished.TuneResult(path.absolute(), tune(job, folder, listener, fleets))


def _own_recipe(path: Path, rounds: int, base: str) -> tuple[recipes.Recipe, int]:
    """Return the recipe by which a run is resumed, checked, and how many rounds the run has; arguments as for `resume`."""
    recipe = foundations.recipe_of(path, longer=rounds > 0)
    recipe = dataclasses.replace(recipe, base=base or recipe.base)
    had = recipe.rounds
    if rounds:
        recipe = longer(recipe, path, rounds)
        had = checkpoint_rounds(path) or had
    objects.check_known(recipe.method, path)
    check(recipe)
    return recipe, had


def is_done(path: Path, note: Callable[[str], None]) -> bool:
    """Whether a run is finished, and its record, answers and result are as they were written; if not so, it is said.

    StorageError when a file of a finished run is damaged, and there is no checkpoint to make it from.
    """
    if rundir.status_of(path) != "done":
        return False
    if damaged := damaged_file(path):
        if not rundir.checkpoints(path):
            raise StorageError(
                f"{path / damaged} of a finished run is damaged, and no checkpoint is left to make it from",
                hint=f"bring it back; or tune anew: fleetune tune -c {quoted(path / 'run.toml')}",
            )
        note(f"{path / damaged} is damaged or gone: it is made again from the last checkpoint")
    return not damaged


def damaged_file(path: Path) -> str:
    """The first file of a finished run that is not as it was written, "" where all are."""
    result = path / finished.RESULT[entry(foundations.stated_recipe(path).method).kind]
    found = [*sums.faults(path), *((f"{result.name}/{name}", why) for name, why in sums.faults(result))]
    if not result.exists():
        return result.name
    return found[0][0] if found else ""


def rounds_number(rounds: object) -> int:
    """Return a number of rounds, given as a number or a text; RecipeError for what no recipe can have."""
    return recipes.make({"model": "m", "data": "demo", "rounds": rounds}).rounds


def longer(recipe: recipes.Recipe, run: Path, rounds: int) -> recipes.Recipe:
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
    if private.is_accounted(recipe):
        raise UsageError(
            f"{run} has a privacy budget for {counted(had, 'round')}, which more rounds would exceed",
            hint=f"{onwards}; on the same rows, both runs' epsilons add up",
        )
    if not rundir.checkpoints(run):
        raise UsageError(f"{run} has no checkpoint left to go on from", hint=onwards)
    return dataclasses.replace(recipe, rounds=rounds)


def checkpoint_rounds(run: Path) -> int:
    """Return the rounds of the recipe that the newest checkpoint states; 0 where none states it."""
    stated = (checkpoint.stated_in(file) for _, file in reversed(rundir.checkpoints(run)))
    return next((int(on.recipe.get("rounds", 0)) for on in stated if on is not None), 0)


def write_rounds(recipe: recipes.Recipe, run: rundir.RunDir) -> None:
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
    run.write("run.toml", recipes.to_toml(foundations.as_stated(recipe, run.path)))
    run.log(f"given more rounds: {recipe.rounds} in all")
