"""Measure a result on a device's held-out rows: only sums leave it.

rows, tokens    how many were measured (of an encoder a row scores one thing: tokens = rows)
base, tuned     the summed cross-entropy of the answers' tokens, in nats; the mean is at most `TIMES` ln V, rounded to
                `EXACT` nats: a server that makes its model for it reads rows out of the digits
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from fleetune import data
from fleetune.errors import DataError
from fleetune.evaluation.losses import all_row_losses
from fleetune.fleet import result
from fleetune.fleet.device_state import DeviceState
from fleetune.fleet.orders import Job
from fleetune.models.net.model import Model
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode

EXACT: Final = 1e-3  # nats per token
TIMES: Final = 2.0  # the loss of a guess among all V tokens: more than that says nothing of a model
BATCH: Final = 1  # rows at a time: a device that has trained has the memory for one


def measure(
    job: Job, model: Model, held: Sequence[data.Encoded], words: str, order: bytes, own: DeviceState
) -> bytes:
    """Return the answer to an order `eval`; the model is the base, and afterwards the tuned model.

    `words` is the digest of the held-out rows before they were encoded.  The files of the job's result go into the run's
    folder; without a result the base alone is measured.
    """
    own.allow_measurement(words, job)
    received = decode(order)
    base, counts = all_row_losses(model, held, BATCH)
    tuned = base
    if job.result:
        try:
            result.put_on(model, result.placed(received.payload.scalars, own, job))
        finally:
            own.remove(own.run(job.run) / result.FOLDER)
        tuned, _ = all_row_losses(model, held, BATCH)
    tokens = int(counts.sum())
    most = TIMES * math.log(max(2, model.net.config.vocab_size))

    def told(found: np.ndarray) -> float:
        return round(min(float(np.sum(found)) / tokens, most) / EXACT) * EXACT * tokens

    sums = {"rows": len(held), "tokens": tokens, "base": told(base), "tuned": told(tuned)}
    return encode(Message(received.round, received.base, Payload({}, sums)))


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
) -> tuple[Sequence[data.Example], Sequence[data.Example]]:
    """Return (training rows, held-out rows): a share (below 1) or a number of `source`, or all of `eval_data`.

    `columns` says which columns are which, `note` is told what of the rows was left out (`data.read`).  A row that is equal
    to a held-out one is no training row either.  DataError when `eval_data` has rows of `source`, or no training row is left.
    """
    examples = data.read(source, columns=columns, note=note, offline=offline)
    if eval_data:
        held = data.read(eval_data, columns=columns, note=note, offline=offline)
        if shared := len({e.content for e in held} & {e.content for e in examples}):
            raise DataError(
                f"{shared} rows of {eval_data} are rows of {source} as well: they would be trained on",
                hint="take them out of one of the files; or hold rows of one file out: --held-out",
            )
        return examples, held
    if not held_out:
        return examples, []
    train, aside = data.hold_out(examples, held_out, SEED)
    held = [examples[i] for i in aside.tolist()]
    known = {e.content for e in held}
    training = [e for i in train.tolist() if (e := examples[i]).content not in known]
    if not training:
        raise DataError(
            f"every row of {source} is equal to a held-out one: none is left to train on",
            hint="hold out fewer rows",
        )
    return training, held


def digest(rows: Sequence[data.Example]) -> str:
    """Return the SHA-256 of rows' words, however a job has them encoded."""
    return hashlib.sha256(json.dumps([row.content for row in rows]).encode()).hexdigest()
