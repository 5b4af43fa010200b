"""`fleetune release`: write a finished run as one signed folder."""

import argparse

import fleetune
from fleetune.cli.console import Ui
from fleetune.common.display import human_bytes, quoted

HELP = "write a finished run as one signed folder, ready to upload"
ORDER = 63
EXAMPLES = """\
fleetune release latest
fleetune release 3 --to shop-assistant --key ~/.ssh/id_ed25519
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument("run", metavar="RUN", help="a finished run")
    sub.add_argument("--to", metavar="FOLDER", help="folder to write (default: release, in the run)")
    sub.add_argument(
        "--key", metavar="FILE", help="ed25519 key of ssh-keygen (default: your own of Fleetune, made once)"
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Write the folder, and print who signed it."""
    done = fleetune.release(args.run, to=args.to, key=args.key, out=args.out)
    ui.event(done)
    ui.paths(
        [
            ("result", f"{done.folder} ({human_bytes(done.bytes)})"),
            ("signer", done.signer),
            ("key", done.key),
            ("next", f"fleetune verify {quoted(done.folder)} --signer {done.signer}"),
        ]
    )
