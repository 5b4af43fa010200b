# SPDX-License-Identifier: Apache-2.0
"""State the work of a device in one round: steps, rows, tokens, and the type of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fleetune.errors import UsageError
from fleetune.models.cache.cache import PLACES
from fleetune.models.families.number_types import WEIGHTS

MOST_STEPS: Final = 1_000_000  # of a round: a pool of directions holds as many


@dataclass(frozen=True)
class Workload:
    """A device's round: `steps` steps on `batch` rows of `length` tokens, weights in `dtype`, in memory or mapped.

    By default rows are as long as `tune` takes at most, and as many as most methods take a step.
    """

    batch: int = 8
    length: int = 512
    steps: int = 200
    dtype: str = "fp32"
    base: str = "memory"  # or mapped: the base's weights stay in their file

    def __post_init__(self) -> None:
        wrong = [n for n in ("batch", "length", "steps") if getattr(self, n) < 1]
        if wrong:
            raise UsageError(f"--{wrong[0]} {getattr(self, wrong[0])} must be at least 1")
        if self.steps > MOST_STEPS:
            raise UsageError(f"--steps {self.steps} is more than {MOST_STEPS:,}")
        if self.dtype not in WEIGHTS:
            raise UsageError(f"no dtype named '{self.dtype}'", hint="choose one of " + ", ".join(WEIGHTS))
        if self.base not in PLACES:
            raise UsageError(f"no base named '{self.base}'", hint="choose one of " + ", ".join(PLACES))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return WEIGHTS[self.dtype].size
