# SPDX-License-Identifier: Apache-2.0
"""`fleetune completion SHELL`: the script that completes commands, options, methods, settings and runs."""

from __future__ import annotations

import argparse

from fleetune.cli.console import Ui
from fleetune.common.events import TextShown

HELP = "print the script that completes fleetune's words in a shell"
ORDER = 160
EXAMPLES = """\
fleetune completion bash   in ~/.bashrc: eval "$(fleetune completion bash)"
fleetune completion zsh    in ~/.zshrc, after compinit: eval "$(fleetune completion zsh)"
fleetune completion fish   in ~/.config/fish/config.fish: fleetune completion fish | source
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from fleetune.cli import completion

    sub.add_argument("shell", metavar="SHELL", choices=completion.SHELLS, help="bash, zsh or fish")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Print the script."""
    from fleetune.cli import completion

    text = completion.script(args.shell)
    ui.event(TextShown(text=text))
    if not ui.json:
        ui.text(text)
