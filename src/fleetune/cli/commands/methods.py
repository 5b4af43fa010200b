"""`fleetune methods`: the tuning methods, or one with its settings."""

import argparse

from fleetune.cli.console import Ui
from fleetune.common.events import MethodListed, SettingListed
from fleetune.tuning import methods

HELP = "list the tuning methods, or one with its settings"
ORDER = 130
EXAMPLES = """\
fleetune methods
fleetune methods fedkseed     its settings, for --set NAME=VALUE
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument("name", metavar="NAME", nargs="?", help="a method, to list its settings")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """List the methods, or the settings of one."""
    if args.name:
        _settings(args.name, ui)
        return
    found = methods.entries().values()
    for e in found:
        ui.event(MethodListed(name=e.name, kind=e.kind, paper=e.paper, sends=e.sends))
    ui.table(
        ["method", "leaves", "sends", "paper"], [[e.name, e.kind, e.sends, e.paper] for e in found], spare=1
    )
    ui.paths([("next", "fleetune methods NAME")])


def _settings(name: str, ui: Ui) -> None:
    entry, found = methods.entry(name), methods.settings(name)
    for s in found:
        ui.event(
            SettingListed(
                method=entry.name,
                name=s.name,
                type=s.type.__name__,
                default=s.default,
                symbol=s.symbol,
                help=s.help,
            )
        )
    ui.paths(
        [("method", entry.summary), ("paper", entry.paper), ("sends", entry.sends), ("leaves", entry.kind)]
    )
    rows = [[s.name, s.symbol, s.type.__name__, s.shown, s.help] for s in found]
    ui.table(["--set", "symbol", "type", "default", "meaning"], rows, align="lllll")
