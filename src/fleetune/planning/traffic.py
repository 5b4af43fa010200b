# SPDX-License-Identifier: Apache-2.0
"""Count the bytes of a method's messages in one round, from a configuration: no tensor is made.

A method's own `expects` says what a reply holds, its own `broadcast` what goes down, both from the state that its
`footprint` states: one as in most rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fleetune.tuning.exchange.messages import Message, Payload, encode

if TYPE_CHECKING:
    from fleetune.tuning.exchange.footprint import Footprint
    from fleetune.tuning.methods import Method

ROWS: Final = 1000  # rows of a device: decides the width of one integer of its reply


def traffic(method: Method, footprint: Footprint) -> tuple[int, int]:
    """Return (bytes up, bytes down) of a device in one round; sums at their full 32 bits."""
    tensors, state = footprint.module.tensors, footprint.state
    reply = method.expects(state)
    numbers = {n: 0.5 if kind is float else ROWS for n, (kind, _, _) in reply.scalars.items()}
    arrays = {n: (kind, tuple(abs(d or 0) for d in sizes)) for n, (kind, sizes) in reply.arrays.items()}
    # `broadcast` may copy the module, so it is left out there and added here
    down = method.broadcast(state._replace(tensors={}) if tensors else state)
    sent = {n: (a.dtype.name, a.shape) for n, a in down.arrays.items()}
    sent |= {n: ("float32", sizes) for n, sizes in tensors.items()}
    return message_bytes(arrays, numbers), message_bytes(sent, down.scalars)


def message_bytes(arrays: Mapping[str, tuple[str, tuple[int, ...]]], scalars: Mapping[str, Any]) -> int:
    """Return `len(messages.encode(..))` of a payload with these arrays (dtype, shape), without making them.

    What an array adds is what an empty one adds, its values, and the wider length of its bytes and sizes.
    """
    import msgpack
    import numpy as np

    def packed(value: object) -> int:
        return len(msgpack.packb(value))

    count = len(arrays)
    total = len(encode(Message(1, bytes(8), Payload({}, scalars)))) + (
        0 if count < 16 else 2 if count < 1 << 16 else 4
    )
    for name, (kind, shape) in arrays.items():
        raw = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        prefix = 2 if raw < 1 << 8 else 3 if raw < 1 << 16 else 5
        total += packed([name, 0, list(shape)]) + prefix + raw
    return total
