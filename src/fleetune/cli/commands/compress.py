"""`fleetune compress`: make a model or a finished run smaller, block by block or by training."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fleetune
from fleetune import compression
from fleetune.api.deployment import file_size
from fleetune.cli import flags
from fleetune.cli.console import Ui, console_listener
from fleetune.cli.parser import Parser
from fleetune.common import settings, words
from fleetune.common.display import command, human_bytes, human_time, quoted
from fleetune.common.events import CompressChecked, MethodListed
from fleetune.compression.jobs import job
from fleetune.compression.layerwise import grids
from fleetune.errors import UsageError
from fleetune.runs import compression_folder

if TYPE_CHECKING:
    from fleetune.cli.console import ConsoleListener
    from fleetune.compression.jobs.job import CompressResult

HELP = "make a model or a finished run smaller"
ORDER = 70
EXAMPLES = """\
fleetune compress latest --set bits=3
fleetune compress smollm2-135m --text book.txt --dry-run
fleetune compress --list qronos                            its settings
"""


def arguments(sub: Parser) -> None:
    """Add the command's arguments."""
    sub.add_argument("model", metavar="RUN|MODEL", nargs="?", help="what to make smaller")
    sub.add_argument(
        "--method",
        help=f"{', '.join(compression.entries())} (default {compression.DEFAULT}; with --calibrate clients or fleet "
        f"{compression.DEFAULT_OF_DEVICES})",
    )
    sub.add_argument("--set", action="append", metavar="NAME=VALUE", help="setting of the method; repeatable")
    sub.add_argument(
        "--list", nargs="?", const="all", metavar="METHOD", help="the methods with their settings"
    )
    _add_calibration_arguments(sub)
    _add_result_arguments(sub)
    sub.add_argument(
        "--eval-text",
        help="plain text file: its perplexity before and after, and the KL divergence from the dense model on it",
    )
    sub.add_argument(
        "--seed", type=int, help="seed of the order of rows, and of what is sampled (default 42)"
    )
    sub.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], help="type a model is loaded in (default fp32)"
    )
    sub.add_argument(
        "--resume",
        metavar="FOLDER",
        help="continue a stopped one (a path, a number, or latest), as it was asked for",
    )
    sub.add_argument("--dry-run", action="store_true", help="check settings, model and text, then stop")
    flags.add_door(
        sub.group("--calibrate fleet (with --resume too)"), "the first block (default: those of the run)"
    )


def _add_calibration_arguments(sub: Parser) -> None:
    sub.add_argument(
        "--data",
        help="calibrate or train on these rows (a run: every second held-out row of its own, and text that comes with Fleetune)",
    )
    sub.add_argument(
        "--text",
        help="calibrate on a plain text file (without either: text of several kinds that comes with Fleetune)",
    )
    sub.add_argument("--windows", type=int, help="most windows (default 128; 32 where no text is given)")
    sub.add_argument("--length", type=int, help="tokens per window, or per row at most (default 512)")
    sub.add_argument(
        "--calibrate",
        choices=["server", "clients", "fleet"],
        help="clients: the run's own clients calibrate on their training rows and send sums over them; fleet: the devices "
        "that join do (default server)",
    )
    sub.add_argument("--clients", type=int, help="how many clients (default: all)")
    sub.add_argument(
        "--low-memory",
        action="store_true",
        default=None,
        help="load one block of the model at a time from disk",
    )


def _add_result_arguments(sub: Parser) -> None:
    sub.add_argument(
        "--bytes",
        metavar="SIZE",
        help="choose a grid for each matrix, embedding included, so that the GGUF file keeps within SIZE (91.7MB) and the "
        "model changes least",
    )
    sub.add_argument(
        "--bits",
        type=int,
        help="4, 5 or 8: the same, as large as Q4_0, Q5_0 or Q8_0 (default 4, where no --method and no grid is given)",
    )
    sub.add_argument(
        "--fast",
        action="store_true",
        default=None,
        help=f"one grid for all matrices ({job.FAST}): nothing is measured first",
    )
    sub.add_argument(
        "--train-scales",
        type=int,
        metavar="STEPS",
        help="after solving, train the scales for this many steps to follow the dense model; the codes stay",
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Compress, resume, check or list."""
    if args.list:
        _list(args, ui)
        return
    out = Path(args.out)
    resumed = compression_folder.get(args.resume, out) if args.resume is not None else None
    if resumed is not None:
        _check_resume(args, resumed)
    elif not args.model:
        raise UsageError("compress needs a model or a run", hint="fleetune compress latest")
    else:
        _refuse_types(args)
    calibrate = compression_folder.request_of(resumed).calibrate if resumed else args.calibrate
    if calibrate != compression_folder.FLEET and (given := flags.given_door(args)):
        raise UsageError(f"{given[0]} is for devices that join", hint="leave it out, or: --calibrate fleet")
    door = flags.served(args) if calibrate == compression_folder.FLEET and not args.dry_run else nullcontext()
    with console_listener(ui) as listener, door as served:
        common: dict[str, Any] = flags.options(args, "") | {"listener": listener, "served": served}
        if args.dry_run:
            _dry_run(args, ui, resumed, listener)
        elif resumed is not None:
            show(ui, fleetune.resume_compression(resumed, **common))
        else:
            chosen = settings.pairs(args.set or [])
            options = common | _options(args)
            show(ui, fleetune.compress(args.model, method=args.method, settings=chosen, **options))


def _refuse_types(args: argparse.Namespace) -> None:
    """UsageError for a type of llama.cpp as a method, or as a grid that has not its name: it says how a file like it is made."""
    grid = settings.pairs(args.set or []).get("grid", "")
    for said in (args.method or "", "" if grid in grids.ALL else grid):
        if options := words.TYPES.get(said.lower()):
            hint = f"for a file of about that size: {command('compress', args.model, *options.split())}"
            raise UsageError(f"{said} is a type of llama.cpp", hint=hint)


def show(ui: Ui, result: CompressResult) -> None:
    """Print sizes and measures before and after, where the result is, and what to do with it."""
    done, (head, rows) = result.done, result.table()
    if not result.sizes:  # it was finished before
        return
    ui.table(head, rows, align="l" + "r" * len(result.sizes))
    ui.paths(
        [
            ("result", f"{result.folder / 'model'} ({human_bytes(done.bytes)})"),
            ("time · peak memory", f"{human_time(done.seconds)} · {human_bytes(done.peak_rss)}"),
            ("digest", done.digest),
            *(
                []
                if len(rows) > 1
                else [("quality", f"not measured: {command('measure', result.folder)} --text FILE")]
            ),
            ("next", f"fleetune export {quoted(result.folder)} --to {_next_target(result.folder / 'model')}"),
        ]
    )


def _next_target(model: Path) -> str:
    """Return a target that holds the result without loss: gguf or compressed-tensors where these keep its codes, else hf."""
    from fleetune.deploy.checkpoint import open_checkpoint
    from fleetune.deploy.formats import compressed_tensors, gguf

    found = open_checkpoint(model)
    if gguf.exact_target(found, sample=True) == "gguf":
        return "gguf"
    return compressed_tensors.exact_target(found) or "hf"


def _given(args: argparse.Namespace) -> dict[str, Any]:
    names = [n for n in (*compression_folder.FIELDS, "fast") if n != "run"]
    given = {n: v for n in names if (v := getattr(args, n)) is not None}
    if "bytes" in given:
        given["bytes"] = settings.parse_bytes(given["bytes"], "--bytes", least=1)
    return given


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {n: v for n, v in _given(args).items() if n in (*compression_folder.OPTIONS, "fast")}


def _check_resume(args: argparse.Namespace, folder: Path) -> None:
    if given := _given(args):
        flags = ", ".join("RUN|MODEL" if n == "model" else f"--{n.replace('_', '-')}" for n in given)
        raise UsageError(
            f"--resume follows what {folder / compression_folder.RECORD} says; {flags} cannot be given with it",
            hint=f"fleetune compress --resume {quoted(folder)}   or begin anew, without --resume",
        )


def _dry_run(args: argparse.Namespace, ui: Ui, resumed: Path | None, listener: ConsoleListener) -> None:
    """Load the model and data and check the request; write nothing."""
    out = Path(args.out)
    if resumed is not None:
        request = compression_folder.request_of(resumed)
    else:
        options, chosen = _options(args), settings.pairs(args.set or [])
        request = job.request_for(args.model, args.method, chosen, options, out=out)
    found = job.prepare(request, listener, out, offline=args.offline, beside=file_size, dry=True)
    about, count = found.about(), found.inputs.model.n_params
    ui.event(CompressChecked(parameters=count, **dict(about)))
    for name, text in about:
        ui.note(f"{name}: {text}")
    ui.note(f"the settings fit {count:,} parameters; nothing was written")


def _list(args: argparse.Namespace, ui: Ui) -> None:
    for name, entry in compression.entries().items():
        if args.list.replace("_", "-") not in ("all", name):
            continue
        try:
            found = compression.settings_of(name)
        except UsageError as error:  # of another package's module, which does not stop the list
            ui.note(f"{name} is left out: {error.message}")
            continue
        ui.event(
            MethodListed(
                name=entry.name,
                paper=entry.text("PAPER"),
                summary=entry.summary,
                settings=[asdict(s) | {"type": s.type.__name__} for s in found],
            )
        )
        ui.paths([(name, entry.summary), ("paper", entry.text("PAPER"))])
        ui.table(
            ["setting", "symbol", "default", ""],
            [[s.name, s.symbol, s.default, s.help] for s in found],
            align="llll",
        )
    if args.list != "all":
        compression.settings_of(args.list)  # refuses an unknown one
