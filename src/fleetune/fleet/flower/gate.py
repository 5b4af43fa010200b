# SPDX-License-Identifier: Apache-2.0
"""Open the server's door to devices: Flower's Fleet API in a thread of this process, and nothing else behind it."""

from __future__ import annotations

import functools
import logging
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import uvicorn
from fastapi import FastAPI, Request, Response
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import get_objectstore_linkstate_factories
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from fleetune.errors import FleetError
from fleetune.fleet.flower import clock, wire
from fleetune.fleet.flower.limits import Guard, Once, Refusals, Uploads, Watch
from fleetune.fleet.keys import PublicKey, fingerprint

log = logging.getLogger(__name__)

LIMIT: Final = 2 << 20  # bytes of a request's body: a piece and its frame
LIFETIME: Final = 10 * 365 * 86400.0  # seconds that Flower keeps a message: until it is dropped here
HEARTBEAT: Final = 15.0  # seconds; the run counts as dead after 60 without one


async def _door(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Let nothing through but requests of a limited size to the devices' interface."""
    if not request.url.path.startswith("/v1/fleet/"):
        return Response(status_code=404)
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()) or int(length) > LIMIT:
        return Response(status_code=413)
    return await call_next(request)


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
        steady = clock.install()
        _, factory = get_objectstore_linkstate_factories(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager())
        self.state = cast(InMemoryLinkState, factory.state())
        self._arriving: dict[str, Message] = {}
        self._uploads, self.refusals = Uploads(), Refusals()
        self._names: dict[int, str] = {}  # by number of the node
        self._nodes: dict[str, int] = {}  # by hash of the key, of those that were ever there
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=[
            Middleware(Watch, refusals=self.refusals),
            Middleware(BaseHTTPMiddleware, dispatch=_door),
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
            Middleware(Guard, uploads=self._uploads, once=Once(steady.age)),
        ])  # fmt: skip
        app.state.linkstate_factory, app.state.enable_supernode_auth = factory, keys is not None
        app.include_router(fleet_router)
        self.address = address
        self._config = uvicorn.Config(
            app, ssl_certfile=address.certificate, ssl_keyfile=address.key, workers=1, ws="none",
            access_log=False, log_level="error", lifespan="off",
        )  # fmt: skip
        if keys is not None:
            self.admit(keys)

    def open(self) -> None:
        """Start to listen; FleetError where that is not possible."""
        self._listen()
        self.run = self.state.create_run(
            "fleetune", "1", None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = self.state.get_run_info(run_ids=[self.run])[0].primary_task_id
        if task is None or not (self.state.claim_task(task) and self.state.activate_task(task)):
            raise FleetError(
                "Flower gave the run no task", hint="please report this with the version of flwr"
            )
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task, self.run, SUPERLINK_NODE_ID
        threading.Thread(target=self._beat, args=(task,), name="gate's heartbeat", daemon=True).start()
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
        self._server = uvicorn.Server(self._config)
        serve = functools.partial(self._server.run, sockets=[opened])
        self._thread = threading.Thread(target=serve, name="gate", daemon=True)

    def close(self) -> None:
        """Stop listening."""
        self.state.stop_run(self.run)
        self._server.should_exit = True
        self._thread.join(10)

    def _beat(self, task: int) -> None:
        while self.state.acknowledge_task_heartbeat(task):
            time.sleep(HEARTBEAT)

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
        """Return the devices that are there now, each with the time at which it came in."""
        found = {}
        for info in self.state.get_node_info(statuses=[NodeStatus.ONLINE]):
            found[key := fingerprint(info.public_key)] = f"{info.node_id} {info.last_activated_at}"
            self._nodes[key] = info.node_id
        return found

    def name(self, key: str) -> str:
        """Return what the device with this key is called: its key file, or the begin of its key's hash."""
        return self._names.get(self._nodes.get(key, 0), key[:8])

    def push(self, key: str, data: bytes, common: int = 0) -> str | None:
        """Queue an order for a device; its last `common` bytes are stored once for all orders that end with them."""
        if (node := self._nodes.get(key)) is None:
            return None
        message = Message(wire.pack(data, common), node, "train", ttl=LIFETIME)
        wire.set_id(message, message.object_id)
        self._uploads.expect(message.metadata.message_id, node, len(data))
        with no_object_id_recompute():
            session = self.state.start_session(self.run)
            stored, missing = self.state.store_message_and_object_tree(
                remove_content_from_message(message), get_object_tree(message), session
            )
            if not stored:
                self._uploads.forget([message.metadata.message_id])
                return None
            objects = wire.objects_of(message)
            for id in missing:
                self.state.store_object(self.run, session, id, objects[id].deflate())
        return message.metadata.message_id

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield the answers that are complete.

        Flower hands a reply out once, and before its objects are there: it is kept until they are.
        """
        if waiting := numbers - self._arriving.keys():
            for reply in self.state.get_message_res(waiting, self.run):
                self._arriving[reply.metadata.reply_to_message_id] = reply
        for number in sorted(numbers & self._arriving.keys()):
            reply = self._arriving[number]
            if reply.metadata.src_node_id == SUPERLINK_NODE_ID:  # Flower's own: the device is away
                self.drop({number})
                yield number, None
            elif (data := self._arrived(reply.metadata.message_id)) is not NOT_YET:
                self.drop({number})
                yield number, data

    def _arrived(self, id: str) -> bytes | None:
        """Return an answer's bytes, `NOT_YET` while objects are on their way, None where they will not come.

        `UNREADABLE` for objects that are no answer.
        """
        try:
            tree = self.state.object_store.get_object_tree(id)
            contents = {
                t.object_id: self.state.get_object(self.run, t.object_id) for t in iterate_object_tree(tree)
            }
            there = {id: content for id, content in contents.items() if content}
            if len(there) < len(contents):
                return NOT_YET
            whole = inflate_object_from_contents(id, there)
            if not isinstance(whole, Message) or whole.has_error():
                return UNREADABLE
            return wire.unpack(whole.content)
        except NoObjectInStoreError:  # it took too long to send them: it is asked again
            return None
        except Exception as error:  # whatever a device makes of its objects
            log.warning("an answer could not be read: %s: %s", type(error).__name__, error)
            return UNREADABLE

    def drop(self, numbers: set[str]) -> None:
        """Forget orders that nobody waits for any longer."""
        self._uploads.forget(numbers)
        for number in numbers:
            self._arriving.pop(number, None)
            for id in (number, self.state.message_ins_id_to_message_res_id.get(number, "")):
                self.state._cleanup_push_session(
                    self.state._object_push_session_by_root.get(id, ""), cleanup_messages=False
                )
                self.state.object_store.delete(id)
        self.state.delete_messages(numbers)


NOT_YET: Final = b"not yet"
UNREADABLE: Final = b""


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
