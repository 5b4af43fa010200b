"""Build the parser of the command line, run a command, and turn errors into exit codes.

A command is one file in `cli/commands/`: `HELP` (one line), `EXAMPLES`, `arguments(parser)` and `run(args, ui)`.  Another package
registers a module of that shape under the entry-point group `fleetune.commands`.  Only the command that is run is imported.
"""

import argparse
import atexit
import gc
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, Final

import fleetune.api  # noqa: F401  it sets how errors speak: before `as_written`
from fleetune.cli.console import Ui
from fleetune.cli.parser import Add, OptionReader, Parser, in_our_action, in_our_command, one_of
from fleetune.common import __version__, display
from fleetune.common.display import message_text, one_line, single_spaced
from fleetune.common.memory import is_out_of_memory
from fleetune.common.registry import Registry
from fleetune.errors import (
    FitError,
    FleetuneError,
    Interrupted,
    UsageError,
    as_written,
    cut_reason,
    fault,
    suggest,
)
from fleetune.seeds import chosen_kernels

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
  fleetune verify latest                                       prove what a model was made from
  fleetune compress latest                                     4 bits a weight, solved block by block
  fleetune export latest --to gguf                             one file for llama.cpp, read back bit for bit
  fleetune measure latest --kept-gain                          size, speed, and how much of the tuning gain survives
  fleetune serve latest                                        an OpenAI-compatible endpoint and a chat page
"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command line; UsageError for what is none.  `--help` and `--version` end the process.

    `understood` is what to say of words of other tools (""): the line in ours.
    """
    ours = in_our_command(words, COMMANDS.members())
    if command := command_in(ours):
        one_of(COMMANDS.members(), "COMMAND", "fleetune --help", command)
    parser, told = build_parser(command), ""
    if (sub := parser.commands.get(ours[0])) is not None:
        ours = in_our_action(ours, sub)
        options = OptionReader(command, sub)
        ours = [command, *options.read(ours[1:])]
        if ours != list(words):
            remarks = "".join(f"   ({remark})" for remark in options.remarks)
            told = f"understood as: {display.command(*ours)}{remarks}"
    args, unknown = parser.parse_known_args(ours)
    if getattr(args, "words", None) == [] and not any(word.startswith("-") for word in unknown):
        args.words, unknown = unknown, []  # argparse takes none that follow an option
    if unknown:
        flags = parser.commands[args.command].flags
        said = [word for word in unknown if word.startswith("-")] or unknown  # a word after one is its value
        lines = [f"unknown argument '{word}'.{suggest(word.partition('=')[0], flags)}" for word in said]
        setting = "; a setting of the method: --set NAME=VALUE" if "--set" in flags else ""
        raise UsageError("\n  ".join(lines), hint=f"fleetune {command} --help{setting}")
    args.understood = told
    return args


def command_in(words: Sequence[str]) -> str:
    """Return the command that is run; "" for none, whose help needs no arguments of any."""
    return next((word for word in words if not word.startswith("-")), "")


def build_parser(command: str | None = None) -> Parser:
    """Return the parser, with the arguments of one command (None: of all, for the docs)."""
    parser = Parser(
        prog="fleetune",
        description="Fine-tune language models across a fleet of edge devices.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"fleetune {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for member in sorted(COMMANDS.members().values(), key=lambda m: m.order):
        text, examples = member.text("HELP"), member.text("EXAMPLES")
        parser.commands[member.name] = sub = subparsers.add_parser(
            member.name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"examples:\n{textwrap.indent(examples, '  ')}" if examples else None,
        )
        if command in (None, member.name):
            _everywhere(sub.group("everywhere"))
            COMMANDS.load(member.name).arguments(sub)
    return parser


def _everywhere(add: Add) -> None:
    add("--json", action="store_true", help="one JSON object per event on stdout")
    add("--out", default="runs", metavar="DIR", help="folder of the runs (default ./runs)")
    add("--offline", action="store_true", help="never use the network")
    add("-q", "--quiet", action="count", default=0, help="say less (-qq: errors alone)")
    add("-v", "--verbose", action="count", default=0, help="say more (-vv: everything)")


def command_parsers() -> dict[str, Parser]:
    """Return every command's parser by name (for the docs)."""
    return build_parser().commands


log = logging.getLogger(__name__)


@as_written()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code (0 ok, 1 failed, 2 usage, 3 does not fit, 4 fleet, 130 stopped)."""
    if argv is None:
        gc.set_threshold(700, 10, 1000)  # each search for cycles in all that is loaded takes 0.1 s, ..
        atexit.register(gc.freeze)  # .. the one at the end a second
    if "_ARGCOMPLETE" in os.environ:  # a shell asks which words fit
        import argcomplete

        argcomplete.autocomplete(build_parser(command_in(os.environ.get("COMP_LINE", "").split()[1:])))
    words = list(sys.argv[1:] if argv is None else argv)
    ui = Ui(json="--json" in words)
    try:
        args = parse(words or ["--help"])
        ui = Ui(quiet=args.quiet, json=args.json)
        if args.understood:
            ui.note(args.understood)
        _set_environment(args)
        chosen_kernels()  # a wrong choice is refused before any work
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
        why = cut_reason(f"not enough memory for this ({str(error) or type(error).__name__})")
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


class _Formatter(logging.Formatter):
    """Writes names of files, and a server's words, in a message or a traceback so that they cannot drive a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return message_text(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        lines = [(line, line.lstrip(" ")) for line in super().formatException(ei).split("\n")]
        return "\n".join(" " * min(8, 2 + len(a) - len(b)) + single_spaced(one_line(b)) for a, b in lines)


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
    os.environ.setdefault("USE_HUB_KERNELS", "NO")  # code that transformers would fetch for some nets
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


if __name__ == "__main__":
    sys.exit(main())
