# SPDX-License-Identifier: Apache-2.0
"""Mix devices that back-propagate with devices that only run the model forward, in one ledger.

A device that back-propagates steps in the space spanned by the K directions of a pool, a_k <- a_k - eta_b p_k / K with
p_k = z_k . g (`seeds/descent.py`), and replies with K integers.  Replies weigh by their precision: of a gradient in d
dimensions, n two-point samples along directions drawn from the pool have, over the draw of the pool, the variance
d (1/K + (1 - 1/K) / n) |g|^2, the whole pool (n = infinity) d/K |g|^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Final

import numpy as np

from fleetune.data import Batch
from fleetune.models.net.model import Model
from fleetune.seeds.descent import Position, descend_projected
from fleetune.seeds.view import View
from fleetune.tuning.exchange.messages import Payload, ReplySpec
from fleetune.tuning.methods._wires import SCALARS, Wire
from fleetune.tuning.methods._zeroth import pool_ids

MARK: Final = "backprop"  # a scalar of the message
KINDS: Final = ("two-point steps", "back-propagation")


def check(backprop: float, lr: float, steps: int, *, projectable: bool) -> None:
    """Raise ValueError, in plain words, for settings that cannot be; `projectable`: on the loss and a pool, uniform."""
    if not 0 <= backprop <= 1 or abs(share(backprop) - Fraction(backprop)) > 1e-9:
        raise ValueError(f"backprop = {backprop} is not a share in whole percent, 0 to 1")
    if not 0 < lr < 1e3 or steps < 1:
        raise ValueError(
            f"backprop_lr = {lr} must be positive (and sane) and backprop_steps = {steps} at least 1"
        )
    if backprop and not projectable:
        raise ValueError(
            "backprop projects the gradient of the loss on all directions of a pool: "
            "it needs law=hashed, objective=loss and pro=false"
        )


def share(backprop: float) -> Fraction:
    """Return the share of the clients that back-propagate as an exact fraction, in whole percent."""
    return Fraction(round(100 * backprop), 100)


def back_propagates(client: int, backprop: float) -> bool:
    """Tell whether a client is one of those that do, where all can: they are spread evenly over the numbers."""
    part = share(backprop)
    return math.floor((client + 1) * part) > math.floor(client * part)


def order(payload: Payload) -> Payload:
    """Return the message that makes a device back-propagate; the same without its mark makes it take two-point steps."""
    return Payload(payload.arrays, {**payload.scalars, MARK: True})


def is_ordered(payload: Payload) -> bool:
    """Tell whether the message makes a device back-propagate."""
    return payload.scalars.get(MARK) is True


def spec(wire: Wire, K: int) -> ReplySpec:
    """Return the form of the reply of a device that back-propagates."""
    return ReplySpec({"projected": (wire.dtype, (K,))}, SCALARS)


def weight(payload: Payload, wire: Wire, K: int, *, mixed: bool) -> float:
    """Return what a reply weighs: its rows n; in a mixed fleet n / (1 + (K - 1) / steps) after two-point steps."""
    n = payload.int("n")
    if not mixed or "projected" in payload.arrays:
        return float(n)
    steps = wire.steps(payload)
    return n * steps / (steps + K - 1) if steps else 0.0


def descend(
    model: Model,
    view: View,
    position: Position,
    epoch: int,
    batches: Iterable[Batch],
    key: int,
    *,
    wire: Wire,
    units: float,
    clip: float,
) -> tuple[np.ndarray, float]:
    """Return what a device that back-propagates sends, [K] in the wire's type, and its mean loss; the view follows.

    `units` is its learning rate over the ledger's grid.
    """
    steps = descend_projected(model, view, position, epoch, batches, units=units, clip=clip)
    sent = wire.projection(steps.moved, key)
    for id, c in zip(pool_ids(epoch, np.arange(len(sent))), wire.integers(sent), strict=True):
        position.move(int(id), int(c))
    position.place(view)
    return sent, steps.loss
