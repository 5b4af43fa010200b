"""Count how often a run with differential privacy has released a round, in a file that is written before each release.

A resumed run may release a round again, with new noise: both releases count, so the file is never cut back.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fleetune.common.display import counted, quoted
from fleetune.common.files import read_text
from fleetune.errors import StorageError
from fleetune.runs import rundir

FILE: Final = "releases"  # in the run's folder: the count, and the CRC-32 of its digits


def released(run: Path) -> int:
    """Return how many releases a run has made; StorageError where its file does not say so, or fewer than it has rounds."""
    file, count, why = run / FILE, 0, "is gone"
    try:
        text = read_text(file)
        count = int(text.partition(" ")[0])
        why = f"says {count}" if text == _text(count) else "is damaged"
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        why = "is damaged"
    rounds = max((round for round, _ in rundir.checkpoints(run)), default=0)
    rounds = max([rounds, *(int(e["round"]) for e in rundir.events(run) if e["event"] == "round")])
    if why == "is damaged" or count < rounds:
        raise StorageError(
            f"{file} {why}, and the run has released {counted(rounds, 'round')} or more: what it has spent of its privacy "
            "is not known",
            hint=f"bring that file back as it was, or begin a new run: fleetune tune -c {quoted(run / 'run.toml')}",
        )
    return count


class Releases:
    """The releases of an open run: how many there were, and how many its budget allows."""

    def __init__(
        self, run: rundir.RunDir, epsilon: Callable[[int], float], within: Callable[[int, int], int]
    ) -> None:
        """`epsilon(n)` is spent by n releases; `within(rounds, n)` is how many of so many rounds may follow them."""
        self.count = released(run.path)
        self._run, self._epsilon, self._within = run, epsilon, within

    @property
    def epsilon(self) -> float:
        """Return what is spent."""
        return self._epsilon(self.count)

    def left(self, rounds: int) -> int:
        """Return how many of so many rounds the budget allows from now on."""
        return self._within(rounds, self.count)

    def check_left(self, rounds: int) -> None:
        """StorageError where no round is left to a run that has none: its result would be the start."""
        if not self.left(rounds):
            raise StorageError(
                f"no checkpoint of a round is left in {self._run.path}, and the privacy budget is spent",
                hint="put a good copy of a checkpoint back, or begin a new run: "
                f"fleetune tune -c {quoted(self._run.path / 'run.toml')}",
            )

    def add(self) -> None:
        """Count a release that is about to be made."""
        self._run.write(FILE, _text(self.count + 1), private=True)
        self.count += 1


def _text(count: int) -> str:
    return f"{count} {zlib.crc32(str(count).encode()):08x}\n"
