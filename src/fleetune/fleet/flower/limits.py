# SPDX-License-Identifier: Apache-2.0
"""Bound what a device that has a key can make the server keep, and refuse requests that were sent before.

An answer in one request (`exchange.py`) is bounded by the `Mail`.  This is about answers in Flower's protocol.  Flower lets a
device announce as many objects as it likes, under the name of any device, and keeps what it uploads.  Here an upload is one
answer, to an order that this very device was given, in the form in which answers are packed (`wire.pack`), and of as many
pieces as there is room for.  A piece is one request, which has a limit of its own (`door.LIMIT`).

In both protocols the signature is of a time, not of a request, so whoever sees a request could send it again for five
minutes.  Here a signed time counts once.
"""

from __future__ import annotations

import base64
import datetime
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fleetune.fleet.flower.wire import PIECE
from fleetune.fleet.keys import fingerprint

SLACK: Final = 10.0  # seconds that a request may take longer than another of the same device
WINDOW: Final = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE  # seconds for which Flower takes a signed time
DRIFT: Final = 0.01  # seconds by which a device's clock may lose against the server's, in each second
KINDS: Final = 16  # of refusals that are told apart between two looks
LONGEST_KEY: Final = 1024  # bytes of a public key (PEM) in a request's head


class Uploads:
    """The orders that may be answered: to whom each was given, and how many pieces its answer may have."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, int]] = {}

    def expect(self, number: str, node: int, room: int) -> None:
        """Note that a node was given an order whose answer may have `room` bytes."""
        self._open[number] = node, -(-room // PIECE)

    def forget(self, numbers: Iterable[str]) -> None:
        """Note that these orders are answered, or that nobody waits for their answers."""
        for number in numbers:
            self._open.pop(number, None)

    def check(self, asked: PushMessagesRequest) -> tuple[int, str]:
        """Return the HTTP status for an upload that begins, and why it is refused.

        200 for one to take, 204 for an answer that nobody waits for any longer.
        """
        if len(asked.messages_list) != 1 or len(asked.message_object_trees) != 1:
            return 400, "an upload is one answer"
        about, tree = asked.messages_list[0].metadata, asked.message_object_trees[0]
        if about.src_node_id != asked.node.node_id:
            return 403, "the answer is in another device's name"
        if (order := self._open.get(about.reply_to_message_id)) is None:
            return 204, "nobody waits for the answer"
        node, most = order
        if node != asked.node.node_id:
            return 403, "the order was another device's"
        if tree.object_id != about.message_id or (pieces := _pieces(tree)) is None:
            return 400, "the answer is not in pieces as agreed"
        if pieces > most:
            return 413, f"the answer has {pieces} pieces, {most} at most"
        del self._open[about.reply_to_message_id]
        return 200, ""


def _pieces(tree: ObjectTree) -> int | None:
    """Count the pieces of a message; None where its objects are nested in another way, or one is there twice."""
    if not tree.children:
        return 0  # an error
    if len(tree.children) > 1:
        return None
    record = tree.children[0]
    if any(piece.children for piece in record.children):
        return None
    ids = {tree.object_id, record.object_id, *(piece.object_id for piece in record.children)}
    return len(record.children) if len(ids) == len(record.children) + 2 else None


@dataclass
class _Signer:
    """What is known of a key: the age of the newest time that it signed, when that came, and the times of late."""

    youngest: float
    at: float
    seen: dict[str, float] = field(default_factory=dict)  # signed time -> when it came


class Once:
    """The times that each key has signed of late: one that comes again, or much later than others of its key, is refused.

    `age(signed)` is how many seconds ago a time was by the server's clock; a device's clock may be ahead or behind.
    """

    def __init__(self, age: Callable[[datetime.datetime], float]) -> None:
        self._age = age
        self._signers: dict[str, _Signer] = {}

    def fresh(self, key: str, stamp: str) -> bool:
        """Tell whether a key (base64, of which several texts may be one key) signs this time (ISO 8601) for the first time."""
        key = fingerprint(base64.b64decode(key))
        age, now = self._age(datetime.datetime.fromisoformat(stamp)), time.monotonic()
        known = self._signers.get(key)
        if known is None or now - known.at > WINDOW:
            known = self._signers[key] = _Signer(age, now)
        youngest = known.youngest + DRIFT * (now - known.at)
        if age > youngest + SLACK or stamp in known.seen:
            return False
        known.youngest, known.at, known.seen[stamp] = min(age, youngest), now, now
        while now - known.seen[first := next(iter(known.seen))] > 2 * SLACK:
            del known.seen[first]
        return True


class Guard:
    """The innermost part of the door: it sees requests in Flower's protocol whose signature is good."""

    def __init__(self, app: ASGIApp, uploads: Uploads, once: Once) -> None:
        self.app, self.uploads, self.once = app, uploads, once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused; hand on the others."""
        if (answer := self._refusal(scope)) is not None:
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        state = scope.get("state", {})
        if (asked := state.get("protobuf_request")) is None:
            return None
        head = Request(scope).headers
        if not self.once.fresh(head[FLEET_HTTP_PUBLIC_KEY_HEADER], head[TIMESTAMP_HEADER]):
            return JSONResponse({"detail": "the request was sent before"}, 401)
        if not isinstance(asked, PushMessagesRequest):
            return None
        status, reason = self.uploads.check(asked)
        if status == 204:  # a late device goes on with its next order
            state["protobuf_response"] = PushMessagesResponse()
            return Response()
        return None if status == 200 else JSONResponse({"detail": reason}, status)


class Refusals:
    """The outermost part of the door: count what is refused, by status, path and the key that is claimed."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, str, str], int] = {}
        self._lock = threading.Lock()

    def note(self, status: int, path: str, key: str) -> None:
        """Count a refusal; beyond `KINDS` of them, as one of no kind in particular."""
        kind = status, path, key
        with self._lock:
            if kind not in self._counts and len(self._counts) >= KINDS:
                kind = 0, "", ""
            self._counts[kind] = self._counts.get(kind, 0) + 1

    def taken(self) -> dict[tuple[int, str, str], int]:
        """Return the counts since the last call: (status, path, hash of the claimed key) -> requests; 0 for others."""
        with self._lock:
            found, self._counts = self._counts, {}
        return found


class Watch:
    """Tell `refusals` of every request that is answered with an error."""

    def __init__(self, app: ASGIApp, refusals: Refusals) -> None:
        self.app, self.refusals = app, refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a request, and look at the status of its answer."""

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                path = scope["path"] if message["status"] != 404 else ""
                self.refusals.note(message["status"], path[:64], _claimed(scope))
            await send(message)

        await self.app(scope, receive, seen if scope["type"] == "http" else send)


def _claimed(scope: Scope) -> str:
    """Return the hash of the key that a request claims, "" for none."""
    stated = Request(scope).headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, "")
    try:
        return fingerprint(base64.b64decode(stated, validate=True)) if 0 < len(stated) <= LONGEST_KEY else ""
    except ValueError:
        return ""
