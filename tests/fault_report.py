"""Count injected faults, and those survived, in one JSON file: pytest --faults-json docs/faults.json -m 'faults or injects'.

A test takes the fixture `injected` and states what it did: injected("kind", how many, survived=how many).  A kind that ran
replaces what the file had of it; the others stay, so that a part can be run again.  docs/build.py makes a page of it.
"""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KINDS = {  # what is injected -> what it means that it was survived
    "kill -9 of the server": "no round is lost or counted twice; the run ends in the digest of the run without kills",
    "kill -9 of a device": "no round is lost or counted twice; the run ends in the digest of the run without kills",
    "malformed answers": "refused with its own reason, for each method; the round is as if that device had been away",
    "mutated answers": "refused with a reason, or within what was agreed; the other replies count, the model stays finite",
    "forged identities": "refused, with a line in the audit log",
    "answers twice, late or out of order": "each client has one answer a round, and it is its own",
    "devices away or slow for a round": "the round goes on without them after the time that was given",
    "two processes with one key": "one answer of the client a round, or the reason why there is none",
    "connections cut in a message": "the run ends in the digest of the run without cuts",
    "clock of the server set by a day": "no device goes offline, no order expires, devices whose clock is right come in",
    "clock of a device set by a day": "refused; the device is told which clock is wrong and what to do",
    "clock of server and devices set by a day in a run": "the run ends in the digest of the run without jumps",
    "disk of the server full": "the run stops and says so, no file is half written; resumed, it ends in the same digest",
    "disk of a device full": "where the method keeps something on it (SCAFFOLD) its rounds fail with the reason; the run goes on, and the device takes part again",
    "torn files of the server": "read as they were, mended, or refused by name",
    "torn files of a device": "the work is done again, or its answer says which file is damaged",
    "torn folders of jobs": "right, refused by name, or a loss that is said",
    "damaged model folders": "refused with an error of Fleetune's, or loaded, within 10 s of processor time",
    "damaged GGUF files": "refused with an error of Fleetune's, or loaded, within 10 s of processor time",
    "damaged data files": "refused with an error of Fleetune's, or read, within 10 s of processor time",
    "one bit of what a model was made from": "`fleetune verify` finds it, and names the place: base, ledger, adapter, artefact, file, release",
    "mutated messages": "refused with a reason, or within what was agreed",
}
COUNTS: pytest.StashKey[dict[str, list[int]]] = pytest.StashKey()
Injected = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-json", metavar="FILE", help="add what was injected and survived to this file")


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Injected:
    """Return a function that counts: `injected(kind, number, survived=number)`."""
    counts = request.config.stash.setdefault(COUNTS, {})

    def count(kind: str, number: int, *, survived: int | None = None) -> None:
        assert kind in KINDS, f"{kind} is not in KINDS"
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
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    stamp = {"date": today, "commit": _commit(), **_machine()}
    for kind, (number, survived) in counts.items():
        kinds[kind] = {"injected": number, "survived": survived, "means": KINDS[kind], **stamp}
    content = {"kinds": {kind: kinds[kind] for kind in KINDS if kind in kinds}}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _machine() -> dict[str, str | int]:
    from importlib.metadata import version

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "flwr"))
    versions = f"python {platform.python_version()} {versions}"
    return {"cpu": [*named, platform.processor()][0], "cores": os.cpu_count() or 0, "versions": versions}
