# SPDX-License-Identifier: Apache-2.0
"""Run a command, and turn errors into exit codes.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

from fleetune.cli.console import Ui
from fleetune.cli.parser import COMMANDS, build_parser, command_in, parse
from fleetune.common.display import message_text
from fleetune.common.memory import is_out_of_memory
from fleetune.errors import FitError, FleetuneError, Interrupted, cut_reason, fault
from fleetune.seeds import chosen_kernels

log = logging.getLogger(__name__)

SLOW: Final = ("torch", "transformers")  # the packages that take seconds to import
LOADING: Final = "loading torch and transformers .."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code (0 ok, 1 failed, 2 usage, 3 does not fit, 4 fleet, 130 stopped)."""
    if argv is None:
        # the process ends with the command: to search for cycles what is left then would take a second
        atexit.register(gc.freeze)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks which words fit
        import argcomplete

        argcomplete.autocomplete(build_parser(command_in(os.environ.get("COMP_LINE", "").split()[1:])))
    words = list(sys.argv[1:] if argv is None else argv)
    ui = Ui(json="--json" in words)
    try:
        args = parse(words or ["--help"])
        ui = Ui(quiet=args.quiet, json=args.json)
        _set_environment(args)
        chosen_kernels()  # a wrong choice is refused before any work
        with announcing(ui):
            _run(args, ui)
    except FleetuneError as error:
        ui.error(error)
        return error.exit_code
    except KeyboardInterrupt as error:  # a job that can be resumed leaves how as a note, the outermost last
        ui.error(Interrupted("stopped", hint=[None, *getattr(error, "__notes__", [])][-1]))
        return Interrupted.exit_code
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        why = cut_reason(f"memory does not suffice for this ({str(error) or type(error).__name__})")
        fit = FitError(why, hint="what fits: fleetune plan MODEL --ram 4GB")
        ui.error(fit)
        return fit.exit_code
    return int(ui.output_lost)


def _run(args: argparse.Namespace, ui: Ui) -> None:
    """Run a command.  FleetuneError where code that it ran, and which is not ours, called sys.exit(): no success."""
    try:
        COMMANDS.load(args.command).run(args, ui)
    except SystemExit as error:
        log.info("the command was ended here", exc_info=error)
        raise FleetuneError(
            f"the command was not finished: {fault(error)}",
            hint="a function, module or plug-in that it uses called sys.exit(); -v shows where",
        ) from error


class _Watch(MetaPathFinder):
    """Call `say` once, when one of SLOW is looked for; find nothing itself."""

    def __init__(self, say: Callable[[], None]) -> None:
        self.say = say

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in SLOW:
            self.end()
            self.say()
        return None

    def end(self) -> None:
        """End the watch; nothing happens where it has ended."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


@contextmanager
def announcing(ui: Ui) -> Iterator[None]:
    """Say on a terminal that torch is loading, which takes seconds, at the first such import of the block."""
    if not ui.on_terminal or any(name in sys.modules for name in SLOW):
        yield
        return
    watch = _Watch(lambda: ui.note(LOADING))
    sys.meta_path.insert(0, watch)
    try:
        yield
    finally:
        watch.end()


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
