# SPDX-License-Identifier: Apache-2.0
"""Build the parser of the command line: every command with its help and examples, and the arguments of the one that is run."""

from __future__ import annotations

import argparse
import textwrap
from contextlib import suppress
from typing import Final

from fleetune.cli.parser import Parser
from fleetune.common.registry import Registry
from fleetune.common.version import __version__
from fleetune.errors import UsageError

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
  fleetune compress latest                                     4 bits a weight, solved block by block
  fleetune export latest --to gguf                             one file for llama.cpp, read back bit for bit
  fleetune measure latest --kept-gain                          size, speed, and what of the tuning is kept
  fleetune serve latest                                        an OpenAI-compatible endpoint and a chat page
"""


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


def plain_arguments(parser: argparse.ArgumentParser, command: str) -> list[str]:
    """Return the names of a command's arguments that have no flag."""
    return [action.dest for action in sub_parser(parser, command)._actions if not action.option_strings]


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser by name (for the docs)."""
    (action,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    found: dict[str, argparse.ArgumentParser] = dict(action.choices)
    return found


def _common_arguments() -> Parser:
    common = Parser(add_help=False)
    group = common.add_argument_group("everywhere")
    group.add_argument("--json", action="store_true", help="one JSON object per event on stdout")
    group.add_argument("--out", default="runs", metavar="DIR", help="folder of the runs (default ./runs)")
    group.add_argument("--offline", action="store_true", help="never use the network")
    group.add_argument("-q", "--quiet", action="count", default=0, help="say less (-qq: errors alone)")
    group.add_argument("-v", "--verbose", action="count", default=0, help="say more (-vv: everything)")
    return common


def flags_by_command() -> dict[str, list[str]]:
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
