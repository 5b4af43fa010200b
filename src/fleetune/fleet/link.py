# SPDX-License-Identifier: Apache-2.0
"""Say what a way between server and devices can do, and read the answers that come by it.

There are two: the server's own door (`flower/gate.py`), and the Grid of a Flower that is there already
(`flower/server_app.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from fleetune.errors import MessageError
from fleetune.fleet.mail import TOO_LARGE
from fleetune.fleet.orders import Order, Reply

MAY_ANSWER: Final[Mapping[str, tuple[str, ...]]] = {
    "work": ("done", "failed", "declined"),
    "job": ("ready", "refused", "failed"),
}
USUAL: Final = ("done", "failed")  # of any other order


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


def answer_in(data: bytes | None, order: Order) -> Reply | None:
    """Return the answer to an order, None for a lost one; one that it cannot be is `failed`, with the reason."""
    if data is None:
        return None
    try:
        if data == TOO_LARGE:
            raise MessageError("the answer is larger than such an answer can be")
        if not data:
            raise MessageError("the answer could not be read")
        reply = Reply.decode(data)
        if reply.nonce != order.nonce or reply.round != order.round:
            raise MessageError("the answer belongs to another order")
        if reply.what not in MAY_ANSWER.get(order.what, USUAL):
            raise MessageError(f"'{order.what}' was answered with '{reply.what}'")
    except MessageError as error:
        return Reply.unusable(order, str(error))
    return reply
