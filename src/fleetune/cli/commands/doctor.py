# SPDX-License-Identifier: Apache-2.0
"""`fleetune doctor`: versions, machine, cache, engines and extras of this installation."""

from __future__ import annotations

import argparse
import dataclasses

from fleetune.cli.console import Ui
from fleetune.common.display import human_bytes
from fleetune.common.events import DoctorReport
from fleetune.deploy import doctor

HELP = "show versions, machine, cache, engines, and what is missing for what"
ORDER = 150
EXAMPLES = """\
fleetune doctor          what is here, and the pip line for what is not
fleetune doctor --json   the same for a bug report
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments: none."""


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Look at the installation and print it; what is missing is no error."""
    found = doctor.look()
    ui.event(DoctorReport(**dataclasses.asdict(found)))
    if ui.json:
        return
    versions = " · ".join(f"{name} {version or 'missing'}" for name, version in found.versions.items())
    limit = f" · OMP_NUM_THREADS={found.threads}" if found.threads else ""
    state = "writable" if found.cache_writable else "NOT writable"
    ui.paths([
        ("versions", versions), ("python", f"{found.python} · {found.program}"),
        ("machine", f"{found.system} · {found.processors} processors{limit} · {human_bytes(found.memory)} of memory"),
        ("gpu", (found.gpu and "an NVIDIA driver is here") or "none found"),
        ("cache", f"{found.cache} · {human_bytes(found.cache_bytes)} · {human_bytes(found.cache_free)} free · {state}"),
        ("network", "switched off by the environment" if found.offline else "allowed"),
    ])  # fmt: skip
    ui.table(
        ["engine of serve and chat", "here", "what it runs"],
        [
            [name, "yes" if here else "no", doctor.ENGINES.get(name, "")]
            for name, here in found.engines.items()
        ],
        align="lll",
    )
    rows = [
        [e.name, "yes" if not e.missing else "no", e.serves, e.install if e.missing else ""]
        for e in found.extras
    ]
    ui.table(["extra", "here", "for", "to add it"], rows, align="llll")
    for problem in found.problems:
        ui.note(f"problem: {problem}")
