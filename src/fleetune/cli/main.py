# SPDX-License-Identifier: Apache-2.0
"""Parse the command line, run a command, and turn errors into exit codes.

A command is one file in `cli/commands/`: `HELP` (one line), `EXAMPLES`, `arguments(parser)` and `run(args, ui)`.  The folder is
the registry; another package registers a module of that shape under the entry-point group `fleetune.commands`.  Only the
command that is run is imported.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import os
import sys
from collections.abc import Sequence

from fleetune.cli import unknown as unknowns
from fleetune.cli.announce import announcing
from fleetune.cli.command_line import (
    COMMANDS,
    EXAMPLES,
    build_parser,
    command_parsers,
    flags_by_command,
    help_page,
    plain_arguments,
)
from fleetune.cli.console import Ui
from fleetune.cli.engine_flags import Signalled
from fleetune.common.display import message_text
from fleetune.common.memory import is_out_of_memory
from fleetune.errors import FitError, FleetuneError, Interrupted, UsageError, cut_reason, fault
from fleetune.seeds import chosen_kernels

__all__ = ["COMMANDS", "EXAMPLES", "build_parser", "command_parsers", "main"]

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code (0 ok, 1 failed, 2 usage, 3 does not fit, 4 fleet, 130 stopped)."""
    if argv is None:
        # the process ends with the command: to search for cycles what is left then would take a second
        atexit.register(gc.freeze)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _answer(words)
    except KeyboardInterrupt as error:  # before the command began, or after it ended
        return _stopped(Ui(json="--json" in words), error)


def _answer(words: Sequence[str]) -> int:
    """Parse the words, run their command, and return its exit code."""
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
        unknowns.check_set(_command_in(words) or "", words)
        args, unknown = parser.parse_known_args(words)
    except UsageError as error:
        first.error(error)
        return error.exit_code
    ui = Ui(quiet=args.quiet, json=args.json)
    _set_environment(args)
    try:
        if unknown:
            raise unknowns.error(
                args, words, unknown, flags_by_command, plain_arguments(parser, args.command)
            )
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
    except KeyboardInterrupt as error:
        return _stopped(ui, error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        why = cut_reason(f"memory does not suffice for this ({str(error) or type(error).__name__})")
        fit = FitError(why, hint="what fits: fleetune plan MODEL --ram 4GB")
        ui.error(fit)
        return fit.exit_code
    return int(ui.output_lost)


def _stopped(ui: Ui, error: KeyboardInterrupt) -> int:
    """Say that Ctrl-C ended the command, and how it is resumed: a job that can be leaves that as a note, the outermost last."""
    ui.error(Interrupted("stopped", hint=[None, *getattr(error, "__notes__", [])][-1]))
    return 130


def _told_of_exit(ui: Ui, error: SystemExit) -> int:
    """Say that code which a command ran, and which is not ours, called sys.exit(): no success, whatever it gave."""
    log.info("the command was ended here", exc_info=error)
    failed = FleetuneError(
        f"the command was not finished: {fault(error)}",
        hint="a function, module or plug-in that it uses called sys.exit(); -v shows where",
    )
    ui.error(failed)
    return failed.exit_code


def _command_in(words: Sequence[str]) -> str | None:
    """The command that is run; "" for none, whose help needs no arguments of any."""
    return next((word for word in words if not word.startswith("-")), "")


class _Formatter(logging.Formatter):
    """Writes names of files in a message so that they cannot drive a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return message_text(super().formatMessage(record))


def _set_environment(args: argparse.Namespace) -> None:
    level = logging.DEBUG if args.verbose > 1 else logging.INFO if args.verbose else logging.WARNING
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[shown])
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
