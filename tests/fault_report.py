# SPDX-License-Identifier: Apache-2.0
"""Count injected faults, and those survived, in one JSON file: pytest --faults-json docs/faults.json -m faults.

A test takes the fixture `injected` and states what it did: injected("kind", how many, survived=how many).  A kind that ran
replaces what the file had of it; the others stay, so that a part can be run again.  docs/build.py makes a page of it.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COUNTS: pytest.StashKey[dict[str, list[int]]] = pytest.StashKey()
Injected = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-json", metavar="FILE", help="add what was injected and survived to this file")


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Injected:
    """Return a function that counts: `injected(kind, number, survived=number)`."""
    counts = request.config.stash.setdefault(COUNTS, {})

    def count(kind: str, number: int, *, survived: int | None = None) -> None:
        found = counts.setdefault(kind, [0, 0])
        found[0] += number
        found[1] += number if survived is None else survived

    return count


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--faults-json")
    counts = session.config.stash.get(COUNTS, {})
    if not target or not counts:
        return
    file = Path(target)
    kinds = json.loads(file.read_text(encoding="utf-8"))["kinds"] if file.exists() else {}
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        **_machine(),
    }
    for kind, (number, survived) in counts.items():
        kinds[kind] = {"injected": number, "survived": survived, **stamp}
    content = {"kinds": dict(sorted(kinds.items()))}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _machine() -> dict[str, str | int]:
    from importlib.metadata import version

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor()
    )
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "flwr"))
    return {
        "cpu": cpu, "cores": os.cpu_count() or 0, "versions": f"python {platform.python_version()} {versions}",
    }  # fmt: skip
