"""Calibrate on simulated devices: their text stays with them, and only their Hessians travel.

Every device sends its sums of 2 x x^T over tokens for a block; the server adds them in float64, in the order of the clients,
rounds once, solves the block and sends it back.  With one device the result is that of central calibration bit for bit.  The sums
are private data: the rows of X can be recovered from X X^T when there are few of them.  Those of a sealed run are rounded to
integers in units of `GRID`, and real devices mask them (`tuning/rounds/sealed.py`): no device counts less or is left out for its
sums then, as nobody sees them.

The server answers with the block's weights as the artefact has them, and `grids`: for each weight [bits, group, columns], or null
for floats, as JSON.  A device is left out from its first reply that is damaged, not finite, not as agreed or no sum of x x^T, or
whose mean square of an input is more than `TIMES` times the devices' median: it would count for all the others (honest devices of
unlike text come to 1.4).
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fleetune.compression.layerwise.activations import HiddenStates, SolveLayer
from fleetune.compression.layerwise.blocks import block_file
from fleetune.errors import FleetError, FleetuneError, Interrupted, MessageError
from fleetune.models.artefact import Quantised, assembled
from fleetune.models.families.number_types import CODEBOOKS, SUPER_TYPES
from fleetune.models.net.model import Model
from fleetune.tuning.exchange.aggregation import FEWEST, TIMES, Spool, usual
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode

WARNING: Final = (
    "the devices send sums of x x^T over their text, from which its activations can leak: treat them as private data, "
    "and use devices of one owner alone"
)
LARGEST: Final = 65504.0  # of an input of a layer: the largest number of fp16, far above what models compute
ROUNDING: Final = 1e-3  # relative error of a sum in float32
GRID: Final = 2.0**-20  # of the sums of a sealed run, which a secure sum adds up as integers
SMALLEST: Final = 1e-37  # of a sum of squares that is not zero: a product with a zero input is then seen


@dataclass(frozen=True)
class HessianReply:
    """A device's answer for a block, as it is reported."""

    block: int
    client: int
    bytes_up: int
    bytes_down: int  # the compressed block before this one
    status: str  # ok, or refused
    reason: str


class BlockAnswer(NamedTuple):
    """A device's message for a block, or None and the reason why there is none."""

    client: int
    data: bytes | None
    reason: str


class _Taken(NamedTuple):
    """A device's message on disk, or the reason why it is refused."""

    offset: int
    size: int
    squares: Mapping[str, float]  # mean square of each distinct input
    reason: str


class HessianSums:
    """Add up the messages of devices.  `tokens` are those agreed with each device that still takes part."""

    def __init__(
        self,
        base: bytes,
        tokens: Mapping[int, int],
        on_reply: Callable[[HessianReply], None],
        folder: Path,
        *,
        claimed: bool = False,
        least: int = 0,
    ) -> None:
        """base: the first 8 bytes of the base model's digest; a block's messages lie in `folder` meanwhile.

        `claimed`: devices say themselves how many tokens they have, so none counts more of them than the median one.
        `least`: devices of a sum at least, where it is that of a sealed run: of integers.
        """
        self.least = least
        self.claimed = claimed
        self.base, self.tokens, self.on_reply, self.folder = base, dict(tokens), on_reply, folder

    def add_up(
        self,
        number: int,
        linears: Mapping[str, nn.Linear],
        answers: Iterable[BlockAnswer],
        down: int,
        shared: Mapping[str, str] | None = None,
    ) -> dict[str, Tensor]:
        """Return the sums of all good answers by layer, float32 [C, C]; `answers` come in any order.

        `down` is the size of the message that each device was sent.  `shared` says which layer shares the sums of which
        (`sharing`); without it the first good answer does.  FleetError when no answer is good.
        """
        total: dict[str, Tensor] = {}
        shared, reason, kind = shared or {}, "", torch.int64 if self.least else torch.float64
        self.folder.mkdir(parents=True, exist_ok=True)
        with closing(Spool(self.folder)) as spool:
            taken = dict[int, _Taken]()
            for client, data, why in answers:
                try:
                    if data is None:
                        raise MessageError(why or "no answer")
                    shared, squares = self._checked(shared, decode(data), client, number, linears)
                except MessageError as error:
                    taken[client] = _Taken(0, len(data or b""), {}, str(error))
                    continue
                taken[client] = _Taken(spool.store(data), len(data), squares, "")
            good = [client for client, one in taken.items() if not one.reason]
            middles = medians([taken[client].squares for client in good])
            held = self.claimed and len(good) >= FEWEST
            usual_tokens = usual([self.tokens[client] for client in good]) if held else math.inf
            for client, one in sorted(taken.items()):
                if not (reason := one.reason or beyond(one.squares, middles)):
                    share = min(1.0, usual_tokens / self.tokens[client])
                    for name, a in decode(spool.read(one.offset, one.size)).payload.arrays.items():
                        added = total.setdefault(name, torch.zeros(a.size, dtype=kind))
                        if self.least:
                            added.add_(torch.from_numpy(on_grid(name, a, len(taken))))
                        else:
                            added.add_(torch.from_numpy(a.astype(np.float64)), alpha=share)
                else:
                    del self.tokens[client]
                status = "refused" if reason else "ok"
                self.on_reply(HessianReply(number, client, one.size, down, status, reason))
        if not self.tokens:
            raise FleetError(
                f"no device is left in block {number}; the last: {reason}",
                hint="compress without --calibrate",
            )
        if len(self.tokens) < self.least:
            raise FleetError(
                f"block {number} has no secure sum: {len(self.tokens)} devices are left, and {self.least} are needed",
                hint="compress without --calibrate",
            )
        return self.whole(total, shared, linears)

    def whole(
        self, total: Mapping[str, Tensor], shared: Mapping[str, str], linears: Mapping[str, nn.Linear]
    ) -> dict[str, Tensor]:
        """Return the sums by layer, float32 [C, C], of the lower triangles of the distinct inputs."""
        unit = GRID if self.least else 1.0
        whole = {n: from_lower_triangle(t.double() * unit, linears[n].in_features) for n, t in total.items()}
        return {name: whole[shared[name]] for name in linears}

    def unsealed(
        self, number: int, units: np.ndarray, shared: Mapping[str, str], linears: Mapping[str, nn.Linear]
    ) -> dict[str, Tensor]:
        """Return the sums by layer of int64[d], a secure sum of `sealed_units`; FleetError where no inputs have them."""
        names = sorted(name for name, of in shared.items() if name == of)
        widths = [linears[name].in_features for name in names]
        parts = np.split(units, np.cumsum([C * (C + 1) // 2 for C in widths])[:-1])
        tokens = sum(self.tokens.values())
        try:
            for name, C, part in zip(names, widths, parts, strict=True):
                check_sums(name, (part * GRID).astype(np.float32), C, tokens)
        except MessageError as error:
            raise FleetError(
                f"the secure sum of block {number} is not usable: {error.message}; which device is wrong cannot be told",
                hint="compress without --calibrate",
            ) from error
        total = {name: torch.from_numpy(part) for name, part in zip(names, parts, strict=True)}
        return self.whole(total, shared, linears)

    def _checked(
        self,
        shared: Mapping[str, str],
        message: Message,
        client: int,
        number: int,
        linears: Mapping[str, nn.Linear],
    ) -> tuple[dict[str, str], dict[str, float]]:
        """Return which layer shares which sums in a reply, and the mean square of each distinct input; MessageError."""
        if (message.round, message.base) != (number, self.base):
            raise MessageError(
                f"reply is for block {message.round} of {message.base.hex()}, this is block {number} of {self.base.hex()}"
            )
        payload = message.payload
        tokens = payload.int("tokens")
        if tokens != self.tokens[client]:
            raise MessageError(f"reply is of {tokens} tokens, agreed were {self.tokens[client]}")
        found = {name: name for name in payload.arrays}
        found |= {n: str(of) for n, of in payload.scalars.items() if n != "tokens"}
        if (
            set(found) != set(linears)
            or any(found[name] != of for name, of in shared.items())
            or set(found.values()) != set(payload.arrays)
        ):
            raise MessageError("reply is not about the layers of the block")
        for name, of in found.items():
            if linears[name].in_features != linears[of].in_features:
                raise MessageError(f"'{name}' cannot share the sums of '{of}': their inputs differ in size")
        squares = {n: check_sums(n, a, linears[n].in_features, tokens) for n, a in payload.arrays.items()}
        return found, squares


def medians(squares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the lower median of the devices' mean squares by input; {} for one device, which nothing can be held against."""
    if len(squares) < 2:
        return {}
    return {name: usual([one[name] for one in squares]) for name in squares[0]}


def beyond(squares: Mapping[str, float], middles: Mapping[str, float]) -> str:
    """Return why a device's mean squares are too large beside the medians, "" where none is."""
    for name, middle in middles.items():
        if squares[name] > TIMES * middle:
            times = squares[name] / middle
            return f"the mean square of '{name}' is {times:.3g} times the median of the devices, {TIMES:g} at most"
    return ""


def message_of(H: Mapping[str, Tensor], tokens: int, number: int, base: bytes) -> bytes:
    """Return a device's message: the sums over its windows.

    NAME         float32 [C (C + 1) / 2]: the lower triangle of 2 sum x x^T, row by row, for the first layer of each distinct
                 input (q, k and v share one tensor of `H`)
    NAME (text)  for every other layer: the layer whose sums it shares
    tokens       how many tokens are in the sums
    """
    shared = sharing(H)
    arrays = {name: lower_triangle(H[name]).numpy() for name, of in shared.items() if name == of}
    texts = {name: of for name, of in shared.items() if name != of}
    return encode(Message(number, base, Payload(arrays, {"tokens": tokens, **texts})))


def sealed_units(H: Mapping[str, Tensor], clients: int) -> np.ndarray:
    """Return int64[d], what a device gives to a secure sum of so many at most: its lower triangles by name, on the grid."""
    names = sorted(name for name, of in sharing(H).items() if name == of)
    return np.concatenate([on_grid(name, lower_triangle(H[name]).numpy(), clients) for name in names])


def on_grid(name: str, sums: np.ndarray, clients: int) -> np.ndarray:
    """Return the nearest integers in units of `GRID`; MessageError for sums that so many devices could not add up."""
    units = np.rint(sums.astype(np.float64) / GRID)
    if not bool((np.abs(units) < 2.0**62 / clients).all()):
        raise MessageError(f"'{name}' holds sums that are too large for a secure sum of {clients:,} devices")
    return units.astype(np.int64)


def sharing(H: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, for each layer, the first that has the same tensor in `H`: those that read the same input."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(h), name) for name, h in H.items()}


def block_message(folder: Path, number: int, base: bytes) -> bytes:
    """Return the message with the finished block in `folder`, encoded as in the artefact."""
    file = block_file(folder, number)
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        grids = json.loads(opened.metadata()["head"])["weights"]
    arrays = {
        n: (t.view(torch.uint16) if t.dtype is torch.bfloat16 else t).numpy() for n, t in tensors.items()
    }
    return encode(Message(number, base, Payload(arrays, {"grids": json.dumps(grids)})))


def weights_of(payload: Payload) -> dict[str, Quantised | Tensor]:
    """Return the compressed weights in a block's message, by name; MessageError where they are not as agreed."""
    try:
        grids = json.loads(str(payload.scalars["grids"]))
        return {name: _weight(payload, name, grid) for name, grid in grids.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise MessageError(f"the compressed block is not as agreed ({error!r})") from error


def _weight(payload: Payload, name: str, grid: list[Any] | None) -> Quantised | Tensor:
    if grid is None:
        return _tensor(payload, name)
    bits, group, columns, *names = grid
    codebook, superblocks = (*names, "", "")[:2]
    if codebook and codebook not in CODEBOOKS:
        raise ValueError(f"the codebook {codebook!r:.40}")
    if superblocks and superblocks not in SUPER_TYPES:
        raise ValueError(f"the super-block type {superblocks!r:.40}")
    return assembled(
        lambda part: _tensor(payload, f"{name}.{part}"), bits, group, columns, codebook, superblocks
    )


def _tensor(payload: Payload, name: str) -> Tensor:
    tensor = torch.from_numpy(payload.array(name).copy())
    return tensor.view(torch.bfloat16) if tensor.dtype is torch.uint16 else tensor


def check_sums(name: str, a: np.ndarray, C: int, tokens: int) -> float:
    """Return the mean square, or raise MessageError unless `a` can be the lower triangle of 2 sum x x^T, x [C], over `tokens`.

    Checked are its type, shape and range, and that it is positive semidefinite within rounding: scaled to a unit diagonal
    and with `ROUNDING` added to that, it has a Cholesky factor.  That takes C^3 / 3 multiplications in float32, and 8 C^2
    bytes.
    """
    if a.dtype != np.float32 or a.shape != (C * (C + 1) // 2,):
        raise MessageError(f"'{name}' is {a.dtype} {a.shape}, agreed was float32 ({C * (C + 1) // 2},)")
    if bad := int(np.count_nonzero(~np.isfinite(a))):
        raise MessageError(f"'{name}' holds {bad} values that are not finite")
    squares = a[_diagonal_indices(C)].astype(np.float64)
    if bad := int(np.count_nonzero(squares < 0)):
        raise MessageError(f"'{name}' holds {bad} sums of squares below zero")
    if (top := squares.max(initial=0) / (2 * tokens)) > LARGEST**2:
        raise MessageError(f"'{name}' holds a mean square of {top:.3g}, agreed was {LARGEST**2:.3g} at most")
    scale = (np.maximum(squares, SMALLEST) ** -0.5).astype(np.float32)
    R, at = np.zeros((C, C), np.float32), 0
    with np.errstate(over="ignore"):
        for i in range(C):
            R[i, : i + 1] = a[at : at + i + 1] * scale[i] * scale[: i + 1]
            at += i + 1
    np.fill_diagonal(R, 1 + ROUNDING)
    if failed := int(torch.linalg.cholesky_ex(torch.from_numpy(R))[1]):
        raise MessageError(
            f"'{name}' is no sum of x x^T: row {failed - 1} makes it not positive semidefinite"
        )
    return float(squares.mean() / (2 * tokens))


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


class ClientHessians:
    """Hessians from simulated devices, one after the other."""

    def __init__(
        self,
        model: Model,
        windows: Mapping[int, Tensor],
        folder: Path,
        on_reply: Callable[[HessianReply], None],
        least: int = 0,
    ) -> None:
        """windows: int64 [n, length] by client, the same length for all.  `folder` holds the finished blocks, `least` as in
        `HessianSums`.
        """
        self.base, self.folder = bytes.fromhex(model.digest)[:8], folder
        tokens = {c: own.numel() for c, own in windows.items()}
        self.sums = HessianSums(self.base, tokens, on_reply, folder, least=least)
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
            self._down = len(block_message(self.folder, number, self.base))
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

    def _answers(self, number: int, linears: Mapping[str, nn.Linear]) -> Iterator[BlockAnswer]:
        for client in sorted(self.sums.tokens):
            try:
                answer = BlockAnswer(client, self.answer(client, number, linears), "")
            except Interrupted:  # it is the whole work that stops
                raise
            except (FleetuneError, OSError) as error:
                answer = BlockAnswer(client, None, str(error))
            yield answer

    def _path(self, client: int) -> Path:
        return self.folder / "devices" / f"{client}.safetensors"

    def _save_states(self, client: int, states: list[Tensor]) -> None:
        self._path(client).parent.mkdir(parents=True, exist_ok=True)
        save_file({"states": torch.cat(states).cpu()}, self._path(client))

    def _load_states(self, client: int) -> list[Tensor]:
        states = load_file(self._path(client))["states"]
        return [state[None] for state in states]
