"""Make a run's ledger again from the replies that it has kept, without those of one client.

Each round is aggregated anew from what it counted; a round with fewer replies than the quorum adds nothing.  What a reply means
stays as it was for its client (`Method.replies_by`); all else, such as errors that are fed back, is made without the client.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from fleetune.errors import FAULTS, LedgerError, UsageError
from fleetune.runs import rundir
from fleetune.seeds.ledger import Ledger
from fleetune.tuning import methods
from fleetune.tuning.exchange.aggregation import IN_MEMORY, Spool, parse
from fleetune.tuning.recipe import objects
from fleetune.tuning.result import finished
from fleetune.tuning.rounds.replies import stored
from fleetune.tuning.run.run import first_state

CHANGED: Final = "they were changed after the run: bring them back as they were"


def client_of(run: Path, text: str) -> tuple[int, str]:
    """Return the number and the name ("" without one) of a run's client, from either; UsageError where there is none."""
    started = next((event for event in rundir.events(run) if event["event"] == "start"), {})
    names = [str(name) for name in started.get("names") or ()]
    if text in names:
        return names.index(text), text
    if text.isdecimal():
        return int(text), names[int(text)] if int(text) < len(names) else ""
    known = f"its clients: {', '.join(f'{i} {name}' for i, name in enumerate(names))}" if names else None
    raise UsageError(f"{run} has no client {text!r}", hint=known)


def without_client(
    run: Path, client: int, ledger: Ledger, name: str = "", *, offline: bool = False, base: str = "auto"
) -> Ledger:
    """Return a run's ledger as if the replies of `client` had not been added; `name` and `base` are of its base.

    UsageError where the run keeps no replies, or counts none of the client; LedgerError where they do not give its ledger.
    """
    recipe = finished.recipe_of(run) if (run / "run.toml").is_file() else None
    if recipe is None or not recipe.keep_replies:
        raise UsageError(f"{run} has kept no replies", hint="name a run made with --keep-replies")
    objects.check_known(recipe.method, run)
    method, rule = methods.make(recipe.method, recipe.set).written_out(), parse(recipe.aggregation)
    if (read_by := method.replies_by) is None:
        raise UsageError(f"the method '{recipe.method}' does not state `replies_by`, which removal needs")
    with _read(run):
        counted = [[reply.client for reply in stored(run, r + 1)] for r in range(ledger.last_round())]
    if client not in (known := set().union(*counted)):
        others = f"those with one: {', '.join(map(str, sorted(known)))}" if known else None
        raise UsageError(f"{run} has counted no reply of client {client}", hint=others)
    model = finished.base_of(ledger, name or recipe.model, offline=offline, base=base)
    whole = without = first_state(recipe, method, model, rule)
    for r, clients in enumerate(counted, 1):
        good = sum(c != client for c in clients) >= recipe.quorum
        before = without._replace(**{field: getattr(whole, field) for field in read_by})
        left = (reply for reply in stored(run, r) if good and reply.client != client)
        with _read(run), closing(Spool(run, IN_MEMORY)) as spool:
            whole = method.aggregate(whole, stored(run, r), replace(rule, spool=spool))
            without = method.aggregate(before, left, replace(rule, spool=spool))
    if differ := [change.what for change in whole.ledger.diff(ledger) if change.what != "checks"]:
        raise LedgerError(f"the replies of {run} do not give its ledger: {differ[0]} differs", hint=CHANGED)
    made: Ledger = without.ledger
    return replace(made, head=replace(made.head, previous=ledger.fingerprint()))


@contextmanager
def _read(run: Path) -> Iterator[None]:
    """Raise LedgerError where replies that are read in the block are not what the run stored."""
    try:
        yield
    except FAULTS as error:
        raise LedgerError(f"the replies of {run} cannot be read ({error})", hint=CHANGED) from error
