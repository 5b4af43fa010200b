"""Get the Hessians of a compression from devices that join: `compress --calibrate fleet`.

The windows of each device are agreed before block 0 (`parts/agreed.json`); a resumed compression goes on with these.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from fleetune.common.display import counted, quoted
from fleetune.common.files import PRIVATE, json_text, read_json, write_atomic
from fleetune.compression.jobs.inputs import each_of
from fleetune.compression.layerwise.activations import HessianSource, HiddenStates, SolveLayer
from fleetune.compression.layerwise.federated import (
    BlockAnswer,
    HessianReply,
    HessianSums,
    block_message,
    sharing,
)
from fleetune.errors import DataError, FleetError, MessageError, UsageError
from fleetune.fleet import result
from fleetune.fleet.orders import Device, Order
from fleetune.fleet.remote import ROOM, RemoteFleet
from fleetune.fleet.server import Served
from fleetune.fleet.table import Devices
from fleetune.models.net.layers import layers_of
from fleetune.models.net.model import Model
from fleetune.runs.compression_folder import PARTS, CompressRequest
from fleetune.runs.listener import Listener
from fleetune.tuning.exchange.aggregation import FEWEST
from fleetune.tuning.exchange.messages import Message, Payload, ReplySpec, check, decode, encode
from fleetune.tuning.result import finished
from fleetune.tuning.rounds import rounds
from fleetune.tuning.rounds.sealed import Summing

AGREED: Final = "agreed.json"
FAILED: Final = "sum-failed"  # why, in words
ONCE: Final = "compress without --calibrate; or anew, once the devices removed their calibrated.json: none masks a block twice"
ON_THE_WAY: Final = 1 << 28  # bytes of answers


class Calibrators:
    """The devices that join at a door, as a compression asks for them (`compression/jobs/solve.py`: `Devices`)."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def about(self, request: CompressRequest) -> str:
        """Return where they join, and how many are waited for."""
        return self.served.where(self._count(request, Devices(Path(request.model))))

    def source(
        self,
        request: CompressRequest,
        model: Model,
        folder: Path,
        without: frozenset[int],
        on_reply: Callable[[HessianReply], None],
        listener: Listener,
    ) -> tuple[HessianSource, Mapping[int, int]]:
        """Return the Hessians of the devices that join, and the windows of each.

        DataError when no device has text for a window, UsageError when all that began are left out.
        """
        self.served.farewell, self.served.more = "the compression is finished", " --calibrate"
        run, parts = Path(request.model), folder / PARTS
        devices = Devices(folder)
        devices.take_from(run)
        blocks = len(layers_of(model.net))
        listener.progress("blocks", 0, blocks)
        job = result.job_of_run(run, devices.run, "calibrate", blocks)
        agreed = _read_agreed(parts / AGREED)
        left = {client: windows for client, windows in agreed.items() if client not in without}
        if agreed and not left:
            raise UsageError(
                "all devices that began this compression were left out",
                hint=f"compress again: fleetune compress {quoted(run)}",
            )
        count = self.served.wait or len(left) or self._count(request, devices)
        fleet = self.served.gather(folder, devices, job, 0, count, listener)
        base = bytes.fromhex(job.base)[:8]  # the model's own digest is that of merged weights
        if not agreed:
            agreed = left = _begun(request, fleet, base, listener)
            content = {str(client): windows for client, windows in agreed.items()}
            write_atomic(parts / AGREED, json_text(content), mode=PRIVATE)
        tokens = {client: windows * request.length for client, windows in left.items()}

        def heard(reply: HessianReply) -> None:
            about = {"block": reply.block, "bytes": reply.bytes_up, "reason": reply.reason}
            fleet.record(reply.status, reply.client, **about)
            on_reply(reply)

        if len(tokens) < FEWEST:
            listener.note(
                f"{counted(len(tokens), 'device')} calibrate: of two, the sums are held against the smaller, of one against none"
            )
        least = job.sealed.least if job.sealed else 0
        if len(tokens) < least:
            raise UsageError(
                f"{counted(len(tokens), 'device')} calibrate: the run is sealed, and {least} are needed for a secure sum",
                hint="wait for more: --wait; or give them more text: a larger --windows, or a smaller --length",
            )
        sums = HessianSums(base, tokens, heard, parts, claimed=True, least=least)
        summing = Summing(job.sealed, job.run, parts, listener.note) if job.sealed else None
        return FleetHessians(fleet, sums, model, parts, summing), agreed

    def _count(self, request: CompressRequest, devices: Devices) -> int:
        joined = sum(rows > 0 for rows in devices.rows)
        recipe = finished.recipe_of(Path(request.model))
        return self.served.wanted(joined or recipe.clients)


class FleetHessians:
    """A source of Hessians: each block's are asked of the devices, which advance by the compressed block before it.

    Which layers share an input is not theirs to say: the server runs two tokens through the model for that.
    """

    def __init__(
        self, fleet: RemoteFleet, sums: HessianSums, model: Model, parts: Path, summing: Summing | None = None
    ) -> None:
        """`parts` holds the finished blocks; `summing` adds up where the run is sealed."""
        self.fleet, self.sums, self.parts, self.summing = fleet, sums, parts, summing
        with torch.inference_mode():
            self._own = HiddenStates(model, torch.zeros(1, 2, dtype=torch.int64))

    def solve_layers(self, number: int, linears: Mapping[str, nn.Linear], solve: SolveLayer) -> None:
        """Solve the block's layers with the sums over all devices that answer.  FleetError when none does."""
        for name, H in self.hessians(number, linears).items():
            solve(name, H)

    def hessians(self, number: int, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """Return the sums over all devices that answer, by layer.  FleetError when none does."""
        clients = sorted(self.sums.tokens)
        body = block_message(self.parts, number - 1, self.sums.base) if number else b""
        orders = {c: Order("block", number, c, body=body) for c in clients}
        shared = sharing(self._own.hessians(number, linears))
        if self.summing is not None:
            if (failed := self.parts / FAILED).is_file():
                raise FleetError(failed.read_text("utf-8"), hint=ONCE)
            done = self._held(number, orders, len(body))
            widths = (linears[name].in_features for name, of in shared.items() if name == of)
            units, why = self.summing.add_up(self.fleet, number, done, sum(C * (C + 1) // 2 for C in widths))
            if units is None:
                words = f"block {number} has no secure sum: {why}"
                write_atomic(failed, words)
                raise FleetError(words, hint=ONCE)
            return self.sums.unsealed(number, units, shared, linears)
        largest = sum(2 * linear.in_features * (linear.in_features + 1) for linear in linears.values())
        answers = self.fleet.give(orders, at_once=max(1, ON_THE_WAY // largest), room=largest + ROOM)
        found = (BlockAnswer(a.client, a.data, a.reason or a.status) for a in answers)
        return self.sums.add_up(number, linears, found, len(body), shared)

    def _held(self, number: int, orders: Mapping[int, Order], down: int) -> list[int]:
        """Let the devices work on a block; return those that hold sums of it.  The others are left out from here on."""
        assert self.summing is not None
        if self.summing.pending(number):
            return sorted(orders)
        for answer in self.fleet.give(orders):
            reason = answer.reason or answer.status
            try:
                if answer.data is not None:
                    check(decode(answer.data), ReplySpec({}, {}), round=number, base=self.sums.base)
                    reason = ""
            except MessageError as error:
                reason = error.message
            if reason:
                del self.sums.tokens[answer.client]
            size, status = len(answer.data or b""), "refused" if reason else "ok"
            self.sums.on_reply(HessianReply(number, answer.client, size, down, status, reason))
        return sorted(self.sums.tokens)

    def advance(self, number: int) -> None:
        """Advance the server's own tokens; for the devices, the compressed block travels with the order for the next one."""
        self._own.advance(number)


def _begun(request: CompressRequest, fleet: RemoteFleet, base: bytes, listener: Listener) -> dict[int, int]:
    """Send the run's result to the devices that calibrate; return client -> the windows that it has agreed to."""
    chosen = _chosen(request, fleet)
    asked = {"windows": each_of(request.windows, len(chosen)), "length": request.length}
    files = result.packed(finished.result_of(Path(request.model)))
    message = encode(Message(0, base, Payload({}, {**asked, **files})))
    orders = {c: Order("begin", client=c, body=message) for c in chosen}
    return _agreed(fleet, orders, asked, fleet.job.max_length, base, listener)


def _chosen(request: CompressRequest, fleet: RemoteFleet) -> list[int]:
    """Return the clients that calibrate: those that are there, or `request.clients` of them drawn by the seed."""
    ready = fleet.ready()
    if fleet.job.secure is not None:  # more cannot be in a sum
        ready = ready[: fleet.job.secure.clients]
    if request.clients > len(ready):
        raise UsageError(
            f"--clients {request.clients} are more than the {len(ready)} devices that are there",
            hint="leave it out for all, or wait for more: --wait",
        )
    return list(rounds.sample(ready, (request.clients or len(ready)) / len(ready), request.seed, 0))


def _agreed(
    fleet: RemoteFleet,
    orders: Mapping[int, Order],
    asked: Mapping[str, int],
    max_length: int,
    base: bytes,
    listener: Listener,
) -> dict[int, int]:
    """Let devices begin; return client -> its windows.  One that cannot is left out, with a note.

    DataError when none is left.
    """
    found, reason = dict[int, int](), ""
    for answer in fleet.give(orders):
        device = fleet.told[answer.client]
        try:
            if answer.data is None:
                raise MessageError(answer.reason or answer.status)
            found[answer.client] = _windows(answer.data, device, asked, max_length, base)
        except MessageError as error:
            reason = error.message
            listener.note(f"{fleet.devices.members[answer.client].name} is left out: {reason}")
    if not found:
        raise DataError(
            f"no device can calibrate on windows of {asked['length']} tokens; the last: {reason}",
            hint="give each more windows (a larger --windows, or fewer of them: --clients), or where the text is too short "
            "a smaller --length",
        )
    return {client: found[client] for client in sorted(found)}


def _windows(data: bytes, device: Device, asked: Mapping[str, int], max_length: int, base: bytes) -> int:
    """Return how many windows a device has; MessageError for more of them than its rows can fill."""
    most = min(asked["windows"], device.rows * max_length // asked["length"])
    spec = ReplySpec({}, {"windows": (int, 1, most)})
    return check(decode(data), spec, round=0, base=base).int("windows")


def _read_agreed(file: Path) -> dict[int, int]:
    """Return what was agreed before a stop, {} for nothing; StorageError where the file is damaged."""
    if not file.exists():
        return {}
    found = read_json(file, "compress again")
    return {int(client): int(windows) for client, windows in found.items()}
