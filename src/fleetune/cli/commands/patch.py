"""`fleetune patch`: make, apply: update a quantised model on a device by kilobytes."""

import argparse
import textwrap
from pathlib import Path

from fleetune.cli import flags
from fleetune.cli.commands.ledger import file_of
from fleetune.cli.console import Ui, console_listener
from fleetune.common.display import human_bytes
from fleetune.common.events import PatchApplied, PatchMade
from fleetune.common.files import write_atomic
from fleetune.deploy import patch
from fleetune.errors import called
from fleetune.seeds import ledger as ledgers

HELP = "update a quantised model on a device by a file of kilobytes"
ORDER = 65
VERBS = """\
make BASE RUN --to FILE          the patch of a run that was tuned with --train scales (BASE: its model, or the
                                 compression; RUN: a run or a ledger)
apply BASE.gguf FILE             patch the file in its place (--to NEW.gguf: write a copy)
"""
EXAMPLES = """\
fleetune patch make smollm2.gguf latest --to tuned.patch
fleetune patch apply smollm2.gguf tuned.patch
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.description = f"{sub.description}\n\n{textwrap.indent(VERBS, '    ')}"
    sub.add_argument("action", metavar="ACTION", choices=["make", "apply"], help="make or apply")
    sub.add_argument("files", metavar="FILE", nargs=2, help="see above")
    sub.add_argument("--to", metavar="FILE", help="file to write (of make: the patch; of apply: a copy)")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Carry out an action."""
    {"make": _make, "apply": _apply}[args.action](args, ui)


def _make(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.deploy import export, patch_make

    out = flags.new_path(args.to, "patch make")
    patch.require_folder(out)
    with console_listener(ui) as listener:
        name = export.model_to_tune(args.files[0], args.out, listener.note)
        base = patch_make.file_of(name, offline=args.offline)
        with called(base, name):
            ledger = ledgers.load(file_of(args.files[1], args.out))
            made = patch_make.of_ledger(base, ledger, name=name, offline=args.offline, listener=listener)
    file = made.file
    write_atomic(out, file)
    ui.event(PatchMade(path=str(out), bytes=len(file), base=made.base, result=made.result))
    ui.paths(
        [("patch", f"{out} ({human_bytes(len(file))})"), ("makes", f"a file with SHA-256 {made.result}")]
    )


def _apply(args: argparse.Namespace, ui: Ui) -> None:
    path, file = map(Path, args.files)
    out = Path(args.to) if args.to else None
    loaded = patch.load(file)
    with console_listener(ui) as listener:
        patch.apply(path, loaded, out, listener)
    ui.event(PatchApplied(path=str(out or path), result=loaded.result))
    ui.paths([("model", str(out or path)), ("SHA-256", loaded.result)])
