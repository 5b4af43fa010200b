"""Serve an ASGI app from a thread of this process, with uvicorn."""

import asyncio
import contextlib
import functools
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from fleetune.errors import FleetError

LONGEST_HEAD: Final = 1 << 15  # bytes of a request's head
HEAD: Final = 20.0  # seconds in which the head of a request has to arrive, and before it the handshake of TLS
KEEP: Final = 75  # seconds that a connection may be idle: longer than a device keeps it
CONNECTIONS: Final = 1 << 16  # open files that are asked for
RESERVE: Final = 256  # of them that are no connections


@dataclass(frozen=True)
class Address:
    """Where a server listens, and its certificate and key (PEM files); without them it speaks plain HTTP."""

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None


class HttpServer:
    """An app that is served from `open` to `close`."""

    def __init__(self, app: ASGIApp, address: Address) -> None:
        self.address = address
        self._loop: asyncio.AbstractEventLoop | None = None
        self._config = uvicorn.Config(
            app,
            ssl_certfile=address.certificate,
            ssl_keyfile=address.key,
            ws="none",
            http=Connection,
            h11_max_incomplete_event_size=LONGEST_HEAD,
            access_log=False,
            log_config=None,  # the default closes every handler of the process
            log_level="critical",
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP,
            timeout_graceful_shutdown=5,
        )

    def open(self) -> None:
        """Start to listen; FleetError for a certificate or an address that cannot be used."""
        host, port = self.address.host, self.address.port
        try:
            self._config.load()
        except (OSError, ssl.SSLError) as error:
            raise FleetError(
                f"the certificate {self.address.certificate} cannot be used: {error}",
                hint=f"make it anew: fleetune fleet keys certificate DIR {host}",
            ) from error
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            opened = _Listening(
                socket.create_server((host, port), family=family, backlog=1024), _connections()
            )
        except OSError as error:
            raise FleetError(
                f"cannot listen on {host}:{port}: {str(error.strerror).partition(' (while')[0]}",
                hint="does another server run here? choose another --port or --host; for the page: --page [HOST:]PORT",
            ) from error
        self._server = uvicorn.Server(self._config)
        self._thread = threading.Thread(
            target=functools.partial(asyncio.run, self._serve(opened)), name="http", daemon=True
        )
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)

    async def _serve(self, opened: socket.socket) -> None:
        self._loop = loop = asyncio.get_running_loop()
        if self.address.certificate is not None:  # uvicorn has no option for it
            loop.create_server = functools.partial(loop.create_server, ssl_handshake_timeout=HEAD)  # type: ignore[method-assign]
        await self._server.serve(sockets=[opened])

    def call(self, function: Callable[[], None]) -> None:
        """Have the server's event loop call a function soon; nothing happens where it does not run."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Stop to listen."""
        self._server.should_exit = True
        self._thread.join(10)


class Connection(H11Protocol):
    """A connection that is closed when a request's head does not end: half-open ones would take all that the system allows."""

    _clock: asyncio.TimerHandle | None = None
    _before: object = None  # the last request when the clock was set

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the head of a request."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Take what has come; where it is the begin of a head, the rest is expected soon."""
        super().data_received(data)
        if self._last is None or self.cycle.response_complete:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        if self._clock is not None:
            self._clock.cancel()

    @property
    def _last(self) -> object:
        """The last request whose head has come, None before the first."""
        return cast(object, self.cycle)

    def _expect(self) -> None:
        if self._clock is None or self._before is not self._last:
            if self._clock is not None:
                self._clock.cancel()
            self._before = self._last
            self._clock = self.loop.call_later(HEAD, self._check)

    def _check(self) -> None:
        self._clock = None
        if self._before is self._last:
            self.transport.close()


class _Listening(socket.socket):
    """A listening socket that hangs up at once on what would be more than `most` open connections.

    The rest of the open files that the system allows is for the run.
    """

    def __init__(self, opened: socket.socket, most: int) -> None:
        super().__init__(opened.family, opened.type, opened.proto, opened.detach())
        self.most = most
        self.accepted = list[socket.socket]()  # closed ones among them

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection; BlockingIOError, which asyncio takes for none, where there are too many."""
        connection, address = super().accept()
        if len(self.accepted) >= self.most:
            self.accepted = [one for one in self.accepted if one.fileno() >= 0]
        if len(self.accepted) >= self.most:
            connection.close()
            raise BlockingIOError("too many connections")
        self.accepted.append(connection)
        return connection, address


def _connections() -> int:
    """Have the system allow this process as many open files as it can, often 1,024 otherwise; return those for connections."""
    if sys.platform == "win32":
        return CONNECTIONS
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS if hard == resource.RLIM_INFINITY else min(CONNECTIONS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a system may allow less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return CONNECTIONS if allowed == resource.RLIM_INFINITY else max(allowed // 2, allowed - RESERVE)
