"""`fleetune ledger`: show, replay, diff, merge, truncate, drop, scale, compact, export."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune import subject
from fleetune.cli import flags
from fleetune.cli.console import Ui, console_listener
from fleetune.common.display import counted, human_bytes
from fleetune.common.events import DigestFound, LedgerDifference, LedgerShown, LedgerWritten
from fleetune.errors import UsageError
from fleetune.seeds import ledger as ledgers

if TYPE_CHECKING:
    from fleetune.seeds.ledger import Ledger, LedgerHead


HELP = "show, replay, compare and combine seed ledgers"
ORDER = 60
VERBS = """\
show FILE               what a ledger holds: base, method, law, entries, digests
replay FILE             rebuild the weights, and print their digest (--round N: those after round N)
diff FILE FILE          what differs between two ledgers: head, rounds, direction of the change
export FILE --to DIR    write the tuned model as a Hugging Face directory
merge FILE FILE --to F  both ledgers' steps in one: the changes are added
truncate FILE --to F    without the rounds after --round N
drop FILE --to F        without round --round N
drop RUN --to F         without the replies of --client N, of a run with keep_replies = true
scale FILE --to F       all steps times --factor X
compact FILE --to F     steps along one direction added up: the same weights, a smaller file
"""
EXAMPLES = """\
fleetune ledger show latest
fleetune ledger diff 1 2
fleetune ledger truncate latest --round 5 --to short.safetensors
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.description = f"{sub.description}\n\n{textwrap.indent(VERBS, '    ')}"
    sub.add_argument("action", metavar="ACTION", choices=list(ACTIONS), help="one of the above")
    sub.add_argument(
        "files", metavar="FILE|RUN", nargs="+", help="a ledger file, or a run, whose ledger is meant"
    )
    sub.add_argument("--model", help="the base model (a run knows its own)")
    sub.add_argument(
        "--base",
        default="auto",
        choices=["auto", "memory", "mapped"],
        help="where the base's weights are: memory, or mapped, in their file, from which a replay streams (default auto)",
    )
    sub.add_argument("--to", metavar="PATH", help="file (or folder, for export) to write")
    sub.add_argument(
        "--round", type=int, help="for truncate: the last round that stays; for drop: the round left out"
    )
    sub.add_argument(
        "--client", "--device", help="for drop: the client left out, by its name in the report or its number"
    )
    sub.add_argument("--factor", type=float, help="for scale: what all steps are multiplied by")
    sub.add_argument("--threads", type=int, help="threads of the replay (default: all)")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Carry out an action on one ledger or two; a run stands for its ledger."""
    wanted = 2 if args.action in ("diff", "merge") else 1
    if len(args.files) != wanted:
        raise UsageError(f"ledger {args.action} takes {wanted} FILE, {len(args.files)} given")
    paths = [file_of(name, args.out) for name in args.files]
    ACTIONS[args.action](args, ui, paths, [ledgers.load(p) for p in paths])


def file_of(name: str, out: str) -> Path:
    """The ledger file that a name means: a file, a run's folder, or a run by name or number."""
    path = Path(name)
    if path.is_file():
        return path
    found = subject.open(name, out)
    if isinstance(found, subject.Compressed):
        raise UsageError(f"{found.argument} is a compression, which has no ledger", hint="name the run")
    if isinstance(found, subject.Run):
        from fleetune.tuning.result import finished

        return finished.ledger_file(found.folder)
    return path / "ledger.safetensors" if path.is_dir() else path


def _base_name(args: argparse.Namespace, path: Path) -> str:
    if args.model:
        return str(args.model)
    if (path.parent / "run.toml").is_file():
        from fleetune.tuning.result.finished import recipe_of

        return recipe_of(path.parent).model
    raise UsageError(f"which base model does {path} belong to?", hint="give it with --model NAME")


def _show(args: argparse.Namespace, ui: Ui, paths: Sequence[Path], loaded: Sequence[Ledger]) -> None:
    ledger, path = loaded[0], paths[0]
    head = ledger.head
    size = path.stat().st_size
    last = ledger.last_round()
    shown = ("base", "law", "K", "grid", "method", "checks", "trains")
    stated: dict[str, Any] = {n: getattr(head, n) for n in shown}
    stated |= {"entries": len(ledger), "rounds": last, "fingerprint": ledger.fingerprint()}
    ui.event(LedgerShown(file=str(path), bytes=size, **stated))
    passes = f"{ledger.count_passes():,} {'pass' if ledger.count_passes() == 1 else 'passes'}"
    compact = human_bytes(len(ledger.compact().to_bytes()))
    parameters = sum(math.prod(shape) for _, shape, _ in head.tensors)
    ui.table(
        ["", ""],
        [
            ["file", f"{path} ({human_bytes(size)}; compact {compact})"],
            ["base", head.base],
            [head.trains, f"{parameters:,} in {counted(len(head.tensors), 'tensor')}"],
            ["method", f"{head.method}, lr {_rate(head)}, eps {head.eps:g}, {head.aggregation}"],
            ["directions", f"{head.law}, K {head.K:,}, law version {head.law_version}, grid {head.grid:.9g}"],
            ["entries", f"{len(ledger):,} over {counted(last, 'round')}{_empty(ledger)}, {passes} to replay"],
            ["privacy", head.privacy],
            *[[f"after round {r}", d] for r, d in sorted(head.checks.items(), key=lambda c: int(c[0]))],
            ["fingerprint", ledger.fingerprint()],
        ],
        align="ll",
    )


def _empty(ledger: Ledger) -> str:
    """Say how many rounds added no entry; "" for none, and of a derived ledger, which may have lost whose its entries were."""
    empty = ledger.last_round() - len(set(ledger.rounds.tolist()))
    return f" ({empty:,} of them without any)" if empty and not ledger.head.previous else ""


def _rate(head: LedgerHead) -> str:
    """The learning rate, where the ledger states it, and the rule by which it changes: "1e-06, constant"."""
    rate = head.hyper.get("lr")
    return f"{rate:g}, {head.lr}" if isinstance(rate, int | float) else head.lr


def _replay(args: argparse.Namespace, ui: Ui, paths: Sequence[Path], loaded: Sequence[Ledger]) -> None:
    from fleetune.tuning.result import finished

    ledger = loaded[0] if args.round is None else loaded[0].truncate(args.round)
    model = finished.base_of(ledger, _base_name(args, paths[0]), offline=args.offline, base=args.base)
    with console_listener(ui) as listener:
        digest = finished.rebuild(model, ledger, threads=args.threads, listener=listener)
    finished.require_digest(digest, ledger.final_check(), paths[0])
    if ledger.final_check() is None:
        ui.note("the ledger states no digest of these weights, so there was none to compare with")
    _digest(ui, digest)


def _digest(ui: Ui, digest: str) -> None:
    ui.event(DigestFound(digest=digest))
    ui.paths([("digest", digest)])


def _diff(args: argparse.Namespace, ui: Ui, paths: Sequence[Path], loaded: Sequence[Ledger]) -> None:
    changes = loaded[0].diff(loaded[1])
    for c in changes:
        ui.event(LedgerDifference(**c._asdict()))
    ui.table(["what", paths[0].parent.name, paths[1].parent.name], changes, align="lll")
    if not changes:
        ui.note("no difference")


def _export(args: argparse.Namespace, ui: Ui, paths: Sequence[Path], loaded: Sequence[Ledger]) -> None:
    from fleetune.tuning.result import finished

    name, out = _base_name(args, paths[0]), flags.new_path(args.to, "ledger export")
    model = finished.base_of(loaded[0], name, offline=args.offline, base=args.base)
    finished.place_at(model, loaded[0])
    card = f"# {name}, tuned\n\nBase {loaded[0].head.base}, ledger {loaded[0].fingerprint()}.\n"
    digest = finished.export_hf(model, out, card=card, stated=loaded[0].final_check())
    ui.paths([("result", str(out))])
    _digest(ui, digest)


def _derive(args: argparse.Namespace, ui: Ui, paths: Sequence[Path], loaded: Sequence[Ledger]) -> None:
    """Write a ledger that is made of one or two."""
    path, ledger = flags.new_path(args.to, f"ledger {args.action}"), loaded[0]
    needed = {"truncate": "round", "drop": "round", "scale": "factor"}.get(args.action)
    if args.client is not None and (args.action != "drop" or args.round is not None):
        raise UsageError("--client is for ledger drop, in place of --round")
    if needed and getattr(args, needed) is None and args.client is None:
        raise UsageError(
            f"ledger {args.action} needs --{needed}{' or --client' * (needed == 'round' and args.action == 'drop')}"
        )
    match args.action:
        case "merge":
            made = ledger.merge(loaded[1])
        case "compact":
            made = ledger.compact()
        case "scale":
            made = ledger.scale(args.factor)
        case "drop" if args.client is not None:
            from fleetune.tuning.run import removal

            folder, name = paths[0].parent, args.model or ""
            client, called = removal.client_of(folder, args.client)
            made = removal.without_client(folder, client, ledger, name, offline=args.offline, base=args.base)
            ui.note(f"without client {client}{f', {called}' * bool(called)}")
        case "drop":
            made = ledger.drop(args.round)
        case _:
            made = ledger.truncate(args.round)
    made.save(path)
    ui.event(LedgerWritten(file=str(path), entries=len(made), fingerprint=made.fingerprint()))
    ui.paths([("result", f"{path} ({human_bytes(path.stat().st_size)}, {len(made):,} entries)")])


ACTIONS: dict[str, Callable[[argparse.Namespace, Ui, Sequence[Path], Sequence[Ledger]], None]] = {
    "show": _show,
    "replay": _replay,
    "diff": _diff,
    "export": _export,
    **dict.fromkeys(("merge", "compact", "truncate", "drop", "scale"), _derive),
}
