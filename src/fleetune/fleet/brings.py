"""Say what a device brings, and read its rows; without torch, so that a device can say that it is there before that is loaded."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from fleetune.common.display import counted
from fleetune.data import Example, hold_out, read
from fleetune.errors import DataError, UsageError
from fleetune.privacy import mechanism, secagg

log = logging.getLogger(__name__)

SEED: Final = 0  # of the order in which rows are drawn


def divided(
    source: str,
    held_out: float = 0,
    eval_data: str = "",
    *,
    columns: str = "",
    note: Callable[[str], None] = log.warning,
    offline: bool = False,
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return (training rows, held-out rows): a share (below 1) or a number of `source`, or all of `eval_data`.

    `columns` says which columns are which, `note` is told what of the rows was left out (`data.read`).  A row that is equal
    to a held-out one is no training row either.  DataError when `eval_data` has rows of `source`, or no training row is left.
    """
    examples = read(source, columns=columns, note=note, offline=offline)
    if eval_data:
        held = read(eval_data, columns=columns, note=note, offline=offline)
        if shared := len({e.content for e in held} & {e.content for e in examples}):
            raise DataError(
                f"{shared} rows of {eval_data} are rows of {source} as well: they would be trained on",
                hint="take them out of one of the files; or hold rows of one file out: --held-out",
            )
        return examples, held
    if not held_out:
        return examples, []
    train, aside = hold_out(examples, held_out, SEED)
    held = [examples[i] for i in aside.tolist()]
    known = {e.content for e in held}
    training = [e for i in train.tolist() if (e := examples[i]).content not in known]
    if not training:
        raise DataError(
            f"every row of {source} is equal to a held-out one: none is left to train on",
            hint="hold out fewer rows",
        )
    return training, held


@dataclass(frozen=True)
class Brings:
    """What a device brings: its rows, perhaps its own copy of the model, and how it computes."""

    data: str
    model: str = ""  # "": as the job names it, unless that is a path
    device: str = "auto"
    threads: int = 0  # 0: as many as a simulated run of the model would take
    memory: int = 0  # bytes that the work may take; 0: all that the machine has
    offline: bool = False
    held_out: float = 0  # of the rows: a share (below 1) or a number, that is never trained on
    eval_data: str = ""  # or a file of its own with rows to measure on
    columns: str = ""  # which columns of the rows are which
    base: str = "auto"  # where the base's weights are, as in `models.load`
    calibrate: bool = False  # whether sums over its rows may leave it
    least: int = 0  # replies in a secure sum, in which alone its own leave; 0: the server may see them
    epsilon: float = 0.0  # its own privacy budget, over all runs; 0: none
    delta: float = 1e-5  # of that budget
    every_turn: bool = False  # earlier answers of a conversation are trained on, too, each as a row

    def __post_init__(self) -> None:
        numbers = type(self.least) is int and {type(self.epsilon), type(self.delta)} <= {int, float}
        if not (numbers and self.least >= 0 and 0 <= self.epsilon < math.inf and 0 < self.delta < 1):
            raise UsageError(
                "a device's budget is such as --epsilon 8 --delta 1e-5, its --smallest-sum such as 10"
            )
        if self.epsilon:
            mechanism.accounting_version()  # or what to install

    def part(self, held_out: int) -> str:
        """Return what a device with so many held-out rows takes part in, and in what it does not."""
        measures = (
            f"measures results on {counted(held_out, 'held-out row')}"
            if held_out
            else "measures no result (--held-out)"
        )
        trains = "trains on its rows"
        if self.least:
            trains += f", for secure sums of {max(secagg.FEWEST, self.least)} devices or more alone"
        if self.epsilon:
            trains += f", with noise of its own, up to epsilon {self.epsilon:g}"
        sums = "gives sums over its rows for calibration" if self.calibrate else "gives no sums (--calibrate)"
        return f"{trains}, {measures}, {sums}"

    def divided(self, note: Callable[[str], None] = log.info) -> tuple[Sequence[Example], Sequence[Example]]:
        """Return (training rows, held-out rows); DataError as in `divided`."""
        rows, held = divided(
            self.data, self.held_out, self.eval_data, columns=self.columns, note=note, offline=self.offline
        )
        return [*rows, *(turn for row in rows for turn in row.earlier() if self.every_turn)], held
