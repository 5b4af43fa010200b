# SPDX-License-Identifier: Apache-2.0
"""Parse the command line, run a command, and turn errors into exit codes.

A command is one file in `cli/commands/`: `HELP` (one line), `arguments(parser)` and `run(args, ui)`.  The folder is the
registry; another package registers a module of that shape under the entry-point group `fleetune.commands`.  Only the
command that is run is imported.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from fleetune.cli import unknown as unknowns
from fleetune.cli.announce import announcing
from fleetune.cli.console import Ui
from fleetune.cli.engine_flags import Signalled
from fleetune.cli.parser import Parser
from fleetune.common.memory import is_out_of_memory
from fleetune.common.registry import Registry
from fleetune.common.version import __version__
from fleetune.errors import FitError, FleetuneError, Interrupted, UsageError, cut_reason, fault
from fleetune.seeds.kernel_choice import chosen_kernels

log = logging.getLogger(__name__)

COMMANDS: Final = Registry(
    "command", "fleetune.cli.commands", "fleetune.commands", ("HELP",), "fleetune --help"
)

EXAMPLES = """\
examples:
  fleetune demo                                                a real job in minutes, nothing to configure
  fleetune plan smollm2-135m --ram 4GB --uplink 1Mbps          which method fits this device
  fleetune tune smollm2-135m data.jsonl --method fedkseed --clients 20 --rounds 10 --set K=4096
  fleetune tune --resume latest                                continue after a stop
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
    words = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        from fleetune.cli import completion

        completion.answer()  # and end the process
    if not words:
        Ui().text(help_page(""))
        return 0
    first = Ui(json="--json" in words)
    try:
        parser = build_parser(_command_in(words))
    except FleetuneError as error:  # of a registered command
        first.error(error)
        return error.exit_code
    except SystemExit as error:
        return _told_of_exit(first, error)
    try:
        unknowns.check_set(_command_in(words), words)
        args, unknown = parser.parse_known_args(words)
    except UsageError as error:
        first.error(error)
        return error.exit_code
    ui = Ui(quiet=args.quiet, json=args.json)
    _set_environment(args)
    try:
        if unknown:
            raise unknowns.error(args, words, unknown, _flags_by_command)
        chosen_kernels()  # a wrong choice is refused before any work
        with announcing(ui):
            COMMANDS.load(args.command).run(args, ui)
    except FleetuneError as error:
        ui.error(error)
        return error.exit_code
    except Signalled:
        raise
    except SystemExit as error:
        return _told_of_exit(ui, error)
    except KeyboardInterrupt:
        ui.error(Interrupted("stopped"))
        return 130
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        why = cut_reason(f"memory does not suffice for this ({str(error) or type(error).__name__})")
        fit = FitError(why, hint="what fits: fleetune plan MODEL --ram 4GB")
        ui.error(fit)
        return fit.exit_code
    return int(ui.output_lost)


def _told_of_exit(ui: Ui, error: SystemExit) -> int:
    """Say that code which a command ran, and which is not ours, called sys.exit(): no success, whatever it gave."""
    log.info("the command was ended here", exc_info=error)
    failed = FleetuneError(
        f"the command was not finished: {fault(error)}",
        hint="a function, module or plug-in that it uses called sys.exit(); -v shows where",
    )
    ui.error(failed)
    return failed.exit_code


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the arguments of one command (None: of all, for the docs)."""
    parser = Parser(
        prog="fleetune",
        description="Fine-tune language models across a fleet of edge devices.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"fleetune {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    common = _common_arguments()
    members = COMMANDS.members().values()
    for member in sorted(members, key=lambda m: m.order):
        text, examples = member.text("HELP"), member.text("EXAMPLES")
        sub = subparsers.add_parser(
            member.name,
            parents=[common],
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"examples:\n{textwrap.indent(examples, '  ')}" if examples else None,
        )
        if command in (None, member.name):
            COMMANDS.load(member.name).arguments(sub)
    return parser


def help_page(command: str) -> str:
    """Return the help of a command; "" gives the list of commands."""
    parser = build_parser(command)
    return (sub_parser(parser, command) if command else parser).format_help()


def sub_parser(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    """Return the parser of one command."""
    (action,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    found: argparse.ArgumentParser = action.choices[command]
    return found


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser by name (for the docs)."""
    (action,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    found: dict[str, argparse.ArgumentParser] = dict(action.choices)
    return found


def _command_in(words: Sequence[str]) -> str | None:
    """The command that is run; "" for none, whose help needs no arguments of any."""
    return next((word for word in words if not word.startswith("-")), "")


def _common_arguments() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("everywhere")
    group.add_argument("--json", action="store_true", help="one JSON object per event on stdout")
    group.add_argument("--out", default="runs", metavar="DIR", help="folder of the runs (default ./runs)")
    group.add_argument("--offline", action="store_true", help="never use the network")
    group.add_argument("-q", "--quiet", action="count", default=0, help="say less (-qq: errors alone)")
    group.add_argument("-v", "--verbose", action="count", default=0, help="say more (-vv: everything)")
    return common


def _flags_by_command() -> dict[str, list[str]]:
    """Every command's options; those of another package's command that cannot be imported are left out."""
    found = {}
    for member in sorted(COMMANDS.members().values(), key=lambda m: m.order):
        with suppress(UsageError):
            found[member.name] = _flags_of(member.name)
    return found


def _flags_of(command: str) -> list[str]:
    parser = Parser(parents=[_common_arguments()])
    COMMANDS.load(command).arguments(parser)
    return [flag for action in parser._actions for flag in action.option_strings]


def _set_environment(args: argparse.Namespace) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
