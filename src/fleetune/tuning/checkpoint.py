# SPDX-License-Identifier: Apache-2.0
"""Encode a method's state (a NamedTuple) as a checkpoint, and decode it.

A field may be a number, a text, an array, a dict of arrays, or a Ledger; its kind is read off the state
that `init` gives, so a checkpoint holds data only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetune.errors import MessageError
from fleetune.runs.rundir import RunDir, checkpoints
from fleetune.seeds.ledger import Ledger, LedgerHead
from fleetune.tuning import messages
from fleetune.tuning.messages import Message, Payload, Scalar


@dataclass
class Totals:
    """Running sums over the rounds."""

    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


def encode(round: int, state: Any, totals: Totals) -> bytes:
    """Encode everything that a resumed run needs after `round`, as the bytes of one message."""
    return messages.encode(Message(round, b"", pack(state, totals)))


def decode(data: bytes) -> Payload:
    """Decode a checkpoint's payload; MessageError when it is damaged."""
    return messages.decode(data, any_size=True).payload


def pack(state: Any, totals: Totals) -> Payload:
    """Return everything that a resumed run needs, as one payload."""
    arrays: dict[str, np.ndarray] = {}
    scalars: dict[str, Scalar] = {
        "totals": json.dumps([totals.bytes_up, totals.bytes_down, totals.seconds]),
    }
    for name, value in state._asdict().items():
        _put(f"state/{name}", value, arrays, scalars)
    return Payload(arrays, scalars)


def unpack(payload: Payload, like: Any) -> tuple[Any, Totals]:
    """Return (state, totals) from a checkpoint; `like` is a state of the same method (from `init`).

    MessageError when a field is missing.
    """
    values = {name: _get(f"state/{name}", kind, payload) for name, kind in like._asdict().items()}
    up, down, seconds = json.loads(_get("totals", "", payload))
    return type(like)(**values), Totals(up, down, seconds)


def state_of(run: RunDir, round: int, like: Any) -> Any | None:
    """Return the state after `round`, None when there is no such checkpoint (any more); `like` as for `unpack`."""
    path = dict(checkpoints(run.path)).get(round)
    try:
        return None if path is None else unpack(decode(path.read_bytes()), like)[0]
    except MessageError:
        return None


def _put(path: str, value: Any, arrays: dict[str, np.ndarray], scalars: dict[str, Scalar]) -> None:
    if isinstance(value, Ledger):
        scalars[path] = value.head.to_json()
        arrays.update(
            {f"{path}/id": value.ids, f"{path}/c": value.coefficients, f"{path}/round": value.rounds}
        )
    elif isinstance(value, dict):
        arrays.update({f"{path}/{name}": array for name, array in value.items()})
    elif isinstance(value, np.ndarray):
        arrays[path] = value
    else:
        scalars[path] = value


def _get(path: str, like: Any, payload: Payload) -> Any:
    try:
        if isinstance(like, Ledger):
            head = LedgerHead.from_json(str(payload.scalars[path]))
            return Ledger(head, *(payload.arrays[f"{path}/{name}"].copy() for name in ("id", "c", "round")))
        if isinstance(like, dict):
            prefix = path + "/"
            return {n[len(prefix) :]: a.copy() for n, a in payload.arrays.items() if n.startswith(prefix)}
        if isinstance(like, np.ndarray):
            return payload.arrays[path].copy()
        return payload.scalars[path]
    except KeyError as missing:
        raise MessageError(f"the checkpoint lacks {missing}") from missing
