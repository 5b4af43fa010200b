# SPDX-License-Identifier: Apache-2.0
"""Calibration on the devices: their text stays with them, only sums over it travel.

A layer's Hessian is a sum over tokens, 2 sum x x^T, so those of devices add up to that of all their text together
(`hessian`).  Block after block: every device runs its windows through the block and sends the sums; the server adds
them, solves the block and sends it back compressed; the devices' windows go on through it.  What a device sends:

    NAME        float32 [C (C + 1) / 2]: the lower triangle of 2 sum x x^T, row by row, for the first layer of each
                distinct input (q, k and v share one)
    NAME (text) for every other layer: which of those it shares
    tokens      how many tokens are in the sums

The server adds in float64 in the order of the clients and rounds once, so the result is the central one but for the
rounding of sums in float32 (with one device bit for bit).  A reply that is damaged, not finite or not what was agreed
is refused, and its device is left out from then on; the others go on.

`Clients` simulates the devices in turn with one model; a device's hidden states wait on the disk, so memory does not
grow with the number of devices.

The sums are private data: the rows of X leak from X X^T when there are few of them.  On a real fleet they are to be
added by secure aggregation, or come from devices of one owner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fleetune.compression.layerwise.activations import Settle, Stream
from fleetune.compression.layerwise.driver import part
from fleetune.errors import FleetError, FleetuneError, MessageError
from fleetune.models.model import Model
from fleetune.tuning.messages import Message, Payload, decode, encode

WARNING: Final = (
    "the devices send sums of x x^T over their text, from which its activations can leak: treat them as private data, "
    "and add them by secure aggregation on a fleet that is not yours"
)


@dataclass(frozen=True)
class Reply:
    """What became of a device's part in a block."""

    block: int
    client: int
    bytes_up: int
    bytes_down: int  # of the block before, compressed
    status: str  # ok, or refused
    reason: str


class Clients:
    """Devices in turn as the source of Hessians; see the module's text."""

    def __init__(
        self, model: Model, windows: Mapping[int, Tensor], folder: Path, on_reply: Callable[[Reply], None]
    ) -> None:
        """windows: int64 [n, length] by client, one length for all.  `folder` holds the blocks that are done."""
        self.base = bytes.fromhex(model.digest)[:8]
        self.folder, self.on_reply = folder, on_reply
        self.tokens = {client: own.numel() for client, own in windows.items()}
        self._down = 0  # bytes of the block before
        self._asked = -1
        with torch.inference_mode():
            self._stream = Stream(model, next(iter(windows.values())))
            for client, own in windows.items():
                self._put(client, self._stream.begin(own))

    def walk(self, number: int, linears: Mapping[str, nn.Linear], settle: Settle) -> None:
        """Solve the block's layers with the sums over all devices that answer.  FleetError when none does."""
        for name, H in self.hessians(number, linears).items():
            settle(name, H)

    def hessians(self, number: int, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """The sums over all devices that answer.  FleetError when none does."""
        self._asked = number
        total: dict[str, Tensor] = {}
        shared: dict[str, str] = {}
        reason = ""
        for client in sorted(self.tokens):
            data = b""
            try:
                data = self.answer(client, number, linears)
                shared = self._add(total, shared, decode(data), client, number, linears)
            except (FleetuneError, OSError) as error:
                reason = str(error)
                del self.tokens[client]
            else:
                reason = ""
            status = "refused" if reason else "ok"
            self.on_reply(Reply(number, client, len(data), self._down, status, reason))
        if not self.tokens:
            raise FleetError(
                f"no device is left in block {number}; the last: {reason}",
                hint="compress without --calibrate",
            )
        whole = {name: unpacked(lower, linears[name].in_features) for name, lower in total.items()}
        return {name: whole[shared[name]] for name in linears}

    def advance(self, number: int) -> None:
        """Send the compressed block down and take every device's windows through it."""
        if self._asked == number:  # else the block was done before this process began
            self._down = len(self.block(number))
        for client in self.tokens:
            self._stream.states = self._get(client)
            self._stream.advance(number)
            self._put(client, self._stream.states)

    def answer(self, client: int, number: int, linears: Mapping[str, nn.Linear]) -> bytes:
        """A device's message: the sums over its windows."""
        self._stream.states = self._get(client)
        H = self._stream.hessians(number, linears)
        self._stream.states = []
        first: dict[int, str] = {}
        shared = {name: first.setdefault(id(h), name) for name, h in H.items()}
        arrays = {name: packed(H[name]).numpy() for name in first.values()}
        texts = {name: of for name, of in shared.items() if name != of}
        payload = Payload(arrays, {"tokens": self.tokens[client], **texts})
        return encode(Message(number, self.base, payload))

    def block(self, number: int) -> bytes:
        """The message with a compressed block, as the artefact holds it."""
        tensors = load_file(part(self.folder, number))
        arrays = {
            n: (t.view(torch.uint16) if t.dtype is torch.bfloat16 else t).numpy() for n, t in tensors.items()
        }
        return encode(Message(number, self.base, Payload(arrays)))

    def _add(
        self, total: dict[str, Tensor], shared: dict[str, str], message: Message, client: int, number: int,
        linears: Mapping[str, nn.Linear],
    ) -> dict[str, str]:  # fmt: skip
        """Add a reply to the sums; which layer has which.  MessageError before anything is added."""
        if (message.round, message.base) != (number, self.base):
            raise MessageError(
                f"reply is for block {message.round} of {message.base.hex()}, this is block {number} of {self.base.hex()}"
            )
        payload = message.payload
        if payload.int("tokens") != self.tokens[client]:
            raise MessageError(
                f"reply is of {payload.int('tokens')} tokens, agreed were {self.tokens[client]}"
            )
        found = {name: name for name in payload.arrays}
        found |= {n: str(of) for n, of in payload.scalars.items() if n != "tokens"}
        if (
            set(found) != set(linears)
            or (shared and found != shared)
            or set(found.values()) - set(payload.arrays)
        ):
            raise MessageError("reply is not about the layers of the block")
        arrays = {name: _checked(name, a, linears) for name, a in payload.arrays.items()}
        for name, a in arrays.items():
            total.setdefault(name, torch.zeros(a.size, dtype=torch.float64)).add_(torch.from_numpy(a))
        return found

    def _path(self, client: int) -> Path:
        return self.folder / "devices" / f"{client}.safetensors"

    def _put(self, client: int, states: list[Tensor]) -> None:
        self._path(client).parent.mkdir(parents=True, exist_ok=True)
        save_file({"states": torch.cat(states).cpu()}, self._path(client))

    def _get(self, client: int) -> list[Tensor]:
        states = load_file(self._path(client))["states"]
        return [state[None] for state in states]


def _checked(name: str, a: np.ndarray, linears: Mapping[str, nn.Linear]) -> np.ndarray:
    """MessageError unless `a` can be the lower triangle of 2 sum x x^T for a layer."""
    C = linears[name].in_features
    if a.dtype != np.float32 or a.shape != (C * (C + 1) // 2,):
        raise MessageError(f"'{name}' is {a.dtype} {a.shape}, agreed was float32 ({C * (C + 1) // 2},)")
    if bad := int(np.count_nonzero(~np.isfinite(a))):
        raise MessageError(f"'{name}' holds {bad} values that are not finite")
    if bad := int(np.count_nonzero(a[_diagonal(C)] < 0)):
        raise MessageError(f"'{name}' holds {bad} sums of squares below zero")
    return a.astype(np.float64)


def _diagonal(C: int) -> np.ndarray:
    rows = np.arange(C, dtype=np.int64)
    return rows * (rows + 3) // 2


def packed(H: Tensor) -> Tensor:
    """The lower triangle of a matrix [C, C], row by row: what a Cholesky factor is made of."""
    return torch.cat([H[i, : i + 1] for i in range(len(H))])


def unpacked(lower: Tensor, C: int) -> Tensor:
    """The symmetric float32 [C, C] of a lower triangle."""
    H, at = torch.zeros(C, C), 0
    for i in range(C):
        H[i, : i + 1] = lower[at : at + i + 1]
        H[:i, i] = H[i, :i]
        at += i + 1
    return H
