# SPDX-License-Identifier: Apache-2.0
"""`fleetune help [COMMAND]`: the commands, or one command with its options and examples."""

from __future__ import annotations

import argparse

from fleetune.cli.console import Ui
from fleetune.common.events import TextShown
from fleetune.errors import UsageError, suggest

HELP = "show the commands, or one with its options and examples"
ORDER = 180
EXAMPLES = """\
fleetune help        the commands
fleetune help tune   its options and examples
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument("words", metavar="COMMAND", nargs="*", help="a command (its verbs are on its own page)")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Print a help page."""
    from fleetune.cli import command_line

    name = args.words[0] if args.words else ""
    known = list(command_line.COMMANDS.members())
    if name and name not in known:
        raise UsageError(f"no command '{name}'.{suggest(name, known)}", hint="the commands: fleetune help")
    page = command_line.help_page(name)
    ui.event(TextShown(text=page))
    if not ui.json:
        ui.text(page)
