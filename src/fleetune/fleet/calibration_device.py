"""Calibrate on a device: its windows go through the model block by block, and only sums leave it.

    state/run-3f2a../calibration/
      begin                        the order that began it: the run's result, how many windows of how many tokens
      result/                      the ledger or adapter in it
      states-0002.safetensors      what the windows are in front of block 2

Sums over few tokens give these away: each token can be tested for, and the difference of two sums over nearly the same tokens
holds the others.  So sums are over at least `least_tokens`, of one result on one base in one type, over one choice of windows
(`DeviceState.allow_calibration`), and behind one compressed form of each block (`DeviceState.allow_block`).
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fleetune.common.files import PRIVATE, storage_error, write_atomic
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.activations import HiddenStates
from fleetune.compression.layerwise.experts import parameters_of
from fleetune.compression.layerwise.federated import message_of, sealed_units, weights_of
from fleetune.data import Encoded
from fleetune.data.encode import digest
from fleetune.errors import MessageError
from fleetune.fleet import result
from fleetune.fleet.device_state import DeviceState
from fleetune.fleet.orders import Declined, Job
from fleetune.models.net.model import Model
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode
from fleetune.tuning.result import finished

BEGIN: Final = "begin"
# in the order `begin`
ASKED: Final = frozenset({"windows", "length"} | {result.FILE + name for name in result.FILES})
LONGEST: Final = 1 << 17  # tokens of a window
MOST: Final = 1 << 14  # windows


class Calibration:
    """A device's part in a compression; `model` is the base, and becomes the tuned model that is compressed."""

    def __init__(self, model: Model, rows: Sequence[Encoded], own: DeviceState, job: Job) -> None:
        self.model, self.rows, self.own, self.job = model, rows, own, job
        self.base = bytes.fromhex(model.digest)[:8]
        self.folder = own.run(job.run) / "calibration"
        self.changed = False  # whether the model is the base no longer

    def begin(self, message: bytes) -> bytes:
        """Take the result, and run the windows up to block 0; return their number.

        Declined for windows of too few tokens, and for others than before.
        """
        file = self.folder / BEGIN
        count, length = self._checked(decode(message).payload)
        asked = digest([self.rows]), self.job, count, length
        known = self.own.allow_calibration(*asked, note=False)
        if not (known and file.exists()):  # else the states are those of this job and these windows
            self.own.renewed(self.folder)
            write_atomic(file, message, mode=PRIVATE)
            self.__dict__.pop("_windows", None)
            self.__dict__.pop("_stream", None)
        try:
            windows, stream = self._windows, self._stream
        except Exception:
            self.remove()
            self.__dict__.pop("_windows", None)
            raise
        self.own.allow_calibration(*asked, note=True)
        if self._stands() is None:
            with torch.inference_mode():
                self._save(0, stream.first_block_inputs(windows))
        return encode(Message(0, self.base, Payload({}, {"windows": len(windows)})))

    def _checked(self, asked: Payload) -> tuple[int, int]:
        """Return how many windows of how many tokens there are; Declined for too few."""
        count, length = asked.int("windows"), asked.int("length")
        if odd := sorted({*asked.scalars, *asked.arrays} - ASKED):
            raise MessageError(f"the order to calibrate holds {odd[0]!r:.60}, which is no part of one")
        if count < 1 or not 1 <= length <= LONGEST:
            raise MessageError(f"{count} windows of {length} tokens were asked for")
        count = min(count, MOST, sum(len(row.ids) for row in self.rows) // length)
        if count * length < (least := self.least_tokens()):
            raise Declined("few-tokens", least)
        return count, length

    def least_tokens(self) -> int:
        """Return over how many tokens a sum is made at least."""
        width = self.model.net.get_input_embeddings().weight.shape[1]
        widest = max(
            (linear.in_features for _, linears in self._blocks for linear in linears.values()), default=0
        )
        return max(4 * int(width), 2 * widest)

    @torch.inference_mode()
    def block(self, number: int, message: bytes, hold: Callable[[int, np.ndarray], None]) -> bytes:
        """Return the sums of a block; `message` is the compressed block before it, b"" for block 0.

        Of a sealed run, `hold` is given them for a secure sum, and nothing of them is returned.

        MessageError when the device stands elsewhere.
        """
        stands = self._stands()
        if stands is None or not 0 <= number < len(self._blocks):
            raise MessageError(f"block {number} was asked for, and this device has not begun")
        stream = self._stream
        if stands == number - 1:
            weights = weights_of(decode(message).payload)
            shapes = {name: p.shape for name, p in parameters_of(self._blocks[stands][1], ()).items()}
            if {name: weight.shape for name, weight in weights.items()} != shapes:
                raise MessageError(
                    f"the compressed block {stands} has other layers or shapes than this model's"
                )
            self.own.allow_block(stands, hashlib.sha256(message).hexdigest())
            driver.place_weights(self._blocks[stands][1], weights)
            stream.states = self._load(stands)
            stream.advance(stands)
            self._save(number, stream.states)
        elif stands != number:
            raise MessageError(
                f"the device stands in front of block {stands}, and was asked for block {number}"
            )
        stream.states = self._load(number)
        H = stream.hessians(number, self._blocks[number][1])
        stream.states = []
        if self.job.secure is not None:
            hold(number, sealed_units(H, self.job.secure.clients))
            return encode(Message(number, self.base, Payload({}, {})))
        return message_of(H, self._windows.numel(), number, self.base)

    def remove(self) -> None:
        """Delete what was kept: the compression is over."""
        self.own.remove(self.folder)

    # The model and the windows ----------------------------------------------------------------------------

    @cached_property
    def _windows(self) -> Tensor:
        """The device's calibration windows, int64 [n, length]; DataError when its rows do not fill one."""
        count, length = self._checked(decode((self.folder / BEGIN).read_bytes()).payload)
        return driver.windows([np.asarray(row.ids) for row in self.rows], length, count)

    @cached_property
    def _stream(self) -> HiddenStates:
        """The tuned model, with its weights merged as the server has them, and the states of the windows."""
        windows = self._windows
        scalars = decode((self.folder / BEGIN).read_bytes()).payload.scalars
        files = result.placed(scalars, self.own, self.job)
        if self.changed:
            raise MessageError(
                "the model was made another for sums before: start this device anew for others"
            )
        self.changed = True
        result.put_on(self.model, files)
        finished.merge_weights(self.model)
        return HiddenStates(self.model, windows[:1])

    @cached_property
    def _blocks(self):  # type: ignore[no-untyped-def]
        return driver.linears_of(self.model)

    # The states -------------------------------------------------------------------------------------------

    def _stands(self) -> int | None:
        """Return the number of the block that the states are in front of; None where there are none."""
        names = (re.fullmatch(r"states-(\d+)\.safetensors", p.name) for p in self.folder.glob("states-*"))
        return max((int(m[1]) for m in names if m), default=None)

    def _path(self, number: int) -> Path:
        return self.folder / f"states-{number:04d}.safetensors"

    def _save(self, number: int, states: list[Tensor]) -> None:
        path = self._path(number)
        half = path.with_name(f".{path.name}.tmp")
        try:
            save_file({"states": torch.cat(states).cpu()}, half)
            os.replace(half, path)
        except OSError as error:
            raise storage_error(error, path) from error
        if number:
            self._path(number - 1).unlink(missing_ok=True)

    def _load(self, number: int) -> list[Tensor]:
        return [state[None].to(self.model.device) for state in load_file(self._path(number))["states"]]
