# SPDX-License-Identifier: Apache-2.0
"""Refuse requests that were sent before, and count those that are refused.

A signature is of a time, not of a request, so whoever sees a request could send it again for five minutes.  Here a signed
time counts once.
"""

from __future__ import annotations

import base64
import datetime
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fleetune.fleet.keys import fingerprint

SLACK: Final = 10.0  # seconds that a request may take longer than another of the same device
WINDOW: Final = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE  # seconds for which Flower takes a signed time
DRIFT: Final = 0.01  # seconds by which a device's clock may lose against the server's, in each second
KINDS: Final = 16  # of refusals that are told apart between two looks
LONGEST_KEY: Final = 1024  # bytes of a public key (PEM) in a request's head


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
