"""`fleetune verify`: prove what a model was made from."""

import argparse
from pathlib import Path

from fleetune.cli.console import Ui, console_listener

HELP = "prove what a model was made from: rebuild it, and compare every byte"
ORDER = 62
EXAMPLES = """\
fleetune verify latest                                  a run: base -> ledger -> weights
fleetune verify runs/0003-rtn-x/0003-rtn-x.gguf         a file: base -> ledger -> codes -> file
fleetune verify model.gguf --from 3                     a file that lies elsewhere
fleetune verify short.safetensors --from smollm2-135m   a ledger alone, on its base
fleetune verify release --signer SHA256:..              a release, by whom it must be
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument("subject", metavar="ANYTHING", help="a run, compression, model, release, file or folder")
    sub.add_argument(
        "--from",
        dest="sources",
        metavar="NAME",
        action="append",
        default=[],
        help="what it was made from, where that lies elsewhere: a base model, a run, a compression (may be repeated)",
    )
    sub.add_argument(
        "--signer", default="", metavar="KEY", help="fingerprint, public key or its file: of a release"
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Print each statement as it is proven; the first thing that differs is an error."""
    from fleetune.deploy.verify import PROVEN, Parents, told

    rows = list[tuple[str, str, str]]()
    with console_listener(ui) as listener:
        parents = Parents.of(args.sources, Path(args.out), listener, offline=args.offline)
        try:
            for link in told(args.subject, parents, signer=args.signer):
                rows.append((link.state, link.what, link.words))
        finally:
            if rows:
                ui.table(
                    ["", "what", "statement"], sorted(rows, key=lambda row: row[0] != PROVEN), align="lll"
                )
