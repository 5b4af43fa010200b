# SPDX-License-Identifier: Apache-2.0
"""Follow the validation of a run: which evaluated round is the best, and when to stop since none gets better.

A round is better where its score is lower than that of every evaluated round before it, the start (round 0) among them.
Every checkpoint holds how this stood (`Course`), and with `keep = "best"` the state of the best round lies beside the
checkpoints, in best-NNNNNN.ckpt, written before the checkpoint that names it.  Best rounds only ever get later, so that of
the checkpoint of round r is the latest of them up to r: those that no kept checkpoint needs are removed.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Final, NamedTuple

from fleetune.common.files import PRIVATE, read_bytes, write_atomic
from fleetune.errors import MessageError
from fleetune.runs import rundir
from fleetune.runs.rundir import RunDir

NAME: Final = "course"  # of the scalar in a checkpoint
CHOICES: Final = ("last", "best")


class Course(NamedTuple):
    """How the validation stands: the best round, its score, and the evaluated rounds since."""

    best: int | None = None  # None before the first score
    score: float = math.inf
    stale: int = 0

    def after(self, round: int, score: float | None) -> Course:
        """Return how it stands after a round was evaluated; one without a finite score counts as no better."""
        if score is not None and math.isfinite(score) and (self.best is None or score < self.score):
            return Course(round, score, 0)
        return self._replace(stale=self.stale + 1)

    def to_json(self) -> str:
        """Return it as a checkpoint holds it."""
        return json.dumps([self.best, self.score if self.best is not None else None, self.stale])

    @classmethod
    def from_json(cls, text: str) -> Course:
        """Read it from a checkpoint; MessageError when it is damaged."""
        try:
            best, score, stale = json.loads(text)
            if best is None:
                return cls(stale=int(stale))
            return cls(int(best), float(score), int(stale))
        except (ValueError, TypeError) as error:
            raise MessageError(f"the best round in the checkpoint is damaged ({error})") from error


def bests(run: Path) -> list[tuple[int, Path]]:
    """List the kept states of best rounds, oldest first."""
    found = [
        (re.fullmatch(r"best-(\d+)\.ckpt", p.name), p) for p in (run / "checkpoints").glob("best-*.ckpt")
    ]
    return sorted((int(m[1]), p) for m, p in found if m)


def keep(run: RunDir, round: int, data: bytes) -> None:
    """Write the state of a best round."""
    write_atomic(_file(run.path, round), data, mode=PRIVATE)


def kept(run: Path, round: int) -> bytes:
    """Read the state of a best round; MessageError when it is gone."""
    try:
        return read_bytes(_file(run, round))
    except OSError as error:
        raise MessageError(
            f"the state of the best round, {round}, cannot be read: {error.strerror}"
        ) from error


def forget(run: RunDir) -> None:
    """Remove the states of best rounds that no checkpoint needs any more."""
    oldest = min((number for number, _ in rundir.checkpoints(run.path)), default=0)
    needed = max((number for number, _ in bests(run.path) if number <= oldest), default=0)
    for number, path in bests(run.path):
        if number < needed:
            path.unlink(missing_ok=True)


def cut(run: RunDir, round: int) -> None:
    """Remove those of rounds after `round`, which a kill left."""
    for number, path in bests(run.path):
        if number > round:
            path.unlink(missing_ok=True)


def _file(run: Path, round: int) -> Path:
    return run / "checkpoints" / f"best-{round:06d}.ckpt"
