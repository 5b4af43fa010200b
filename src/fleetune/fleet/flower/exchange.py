# SPDX-License-Identifier: Apache-2.0
"""Take a device's answer and give it its next order, in one request.

Flower's own way is a request for a message, one for each of its objects, and as many for the reply: about ten, and one
every few seconds to see that there is nothing.  Here the request waits until there is an order, and it is the device's
heartbeat meanwhile.

    POST /v1/fleet/exchange     signed as every request of a node is (`wire.signed`)
        fleetune-order: NUMBER      the body is the answer to this order, or a piece of it
        fleetune-next: order        wait for the next order (the default)
                       piece        none: the next piece follows
                       nothing      none: the device leaves
    200     fleetune-order: NUMBER; the body is the order.  A device that asks has no other to work on: one that it has not
            answered did not arrive, and is given again
    204     there was none
    410     the server has begun anew: the device has to come in first

Whose request it is says the signature alone, before a byte of the body is read: the node is the one with that key
(`door.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect
from starlette.types import Send

from fleetune.fleet.flower import wire
from fleetune.fleet.flower.state import State
from fleetune.fleet.mail import Letter

HOLD: Final = 15.0  # seconds a request waits for an order: less than two heartbeats, of which one may fail
CHUNK: Final = 1 << 16  # bytes handed to a connection at once: more would lie in memory for each device


class Exchange:
    """Answers these requests; all of it but `close` runs in the thread of the server's event loop."""

    def __init__(self, state: State) -> None:
        self.state, self.closing = state, False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[int, asyncio.Future[None]] = {}  # by node: its request that waits for an order
        self._coming: dict[int, asyncio.Future[bytes]] = {}  # by node: the body that is on its way
        state.mail.ring = self._ring

    async def answer(self, node: int | None, request: Request, send: Send) -> None:
        """Answer a node's request; HTTPException 410 for one that has not come in since the server began, 409 as `_body`."""
        self._loop = asyncio.get_running_loop()
        if node is None or not self.state.alive(node):
            raise HTTPException(410)
        wants = request.headers.get(wire.NEXT, "order")
        if number := request.headers.get(wire.ORDER):
            try:
                self.state.mail.answer(
                    node, number, await self._body(node, number, request), last=wants != "piece"
                )
            except ClientDisconnect:
                return
        letter = await self._next(node) if wants == "order" and not self.closing else None
        await _respond(send, 204 if letter is None else 200, letter)

    async def _body(self, node: int, number: str, request: Request) -> bytes:
        """Return an answer's bytes, b"" for one that nobody waits for: it is thrown away as it comes.

        A node has one on its way, so that its connections fill no memory: HTTPException 409 when a later one begins.
        """
        if not self.state.mail.waits(node, number):
            async for _ in request.stream():
                pass
            return b""
        if (earlier := self._coming.get(node)) is not None:
            earlier.cancel()
        coming = self._coming[node] = asyncio.ensure_future(request.body())
        try:
            await asyncio.wait([coming])
        finally:
            coming.cancel()
            if self._coming.get(node) is coming:
                del self._coming[node]
        if coming.cancelled():
            raise HTTPException(409)
        return coming.result()

    async def _next(self, node: int) -> Letter | None:
        """Return the next order for a node; None where none comes, or a later request of the node waits for it."""
        assert self._loop is not None
        self._wake(node)  # a request of the node that waits is from before: its connection is dead
        if (letter := self.state.mail.first(node)) is not None:
            return letter
        mine = self._waiting[node] = self._loop.create_future()
        await asyncio.wait([mine], timeout=HOLD)
        if self._waiting.get(node) is not mine:
            return None
        del self._waiting[node]
        if not self.state.is_online(node):
            return None
        self.state.alive(node)
        return self.state.mail.first(node)

    def _ring(self, node: int) -> None:
        """Have a node's request look again; from any thread."""
        if self._loop is not None and not self.closing:
            self._loop.call_soon_threadsafe(self._look, node)

    def _look(self, node: int) -> None:
        if (future := self._waiting.get(node)) is not None and not future.done():
            future.set_result(None)

    def _wake(self, node: int) -> None:
        """Send a node's waiting request away without an order."""
        if (future := self._waiting.pop(node, None)) is not None and not future.done():
            future.set_result(None)

    def close(self) -> None:
        """Send every waiting request away; from any thread."""
        self.closing = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        for node in list(self._waiting):
            self._wake(node)


async def _respond(send: Send, status: int, letter: Letter | None = None) -> None:
    parts = [] if letter is None else [letter.head, letter.tail]
    headers = [(b"content-length", str(sum(map(len, parts))).encode())] if status != 204 else []
    if letter is not None:
        headers += [
            (wire.ORDER.encode(), letter.number.encode()),
            (b"content-type", b"application/octet-stream"),
        ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for chunk in _chunks(parts):
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _chunks(parts: Iterable[bytes]) -> Iterable[bytes]:
    """Cut parts into chunks; small ones are joined."""
    parts = list(parts)
    if sum(map(len, parts)) <= CHUNK:
        parts = [b"".join(parts)]
    return (part[i : i + CHUNK] for part in parts for i in range(0, len(part), CHUNK))
