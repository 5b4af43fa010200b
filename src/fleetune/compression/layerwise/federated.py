# SPDX-License-Identifier: Apache-2.0
"""Calibrate on simulated devices: their text stays with them, and only their Hessians travel.

A layer's Hessian is a sum over tokens, 2 sum x x^T, so those of the devices add up to that of all their text together
(`hessian.py`).  For each block, every device runs its windows through the block and sends the sums (`sums.py`).  The
server adds them, solves the block and sends it back compressed.  Then the devices run their windows through the
compressed block.  The result is that of central calibration up to the rounding of sums in float32 (with one device bit
for bit).

`ClientHessians` simulates the devices one after the other with one model.  A device's hidden states wait on disk, so memory
does not grow with the number of devices.  Real devices do the same (`fleet/calibration_device.py`).

The sums are private data: the rows of X can be recovered from X X^T when there are few of them.  On a real fleet, use
only devices of one owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fleetune.compression.layerwise.activations import HiddenStates, SolveLayer
from fleetune.compression.layerwise.sums import Answer, HessianReply, HessianSums, block_message, message_of
from fleetune.errors import FleetuneError
from fleetune.models.net.model import Model


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
        self.base, self.folder = bytes.fromhex(model.digest)[:8], folder
        self.sums = HessianSums(self.base, {c: own.numel() for c, own in windows.items()}, on_reply, folder)
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
        return self.sums.add_up(number, linears, self._answers(number, linears), self._down)

    def advance(self, number: int) -> None:
        """Send the compressed block to the devices and run their windows through it."""
        if self._answered == number:  # else the block was finished before a resume
            self._down = len(self.block(number))
        for client in self.sums.tokens:
            self._stream.states = self._load_states(client)
            self._stream.advance(number)
            self._save_states(client, self._stream.states)

    def answer(self, client: int, number: int, linears: Mapping[str, nn.Linear]) -> bytes:
        """Return a device's message: the sums over its windows."""
        self._stream.states = self._load_states(client)
        H = self._stream.hessians(number, linears)
        self._stream.states = []
        return message_of(H, self.sums.tokens[client], number, self.base)

    def block(self, number: int) -> bytes:
        """Return the message with a compressed block."""
        return block_message(self.folder, number, self.base)

    def _answers(self, number: int, linears: Mapping[str, nn.Linear]) -> Iterator[Answer]:
        for client in sorted(self.sums.tokens):
            try:
                answer = Answer(client, self.answer(client, number, linears), "")
            except (FleetuneError, OSError) as error:
                answer = Answer(client, None, str(error))
            yield answer

    def _path(self, client: int) -> Path:
        return self.folder / "devices" / f"{client}.safetensors"

    def _save_states(self, client: int, states: list[Tensor]) -> None:
        self._path(client).parent.mkdir(parents=True, exist_ok=True)
        save_file({"states": torch.cat(states).cpu()}, self._path(client))

    def _load_states(self, client: int) -> list[Tensor]:
        states = load_file(self._path(client))["states"]
        return [state[None] for state in states]
