"""`fleetune export`: a finished run, a compressed model or any model to a file or folder that a runtime reads."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import fleetune
from fleetune import subject as subjects
from fleetune.cli import flags
from fleetune.cli.console import Ui, console_listener
from fleetune.common import words
from fleetune.common.display import command, human_bytes, quoted
from fleetune.deploy import targets
from fleetune.errors import UsageError

if TYPE_CHECKING:
    from fleetune.deploy.export import ExportResult

HELP = "write a run, a compressed model or a model for a runtime"
ORDER = 90
EXAMPLES = """\
fleetune export latest --to gguf                           one file for llama.cpp
fleetune export latest --to gguf:q8_0 --path model.gguf
fleetune export latest --to gguf:lora                      the adapter alone, for llama.cpp
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument("subject", metavar="RUN|FOLDER|MODEL", help="what to write")
    sub.add_argument("--to", metavar="TARGET", help=f"{targets.listed()}; default: of a run hf, else gguf")
    sub.add_argument("--path", help="file or folder to write (default: inside the run or folder)")
    sub.add_argument(
        "--text", help="plain text file: its perplexity by the source, and by the file in its runtime"
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Export, and print what was written."""
    if options := words.TYPES.get((args.to or "").lower().removeprefix("gguf:")):
        if not isinstance(subjects.open(args.subject, args.out), subjects.Compressed):
            raise UsageError(
                f"{args.to} holds codes, and {args.subject} is not compressed",
                hint=f"{command('compress', args.subject, *options.split())}   then: fleetune export latest --to gguf",
            )
        args.to = "gguf"
        ui.note(f"understood as: --to gguf, the type that holds the codes of {args.subject} as they are")
    with console_listener(ui) as listener:
        result = fleetune.export(args.subject, listener=listener, **flags.options(args, "to path text"))
    show(ui, result)
    if result.path.suffix == ".gguf" and targets.find(result.done.to).takes != "adapter":
        ui.paths([("next", f"fleetune chat {quoted(result.path)}")])


def show(ui: Ui, result: ExportResult) -> None:
    """Print where an export is, its tensors, and how it did in its runtime."""
    done, check = result.done, result.check
    size = f" ({human_bytes(done.bytes)})" if done.bytes is not None else ""
    rows = [("result", f"{done.path}{size}")]
    if done.digest:
        rows.append(("digest", done.digest))
    if done.types is not None:
        rows.append(("tensors", ", ".join(f"{n} {kind}" for kind, n in sorted(done.types.items()))))
        rows.append(("read back", _read_back(done.exact or 0, done.tensors or 0)))
    if check is not None and check.runtime is not None:
        rows.append(
            (
                "perplexity",
                f"{check.source:.3f} in torch, {check.file:.3f} in {check.runtime} (x {check.ratio:.4f}), "
                f"{check.tokens:,} tokens",
            )
        )
    ui.paths(rows)


def _read_back(exact: int, tensors: int) -> str:
    if exact == tensors:
        return f"{exact} of {tensors} tensors hold the source's values bit for bit"
    return f"{tensors - exact} rounded as asked, {exact} exact, 0 wrong ({tensors} tensors)"
