# SPDX-License-Identifier: Apache-2.0
"""Calibrate on the devices: their text stays there, and only their Hessians travel.

A layer's Hessian is a sum over tokens, 2 sum x x^T, so those of the devices add up to that of all their text together
(`hessian.py`).  For each block, every device runs its windows through the block and sends the sums.  The server adds
them, solves the block and sends it back compressed.  Then the devices run their windows through the compressed block.
A device's message holds:

    NAME        float32 [C (C + 1) / 2]: the lower triangle of 2 sum x x^T, row by row, for the first layer of each
                distinct input (q, k and v share one)
    NAME (text) for every other layer: the layer whose sums it shares
    tokens      how many tokens are in the sums

The server adds in float64, in the order of the clients, and rounds once.  So the result is that of central calibration
up to the rounding of sums in float32 (with one device bit for bit).  A reply that is damaged, not finite or not as agreed
is refused, and its device is left out from then on; the other devices continue.

`ClientHessians` simulates the devices one after the other with one model.  A device's hidden states wait on disk, so memory
does not grow with the number of devices.

The sums are private data: the rows of X can be recovered from X X^T when there are few of them.  On a real fleet, add
them by secure aggregation, or use only devices of one owner.
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

from fleetune.compression.layerwise.activations import HiddenStates, SolveLayer
from fleetune.compression.layerwise.blocks import block_file
from fleetune.errors import FleetError, FleetuneError, MessageError
from fleetune.models.model import Model
from fleetune.tuning.messages import Message, Payload, decode, encode

WARNING: Final = (
    "the devices send sums of x x^T over their text, from which its activations can leak: treat them as private data, "
    "and add them by secure aggregation on a fleet that is not yours"
)


@dataclass(frozen=True)
class HessianReply:
    """A device's answer for a block, as it is reported."""

    block: int
    client: int
    bytes_up: int
    bytes_down: int  # the compressed block before this one
    status: str  # ok, or refused
    reason: str


class ClientHessians:
    """Hessians from simulated devices, one after the other."""

    def __init__(
        self,
        model: Model,
        windows: Mapping[int, Tensor],
        folder: Path,
        on_reply: Callable[[HessianReply], None],
    ) -> None:
        """windows: int64 [n, length] by client, the same length for all.  `folder` holds the finished blocks."""
        self.base = bytes.fromhex(model.digest)[:8]
        self.folder, self.on_reply = folder, on_reply
        self.tokens = {client: own.numel() for client, own in windows.items()}
        self._down = 0  # bytes of the compressed block before this one
        self._answered = -1  # the last block that devices have answered for
        with torch.inference_mode():
            self._stream = HiddenStates(model, next(iter(windows.values())))
            for client, own in windows.items():
                self._save_states(client, self._stream.first_block_inputs(own))

    def solve_layers(self, number: int, linears: Mapping[str, nn.Linear], solve: SolveLayer) -> None:
        """Solve the block's layers with the sums over all devices that answer.  FleetError when none does."""
        for name, H in self.hessians(number, linears).items():
            solve(name, H)

    def hessians(self, number: int, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """Return the sums over all devices that answer, by layer.  FleetError when none does."""
        self._answered = number
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
            self.on_reply(HessianReply(number, client, len(data), self._down, status, reason))
        if not self.tokens:
            raise FleetError(
                f"no device is left in block {number}; the last: {reason}",
                hint="compress without --calibrate",
            )
        whole = {name: from_lower_triangle(lower, linears[name].in_features) for name, lower in total.items()}
        return {name: whole[shared[name]] for name in linears}

    def advance(self, number: int) -> None:
        """Send the compressed block to the devices and run their windows through it."""
        if self._answered == number:  # else the block was finished before a resume
            self._down = len(self.block(number))
        for client in self.tokens:
            self._stream.states = self._load_states(client)
            self._stream.advance(number)
            self._save_states(client, self._stream.states)

    def answer(self, client: int, number: int, linears: Mapping[str, nn.Linear]) -> bytes:
        """Return a device's message: the sums over its windows."""
        self._stream.states = self._load_states(client)
        H = self._stream.hessians(number, linears)
        self._stream.states = []
        first: dict[int, str] = {}
        shared = {name: first.setdefault(id(h), name) for name, h in H.items()}
        arrays = {name: lower_triangle(H[name]).numpy() for name in first.values()}
        texts = {name: of for name, of in shared.items() if name != of}
        payload = Payload(arrays, {"tokens": self.tokens[client], **texts})
        return encode(Message(number, self.base, payload))

    def block(self, number: int) -> bytes:
        """Return the message with a compressed block, encoded as in the artefact."""
        tensors = load_file(block_file(self.folder, number))
        arrays = {
            n: (t.view(torch.uint16) if t.dtype is torch.bfloat16 else t).numpy() for n, t in tensors.items()
        }
        return encode(Message(number, self.base, Payload(arrays)))

    def _add(
        self,
        total: dict[str, Tensor],
        shared: dict[str, str],
        message: Message,
        client: int,
        number: int,
        linears: Mapping[str, nn.Linear],
    ) -> dict[str, str]:
        """Add a reply to the sums, and return which layer shares which sums.  MessageError before anything is added."""
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
        arrays = {name: _checked_sums(name, a, linears) for name, a in payload.arrays.items()}
        for name, a in arrays.items():
            total.setdefault(name, torch.zeros(a.size, dtype=torch.float64)).add_(torch.from_numpy(a))
        return found

    def _path(self, client: int) -> Path:
        return self.folder / "devices" / f"{client}.safetensors"

    def _save_states(self, client: int, states: list[Tensor]) -> None:
        self._path(client).parent.mkdir(parents=True, exist_ok=True)
        save_file({"states": torch.cat(states).cpu()}, self._path(client))

    def _load_states(self, client: int) -> list[Tensor]:
        states = load_file(self._path(client))["states"]
        return [state[None] for state in states]


def _checked_sums(name: str, a: np.ndarray, linears: Mapping[str, nn.Linear]) -> np.ndarray:
    """Return `a` in float64; MessageError unless it can be the lower triangle of 2 sum x x^T for a layer."""
    C = linears[name].in_features
    if a.dtype != np.float32 or a.shape != (C * (C + 1) // 2,):
        raise MessageError(f"'{name}' is {a.dtype} {a.shape}, agreed was float32 ({C * (C + 1) // 2},)")
    if bad := int(np.count_nonzero(~np.isfinite(a))):
        raise MessageError(f"'{name}' holds {bad} values that are not finite")
    if bad := int(np.count_nonzero(a[_diagonal_indices(C)] < 0)):
        raise MessageError(f"'{name}' holds {bad} sums of squares below zero")
    return a.astype(np.float64)


def _diagonal_indices(C: int) -> np.ndarray:
    rows = np.arange(C, dtype=np.int64)
    return rows * (rows + 3) // 2


def lower_triangle(H: Tensor) -> Tensor:
    """Return the lower triangle of a matrix [C, C], row by row."""
    return torch.cat([H[i, : i + 1] for i in range(len(H))])


def from_lower_triangle(lower: Tensor, C: int) -> Tensor:
    """Return the symmetric float32 [C, C] matrix with this lower triangle."""
    H, at = torch.zeros(C, C), 0
    for i in range(C):
        H[i, : i + 1] = lower[at : at + i + 1]
        H[:i, i] = H[i, :i]
        at += i + 1
    return H
