# SPDX-License-Identifier: Apache-2.0
"""`fleetune verify`: compare the files of a run or a model with the digests that were written with them."""

from __future__ import annotations

import argparse
from pathlib import Path

from fleetune import models, subject
from fleetune.cli.console import Ui
from fleetune.common import sums
from fleetune.common.events import FilesVerified
from fleetune.errors import ModelError, UsageError

HELP = "compare the files of a run or a model with the digests that were written with them"
ORDER = 62
EXAMPLES = """\
fleetune verify latest                  the newest run or compression
fleetune verify smollm2-135m            a model in the cache
fleetune verify runs/0003-rtn-x/model   any folder with a SHA256SUMS, or with such folders in it
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument("model", metavar="MODEL", help="a run, a compressed model, a model, or a folder")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Compare all files that are listed in the folder and in those under it; ModelError for those that differ."""
    folder = _folder(args)
    lists = sorted(file.parent for file in folder.rglob(sums.FILE))
    if not lists:
        raise UsageError(
            f"{folder} states no digests: there is no {sums.FILE} in it",
            hint="name a finished run, a compression or a model in the cache: fleetune runs, fleetune models",
        )
    count = sum((place / sums.FILE).read_bytes().count(b"\n") for place in lists)
    found = [words for place in lists for _, words in sums.faults(place)]
    ui.event(FilesVerified(folder=str(folder), files=count, faults=found))
    if found:
        raise ModelError("\n  ".join(found), hint="make it again, or copy it again from where it was made")
    ui.paths([("folder", str(folder)), ("files", f"{count}, all as they were written")])


def _folder(args: argparse.Namespace) -> Path:
    if (path := Path(args.model)).is_dir():
        return path
    found = subject.open(args.model, args.out)
    if isinstance(found, subject.Plain):
        return models.resolve(found.name, offline=True)
    folder = found.folder if isinstance(found, subject.Run) else found.folder or found.artefact
    assert folder is not None
    return folder
