# SPDX-License-Identifier: Apache-2.0
"""Decide which connections the server keeps: so many in all, and so many of one address.

A place is held firmly only by a request that has passed the checks and is at the engine.  Any other connection waits for
its client: for the head of a request, or for its body.  When there is no place for a new connection, the one that has
waited longest is cut off, heads before bodies.  So connections that are opened and left open shut nobody out: an honest
request needs a few milliseconds, and takes the place of the oldest of them.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from enum import IntEnum
from typing import Final

MAX_CONNECTIONS: Final = 64
MAX_OF_ADDRESS: Final = 48  # so that requests of one address at the engine leave places for others


class Stage(IntEnum):
    """What a connection waits for; the last one is never cut off."""

    HEAD = 0
    BODY = 1
    ENGINE = 2


class Places:
    """The open connections of a server, by stage; safe to use from several threads."""

    def __init__(self, total: int = MAX_CONNECTIONS, of_address: int = MAX_OF_ADDRESS) -> None:
        self.total, self.of_address = total, of_address
        self._lock = threading.Lock()
        self._open: dict[socket.socket, tuple[Stage, float, str]] = {}  # -> stage, its begin, address

    def enter(self, connection: socket.socket, address: str) -> bool:
        """Give a new connection a place, another's if need be; False when all places are held at the engine."""
        with self._lock:
            own = [c for c, (_, _, a) in self._open.items() if a == address]
            if len(own) >= self.of_address and not self._cut_oldest(own):
                return False
            if len(self._open) >= self.total and not self._cut_oldest(list(self._open)):
                return False
            self._open[connection] = (Stage.HEAD, time.monotonic(), address)
            return True

    def move(self, connection: socket.socket, stage: Stage) -> None:
        """Say what a connection waits for now; ConnectionAbortedError for one that was cut off."""
        with self._lock:
            if connection not in self._open:
                raise ConnectionAbortedError("the place was given to another connection")
            self._open[connection] = (stage, time.monotonic(), self._open[connection][2])

    def leave(self, connection: socket.socket) -> None:
        """Give the place of a connection back; one that has none is ignored."""
        with self._lock:
            self._open.pop(connection, None)

    def cut_all(self) -> None:
        """Cut off every connection, whatever it waits for."""
        with self._lock:
            for connection in list(self._open):
                self._cut(connection)

    def _cut_oldest(self, connections: list[socket.socket]) -> bool:
        """Cut off the one of `connections` that has waited longest in the earliest stage; False if none is waiting."""
        oldest = min(connections, key=lambda c: self._open[c][:2])
        if self._open[oldest][0] == Stage.ENGINE:
            return False
        self._cut(oldest)
        return True

    def _cut(self, connection: socket.socket) -> None:
        del self._open[connection]
        with suppress(OSError):  # it was closed at the same moment
            connection.shutdown(socket.SHUT_RDWR)  # its thread reads an end, and closes it
