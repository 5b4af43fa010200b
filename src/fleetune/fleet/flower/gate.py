# SPDX-License-Identifier: Apache-2.0
"""Open the server's door to devices: a thread of this process in which they come in, and get orders by our exchange."""

from __future__ import annotations

import contextlib
import functools
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvicorn
from fastapi import FastAPI
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.supercore.constant import NodeStatus
from flwr.supercore.error import http_error_translator
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from fleetune.errors import FleetError
from fleetune.fleet.flower import clock, wire
from fleetune.fleet.flower.door import Connection, Door
from fleetune.fleet.flower.exchange import Exchange
from fleetune.fleet.flower.limits import Once, Refusals, Watch
from fleetune.fleet.flower.state import State
from fleetune.fleet.keys import PublicKey, fingerprint
from fleetune.fleet.mail import Mail

KEEP: Final = 75  # seconds that a connection may be idle: longer than a device keeps it
CONNECTIONS: Final = 1 << 16  # open files that are asked for


@dataclass(frozen=True)
class Address:
    """Where the gate listens, and its certificate and key (PEM files); without them it speaks plain HTTP."""

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None


class Gate:
    """A `Link` over Flower.  With `keys`, only these devices come in; without, any that has a key of its own."""

    def __init__(self, address: Address, keys: Sequence[PublicKey] | None) -> None:
        wire.hush()
        once, self.refusals = Once(clock.install().age), Refusals()
        self.mail = Mail()
        self.state = State(self.mail)
        self._exchange = Exchange(self.state)
        self._names: dict[int, str] = {}  # by number of the node
        self._nodes: dict[str, int] = {}  # by hash of the key, of those that were ever there
        self._here: set[int] = set()  # nodes that were there at the last look
        self._keys: dict[int, str] = {}  # by node: the hash of its key
        app = FastAPI(
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            middleware=[
                Middleware(Watch, refusals=self.refusals),
                Middleware(Door, state=self.state, exchange=self._exchange, once=once, any_key=keys is None),
                Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
                Middleware(ProtobufTranslationMiddleware),
                Middleware(NodeAuthMiddleware),
            ],
        )
        app.state.linkstate_factory, app.state.enable_supernode_auth = self.state, keys is not None
        app.include_router(fleet_router)
        self.address = address
        self._config = uvicorn.Config(
            app,
            ssl_certfile=address.certificate,
            ssl_keyfile=address.key,
            workers=1,
            ws="none",
            http=Connection,
            access_log=False,
            log_level="error",
            lifespan="off",
            timeout_keep_alive=KEEP,
            timeout_graceful_shutdown=5,
        )
        if keys is not None:
            self.admit(keys)

    def open(self) -> None:
        """Start to listen; FleetError where that is not possible."""
        self._listen()
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)

    def _listen(self) -> None:
        """Make the thread that serves; a certificate or an address that cannot be used is found here."""
        host, port = self.address.host, self.address.port
        try:
            self._config.load()
        except (OSError, ssl.SSLError) as error:
            raise FleetError(
                f"the certificate {self.address.certificate} cannot be used: {error}",
                hint=f"make it anew: fleetune fleet keys certificate DIR {host}",
            ) from error
        try:
            opened = socket.create_server((host, port), family=_family(host), backlog=1024)
        except OSError as error:
            raise FleetError(
                f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another --port or --host"
            ) from error
        _allow_connections()
        self._server = uvicorn.Server(self._config)
        serve = functools.partial(self._server.run, sockets=[opened])
        self._thread = threading.Thread(target=serve, name="gate", daemon=True)

    def close(self) -> None:
        """Stop listening."""
        self._exchange.close()
        self._server.should_exit = True
        self._thread.join(10)

    def admit(self, keys: Sequence[PublicKey]) -> None:
        """Make these the keys whose devices may come in; others that were are thrown out."""
        kept = set()
        for key in keys:
            if (node := self.state.get_node_id_by_public_key(key.pem)) is None:
                self.state.node_public_key_to_node_id.pop(key.pem, None)  # of a key that was revoked
                node = self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key.pem, 0, name=key.name)
            self._names[node] = key.name
            kept.add(node)
        for info in self.state.get_node_info():
            if info.node_id not in kept and info.status != NodeStatus.UNREGISTERED:
                self.state.delete_node(NOOP_FLWR_AID, info.node_id)

    # What every link has ----------------------------------------------------------------------------------

    def online(self) -> Mapping[str, str]:
        """Return the devices that are there now, each with the time at which it came in.

        The orders of those that have gone since the last look are lost.
        """
        found: dict[str, str] = {}
        before, self._here = self._here, set()
        for info in self.state.get_node_info(statuses=[NodeStatus.ONLINE]):
            if (key := self._keys.get(info.node_id)) is None:
                key = self._keys[info.node_id] = fingerprint(info.public_key)
            found[key] = f"{info.node_id} {info.last_activated_at}"
            self._nodes[key] = info.node_id
            self._here.add(info.node_id)
        for node in before - self._here:
            self.mail.lose(node)
        return found

    def name(self, key: str) -> str:
        """Return what the device with this key is called: its key file, or the begin of its key's hash."""
        return self._names.get(self._nodes.get(key, 0), key[:8])

    def push(self, key: str, data: bytes, common: int, room: int) -> str | None:
        """Queue an order for a device; its last `common` bytes are kept once where the order before ended with them."""
        node = self._nodes.get(key)
        return None if node is None else self.mail.put(node, data, common, room)

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield the answers that are complete, None for one that will not come: its device is away."""
        for number in self.mail.answered(numbers):
            yield number, self.mail.pull(number)

    def drop(self, numbers: set[str]) -> None:
        """Forget orders that nobody waits for any longer."""
        self.mail.drop(numbers)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _allow_connections() -> None:
    """Let this process have as many open connections as the system allows: often 1,024 unless asked for more."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = CONNECTIONS if hard == resource.RLIM_INFINITY else min(CONNECTIONS, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(OSError, ValueError):  # a system may allow less than it says
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
