# SPDX-License-Identifier: Apache-2.0
"""Measure a result on a device's held-out rows: only sums leave it.

The answer to the order `eval` holds

    rows, tokens    how many were measured (of an encoder a row scores one thing: tokens = rows)
    base, tuned     the summed cross-entropy of the answers' tokens, in nats, by the base and by the tuned model, with the mean
                    rounded to `EXACT` nats: a server that makes its model for it would else read rows out of further digits
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from fleetune.data import Encoded
from fleetune.evaluation.losses import all_row_losses
from fleetune.fleet import result
from fleetune.fleet.device_state import DeviceState
from fleetune.fleet.orders import Job
from fleetune.models.model import Model
from fleetune.tuning.messages import Message, Payload, decode, encode

EXACT: Final = 1e-4  # nats a token
BATCH: Final = 1  # rows at a time: a device that has trained has the memory for one


def measure(model: Model, held: Sequence[Encoded], order: bytes, own: DeviceState, job: Job) -> bytes:
    """Return the answer to an order `eval`; `model` is the base, and afterwards the tuned model.

    The files of the job's result go into the run's folder; without a result the base alone is measured.
    """
    received = decode(order)
    base, counts = all_row_losses(model, held, BATCH)
    tuned = base
    if job.result:
        own.measure(job.result)
        try:
            result.put_on(model, result.placed(received.payload.scalars, own, job))
        finally:
            own.remove(own.run(job.run) / result.FOLDER)
        tuned, _ = all_row_losses(model, held, BATCH)
    tokens = int(counts.sum())

    def told(losses: np.ndarray) -> float:
        return round(float(np.sum(losses)) / tokens / EXACT) * EXACT * tokens

    sums = {"rows": len(held), "tokens": tokens, "base": told(base), "tuned": told(tuned)}
    return encode(Message(received.round, received.base, Payload({}, sums)))
