# SPDX-License-Identifier: Apache-2.0
"""The `fleetune` command: parse, call, print.  No logic, and nothing heavy is imported before it is needed.

Flags of `tune` are made from the recipe's fields, so they cannot drift from the TOML keys.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fleetune.cli.commands import chat, compress, measure, serve
from fleetune.cli.console import Ui
from fleetune.common.version import __version__
from fleetune.deploy import targets
from fleetune.errors import FleetuneError, Interrupted, UsageError
from fleetune.seeds.kernel_choice import chosen_kernels as wanted_kernels
from fleetune.tuning import recipe as recipes

EXAMPLES = """\
examples:
  fleetune demo                                                a real job in minutes, nothing to configure
  fleetune plan smollm2-135m --ram 4GB --uplink 1Mbps          which method fits this device
  fleetune tune smollm2-135m data.jsonl --method fedkseed --clients 20 --rounds 10 --set K=4096
  fleetune tune --resume latest                                go on after a stop
  fleetune sweep recipe.toml --vary K=64,512 --seeds 3         a grid of runs on one page
  fleetune eval latest --tasks loss,rouge                      measure the tuned model
  fleetune ledger verify latest                                prove what a model was made from
  fleetune compress latest --method optq                       4 bits a weight, solved block by block
  fleetune export latest --to gguf                             one file for llama.cpp, read back bit for bit
  fleetune measure latest --kept-gain                          size, speed, and what of the tuning is kept
  fleetune serve latest                                        an OpenAI-compatible endpoint and a chat page
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code (0 ok, 1 failed, 2 usage, 3 does not fit, 4 fleet, 130 stopped)."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    ui = Ui(quiet=args.quiet, json=args.json)
    _environment(args)
    try:
        if unknown:
            raise _unknown(parser, unknown)
        wanted_kernels()
        args.run(args, ui)
    except FleetuneError as error:
        ui.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        ui.error(Interrupted("stopped"))
        return 130
    return 0


def _unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> UsageError:
    flag = unknown[0].split("=")[0]
    known = [
        "--vary",
        "--set",
        "--resume",
        "--dry-run",
        "--config",
        "--out",
        "--json",
        "--offline",
        "--quiet",
        "--verbose",
    ]
    known += [f"--{name.replace('_', '-')}" for name in recipes.fields()]
    close = difflib.get_close_matches(flag, known, n=1)
    guess = f" Did you mean '{close[0]}'?" if close else ""
    guess = " It is for tune and sweep." if flag in known else guess
    return UsageError(f"unknown argument '{flag}'.{guess}", hint="all of them: fleetune COMMAND --help")


def _environment(args: argparse.Namespace) -> None:
    level = logging.DEBUG if args.verbose > 1 else logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("fleetune").setLevel(level)
    for noisy in ("transformers", "numba", "httpx", "huggingface_hub", "peft"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


# Parsing --------------------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser by name (for the docs)."""
    (action,) = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    found: dict[str, argparse.ArgumentParser] = dict(action.choices)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fleetune",
        description="Fine-tune language models across a fleet of edge devices.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fleetune {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    common = _common()

    def add(name: str, run: Callable[[argparse.Namespace, Ui], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, parents=[common], help=text, description=text[0].upper() + text[1:] + "."
        )
        sub.set_defaults(run=run)
        return sub

    sub = add(
        "demo", _demo, "tune smollm2-135m over the built-in demo fleet and make the result fit a device"
    )
    sub.add_argument("--quick", action="store_true", help="the same path in a minute, with fewer steps")
    _plan_arguments(
        add("plan", _plan, "memory, traffic and time of every method for a model, before any work")
    )
    _tune_arguments(add("tune", _tune, "fine-tune a model over a simulated fleet"))
    _sweep_arguments(add("sweep", _sweep, "tune over a grid of values and seeds, on one page"))
    _eval_arguments(add("eval", _eval, "measure a model, a finished run or a compressed one"))
    _ledger_arguments(add("ledger", _ledger, "show, verify, replay, compare and combine seed ledgers"))
    compress.arguments(add("compress", _compress, "make a model or a finished run smaller"))
    measure.arguments(
        add("measure", _measure, "size, speed, memory and quality of base, tuned and compressed in one table")
    )
    _export_arguments(add("export", _export, "write a run, a compressed model or a model for a runtime"))
    serve.arguments(add("serve", _serve, "an OpenAI-compatible endpoint and a chat page over a model"))
    chat.arguments(add("chat", _chat, "talk to a model in the terminal, or ask it one thing"))
    sub = add("runs", _runs, "list, show, compare or remove runs")
    sub.add_argument("action", nargs="?", default="list", choices=["list", "show", "compare", "rm"])
    sub.add_argument("names", metavar="RUN", nargs="*")
    sub.add_argument(
        "--force", action="store_true", help="rm: also a run that something was compressed from, which stays"
    )
    sub = add("methods", _methods, "list the tuning methods, or one with its settings")
    sub.add_argument("name", metavar="NAME", nargs="?")
    sub = add("models", _models, "list the built-in models, or fetch one")
    sub.add_argument("action", nargs="?", default="list", choices=["list", "pull"])
    sub.add_argument("name", metavar="NAME", nargs="?")
    return parser


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("everywhere")
    group.add_argument("--json", action="store_true", help="one JSON object per event on stdout")
    group.add_argument("--out", default="runs", metavar="DIR", help="folder of the runs (default ./runs)")
    group.add_argument("--offline", action="store_true", help="never use the network")
    group.add_argument("-q", "--quiet", action="count", default=0, help="say less (-qq: errors alone)")
    group.add_argument("-v", "--verbose", action="count", default=0, help="say more (-vv: everything)")
    return common


def _plan_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--ram", help="memory of a device, e.g. 4GB: says what fits")
    sub.add_argument("--uplink", help="its uplink, e.g. 1Mbps: says how long a round's traffic takes")
    sub.add_argument("--batch", type=int, default=1, help="rows a step (default 1)")
    sub.add_argument("--length", type=int, default=256, help="tokens a row (default 256)")
    sub.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="type of the weights")
    sub.add_argument("--steps", type=int, default=200, help="local steps a round (default 200)")


def _eval_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="RUN|FOLDER|MODEL")
    sub.add_argument(
        "data", metavar="DATA", nargs="?", help="rows to measure on (a run: its own held-out rows)"
    )
    sub.add_argument(
        "--tasks",
        help="loss, rouge, f1, em, accuracy, perplexity (default loss,rouge; of an encoder loss,accuracy)",
    )
    sub.add_argument("--limit", type=int, default=200, help="rows at most (default 200)")
    sub.add_argument("--answer-tokens", type=int, default=96, help="tokens of a generated answer at most")
    sub.add_argument("--text", help="plain text file for perplexity")
    sub.add_argument("--labels", help="label words for accuracy, comma-separated")
    sub.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="type of the weights (default fp32; a run has its own)",
    )
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")


def _export_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("subject", metavar="RUN|FOLDER|MODEL")
    sub.add_argument(
        "--to", metavar="TARGET",
        help=f"{targets.listed()}; default: of a run hf, else gguf",
    )  # fmt: skip
    sub.add_argument("--path", help="file or folder to write (default: inside the run or folder)")
    sub.add_argument(
        "--text", help="plain text file: its perplexity by the source, and by the file in its runtime"
    )


def _tune_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "model", metavar="MODEL", nargs="?", help="hub id, HF directory, GGUF file or built-in name"
    )
    sub.add_argument("data", metavar="DATA", nargs="?", help="JSONL, CSV or Parquet file, hub id, or 'demo'")
    sub.add_argument("-c", "--config", metavar="FILE", help="a TOML recipe; flags override it")
    sub.add_argument("--resume", metavar="RUN", help="go on with a stopped run (a path, a number, or latest)")
    sub.add_argument("--dry-run", action="store_true", help="check recipe, data and model, then stop")
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method; repeat"
    )
    _recipe_flags(sub)


def _sweep_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a TOML recipe; a table [sweep] says what varies"
    )
    sub.add_argument(
        "--vary", action="append", default=[], metavar="NAME=V1,V2,..",
        help="alpha (of the Dirichlet partition), an option, or a setting of the method (K, set.K); repeat",
    )  # fmt: skip
    sub.add_argument(
        "--seeds", type=int, help="seeds of every combination, from the recipe's own on (default 1)"
    )
    sub.add_argument(
        "--resume", metavar="SWEEP", help="go on with a stopped sweep (a path, a number, or latest)"
    )
    sub.add_argument("--dry-run", action="store_true", help="check all runs and list them, then stop")
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method; repeat"
    )
    _recipe_flags(sub)


def _recipe_flags(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("recipe")
    for name, (kind, default, text) in recipes.fields().items():
        if name == "set":
            continue
        shown = "" if default is dataclasses.MISSING else f" (default {default})"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"recipe_{name}",
            metavar=kind.__name__.upper(),
            help=text + shown,
        )


def _ledger_arguments(sub: argparse.ArgumentParser) -> None:
    choices = ["show", "verify", "replay", "diff", "merge", "truncate", "drop", "scale", "compact", "export"]
    sub.add_argument("action", choices=choices)
    sub.add_argument("files", metavar="FILE|RUN", nargs="+")
    sub.add_argument("--model", help="the base model (a run knows its own)")
    sub.add_argument("--to", metavar="PATH", help="file (or folder, for export) to write")
    sub.add_argument(
        "--round", type=int, help="for truncate: the last round kept; for drop: the round left out"
    )
    sub.add_argument("--factor", type=float, help="for scale")
    sub.add_argument("--threads", type=int, help="replay with so many threads")
    sub.add_argument(
        "--backend", default="auto", choices=["auto", "numba", "torch"], help="replay with these kernels"
    )


# Running --------------------------------------------------------------------------------------------


def _tune(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.cli.commands import tune

    tune.tune(args, ui)


def _sweep(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.cli.commands import sweep

    sweep.sweep(args, ui)


def _demo(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.cli.commands import demo

    demo.run(args, ui)


def _plan(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune import models
    from fleetune.planning import plan

    config = models.load_config(args.model, offline=args.offline)
    work = plan.Workload(batch=args.batch, length=args.length, steps=args.steps, dtype=args.dtype)
    ram, uplink = plan.parse_bytes(args.ram), plan.parse_rate(args.uplink)
    rows = plan.table(config, work, ram=ram, uplink=uplink)
    for row in rows:
        ui.event({"event": "plan", "model": args.model, **dataclasses.asdict(row), "fits": row.fits})
    if not ui.json:
        ui.header("fleetune plan", plan.describe(config, args.model, work, uplink=uplink))
        ui.table(plan.columns(rows), [plan.cells(row) for row in rows])
    method = plan.best(rows)
    if not ui.json:
        ui.paths([("next", f"fleetune tune {args.model} DATA --method {method}")])


def _eval(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.cli.commands import eval

    eval.run(args, ui, _run_or_none(args.model, args.out, quiet=True))


def _run_or_none(name: str, out: str, *, quiet: bool = False) -> Path | None:
    """The run that `name` means, None when it is no run's name; `quiet`: also where it looks like one."""
    from fleetune.runs import rundir

    if (
        name == "latest"
        or name.isdigit()
        or (Path(name) / "run.toml").is_file()
        or (Path(out) / name / "run.toml").is_file()
    ):
        try:
            return rundir.find(name, Path(out))
        except UsageError:
            if not quiet:
                raise
    return None


def _ledger(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.cli.commands import ledger

    ledger.run(args, ui, [_run_or_none(f, args.out) or Path(f) for f in args.files])


def _compress(args: argparse.Namespace, ui: Ui) -> None:
    compress.run(args, ui, _run_or_none(args.model, args.out, quiet=True) if args.model else None)


def _measure(args: argparse.Namespace, ui: Ui) -> None:
    measure.run(args, ui, [_run_or_none(name, args.out, quiet=True) for name in args.subjects])


def _export(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.cli.commands import export

    export.run(args, ui, _run_or_none(args.subject, args.out, quiet=True))


def _serve(args: argparse.Namespace, ui: Ui) -> None:
    serve.run(args, ui, _run_or_none(args.subject, args.out, quiet=True))


def _chat(args: argparse.Namespace, ui: Ui) -> None:
    chat.run(args, ui, _run_or_none(args.subject, args.out, quiet=True))


def _runs(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.cli.commands import runs

    runs.run(args, ui)


def _methods(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.cli.commands import lists

    lists.list_methods(args, ui)


def _models(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.cli.commands import lists

    lists.list_models(args, ui)


if __name__ == "__main__":
    sys.exit(main())
