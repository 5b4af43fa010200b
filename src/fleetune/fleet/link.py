"""Say what a way between server and devices can do (`door.py`, `flower/server_app.py`), and read the answers that come by it."""

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple, Protocol

from fleetune.errors import MessageError
from fleetune.fleet.orders import DeviceReply, Order

MAY_ANSWER: Final[Mapping[str, tuple[str, ...]]] = {
    "work": ("done", "failed", "declined"),
    "job": ("ready", "refused", "failed"),
}
USUAL: Final = ("done", "failed")  # of any other order
BURST: Final = 20
REST: Final = 10.0  # less than the usual grace
KINDS: Final = 64  # of lines; all others are one


class Sparing:
    """Lets `BURST` of a kind pass, then one in `REST` seconds, so that who repeats itself fills neither log nor console."""

    def __init__(self) -> None:
        # how often of late, when last, how many not since
        self._kinds: dict[str, tuple[float, float, int]] = {}

    def left_out(self, kind: str) -> int:
        """Return how many of this kind did not pass since the last that did; -1 where this one does not either."""
        now = time.monotonic()
        times, last, left = self._kinds.get(kind, (0.0, now, 0))
        of_late = max(0.0, times - (now - last) / REST) + 1
        passes = of_late <= BURST
        self._kinds[kind] = (of_late, now, 0) if passes else (times, last, left + 1)
        return left if passes else -1

    def line(self, text: str) -> str:
        """Return a line as it is to be told, "" for none; lines are of one kind up to a colon, numbers aside."""
        kind = re.sub(r"\d+", "", text.partition(":")[0])
        left = self.left_out(kind if kind in self._kinds or len(self._kinds) < KINDS else "")
        return f"{text}   ({left} more lines like it were left out)" if left > 0 else "" if left else text


class Link(Protocol):
    """Carry bytes between the server and devices, which are known by the hash of their keys."""

    def online(self) -> Mapping[str, str]:
        """Return the devices that are there now: key -> a mark that changes when the device comes in anew."""
        ...

    def name(self, key: str) -> str:
        """Return what the device with this key is called."""
        ...

    def push(self, key: str, data: bytes, common: int, room: int) -> str | None:
        """Queue an order for a device; its number, or None where the device is not known.

        The last `common` bytes may be those of other orders too: a link keeps them once.  An answer of more than `room`
        bytes is `TOO_LARGE`.
        """
        ...

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield (number, answer) of the orders that are answered by now.

        None where the answer was lost, so that the order is to be given again; b"" where it is no answer.
        """
        ...

    def drop(self, numbers: set[str]) -> None:
        """Forget orders that nobody waits for any longer."""
        ...


def answer_in(data: bytes | None, order: Order) -> DeviceReply | None:
    """Return the answer to an order, None for a lost one; one that it cannot be is `failed`, with the reason."""
    if data is None:
        return None
    try:
        if data == TOO_LARGE:
            raise MessageError("the answer is larger than such an answer can be")
        if not data:
            raise MessageError("the answer could not be read")
        reply = DeviceReply.decode(data)
        if reply.nonce != order.nonce or reply.round != order.round:
            raise MessageError("the answer belongs to another order")
        if reply.what not in MAY_ANSWER.get(order.what, USUAL):
            raise MessageError(f"'{order.what}' was answered with '{reply.what}'")
    except MessageError as error:
        return DeviceReply.unusable(order, str(error))
    return reply


TOO_LARGE: Final = b"too large"  # stands for an answer of more bytes than there is room for


class Letter(NamedTuple):
    """An order on its way; `tail` is one object for all orders that end alike."""

    number: str
    head: bytes
    tail: bytes


class _Open(NamedTuple):
    """An order whose answer is still to come."""

    device: str
    room: int


class Mail:
    """Orders and answers by device; `ring(device)` is called when there is an order for it."""

    def __init__(self) -> None:
        self.ring: Callable[[str], None] = lambda device: None
        self._lock = threading.Lock()
        self._boxes: dict[str, list[Letter]] = {}  # by device: orders that it has not answered
        self._open: dict[str, _Open] = {}  # by number: orders that somebody waits for
        self._answers: dict[str, bytes | None] = {}  # by number: those that are complete, None for a lost one
        self._pieces: dict[str, bytearray] = {}  # by number: what has come of those that are not
        self._tail = b""  # of the last order

    def put(self, device: str, data: bytes, common: int, room: int) -> str:
        """Queue an order, whose last `common` bytes may be those of the one before; return its number.

        Its answer may have `room` bytes.
        """
        number, cut = secrets.token_hex(16), len(data) - common
        with self._lock:
            if (tail := data[cut:]) != self._tail:
                self._tail = tail
            self._boxes.setdefault(device, []).append(Letter(number, data[:cut], self._tail))
            self._open[number] = _Open(device, room)
        self.ring(device)
        return number

    def first(self, device: str) -> Letter | None:
        """Return the next order for a device: the same until it is answered, since it may never have arrived."""
        with self._lock:
            box = self._boxes.get(device)
            return box[0] if box else None

    def waits(self, device: str, number: str) -> bool:
        """Whether a device's answer to an order, or a piece of it, is still wanted."""
        with self._lock:
            order = self._open.get(number)
            return order is not None and order.device == device and number not in self._answers

    def answer(self, device: str, number: str, piece: bytes, *, last: bool = True) -> None:
        """Take a piece of a device's answer.

        An answer to no order of this device is thrown away; one that is too large becomes `TOO_LARGE`; an empty one counts as
        lost.
        """
        with self._lock:
            order = self._open.get(number)
            if order is None or order.device != device or number in self._answers:
                return
            pieces = self._pieces.setdefault(number, bytearray())
            if len(piece) + len(pieces) > order.room:
                self._answers[number] = TOO_LARGE
            elif not last:
                pieces += piece
                return
            else:
                self._answers[number] = (bytes(pieces) + piece if pieces else piece) or None
            del self._pieces[number]
            self._take_out(device, number)

    def lose(self, device: str) -> None:
        """Note that a device has gone: no answer to what it was ordered will come."""
        with self._lock:
            self._boxes.pop(device, None)
            for number in [n for n, order in self._open.items() if order.device == device]:
                self._answers.setdefault(number, None)

    def answered(self, numbers: set[str]) -> list[str]:
        """Return the orders that are answered, or lost."""
        with self._lock:
            return [n for n in self._answers if n in numbers]

    def pull(self, number: str) -> bytes | None:
        """Return the answer to an order, once; the order is forgotten."""
        with self._lock:
            answer = self._answers.get(number)
        self.drop({number})
        return answer

    def drop(self, numbers: set[str]) -> None:
        """Forget orders, and their answers."""
        with self._lock:
            for number in numbers:
                order = self._open.pop(number, None)
                self._answers.pop(number, None)
                self._pieces.pop(number, None)
                if order is not None:
                    self._take_out(order.device, number)

    def _take_out(self, device: str, number: str) -> None:
        if box := self._boxes.get(device):
            box[:] = [letter for letter in box if letter.number != number]
