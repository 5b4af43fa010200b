# SPDX-License-Identifier: Apache-2.0
"""`fleetune version`: the version, as `fleetune --version` prints it."""

from __future__ import annotations

import argparse

from fleetune.cli.console import Ui
from fleetune.common.events import TextShown
from fleetune.common.version import __version__

HELP = "print the version"
ORDER = 170
EXAMPLES = """\
fleetune version
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments: none."""


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Print name and version."""
    text = f"fleetune {__version__}\n"
    ui.event(TextShown(text=text))
    if not ui.json:
        ui.text(text)
