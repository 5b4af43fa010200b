"""Measure a result on a device's held-out rows: only sums leave it.

rows, tokens    how many were measured (of an encoder a row scores one thing: tokens = rows)
base, tuned     the summed cross-entropy of the answers' tokens, in nats; the mean is at most `TIMES` ln V, rounded to
                `EXACT` nats: a server that makes its model for it reads rows out of the digits
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from fleetune import data
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


def digest(rows: Sequence[data.Example]) -> str:
    """Return the SHA-256 of rows' words, however a job has them encoded."""
    return hashlib.sha256(json.dumps([row.content for row in rows]).encode()).hexdigest()
