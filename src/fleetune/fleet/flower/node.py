# SPDX-License-Identifier: Apache-2.0
"""Answer a server's orders from a device, and come back with the same key whatever happens to server or network."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2 as fleet
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fleetune.common.display import human_time
from fleetune.common.files import PRIVATE, write_atomic
from fleetune.errors import FleetError, FleetuneError, Interrupted
from fleetune.fleet.flower import wire
from fleetune.fleet.keys import PrivateKey

log = logging.getLogger(__name__)

NODE: Final = "node"  # file with the number of the last session
LONGEST: Final = 20.0  # seconds between two tries
AHEAD: Final = 5.0  # seconds by which a device's clock may be ahead of the server's
BEHIND: Final = 300.0  # and behind it


@dataclass(frozen=True)
class Server:
    """Where a device finds its server: HOST:PORT, and the certificate (PEM) that it trusts; without one, plain HTTP."""

    address: str
    certificate: Path | None = None
    poll: float = 0.2  # seconds
    heartbeat: float = 10.0  # seconds


class _Session:
    """One stay at a server: heartbeats in a thread, orders in, answers out."""

    def __init__(
        self, client: FleetHttpClient, key: PrivateKey, state: Path, heartbeat: float, open_door: bool
    ) -> None:
        self.client, self.heartbeat, self.over = client, heartbeat, threading.Event()
        file = state / NODE
        if (
            file.exists()
        ):  # the last process of this key may be gone without a word: its session would last on
            with contextlib.suppress(httpx.HTTPStatusError, ValueError, OSError):
                client.DeactivateNode(fleet.DeactivateNodeRequest(node_id=int(file.read_text())))
        if open_door:
            with contextlib.suppress(httpx.HTTPStatusError):  # it is registered already
                client.RegisterNode(fleet.RegisterNodeFleetRequest(public_key=key.public.pem))
        request = fleet.ActivateNodeRequest(public_key=key.public.pem, heartbeat_interval=heartbeat)
        self.node = Node(node_id=client.ActivateNode(request).node_id)
        write_atomic(file, str(self.node.node_id), mode=PRIVATE)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=self.heartbeat)
        while not self.over.wait(self.heartbeat * random.uniform(0.5, 0.7)):
            with contextlib.suppress(httpx.HTTPError):  # the main loop meets it too, and acts
                self.client.SendNodeHeartbeat(request)

    def end(self) -> None:
        self.over.set()
        with contextlib.suppress(httpx.HTTPError):
            self.client.DeactivateNode(fleet.DeactivateNodeRequest(node_id=self.node.node_id))

    def answer_next(self, answer: Callable[[bytes], bytes]) -> bool:
        """Answer one order; False where there is none."""
        client, node = self.client, self.node
        got = client.PullMessages(fleet.PullMessagesRequest(node=node))
        if not got.messages_list:
            return False
        tree = got.message_object_trees[0]
        run = message_from_proto(got.messages_list[0]).metadata.run_id

        def confirm(id: str) -> None:
            request = ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=id)
            client.ConfirmMessageReceived(request)

        message = pull_and_inflate_object_from_tree(
            tree, make_pull_object_fn_protobuf(client.PullObject, node, run), confirm,
            return_type=Message, initial_backoff=0.1,
        )  # fmt: skip
        wire.set_id(message, tree.object_id)
        began = time.monotonic()
        try:
            reply = wire.answer_to(message, answer(wire.unpack(message.content)))
        except Interrupted:
            raise
        except FleetuneError as error:
            log.warning("an order could not be answered: %s", error.message)
            reply = wire.answer_to(message, None, error.message)
        self._send(reply, run, time.monotonic() - began)
        return True

    def _send(self, reply: Message, run: int, seconds: float) -> None:
        client, node = self.client, self.node
        with no_object_id_recompute():
            objects = wire.objects_of(reply)
            request = fleet.PushMessagesRequest(
                node=node, messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)], clientapp_runtime_list=[seconds],
            )  # fmt: skip
            wanted: Any = client.PushMessages(request)
            push_objects(
                objects, make_push_object_fn_protobuf(client.PushObject, node, run, wanted.session_id),
                object_ids_to_push=set(wanted.objects_to_push),
            )  # fmt: skip


def stay(
    server: Server,
    key: PrivateKey,
    state: Path,
    answer: Callable[[bytes], bytes],
    *,
    over: Callable[[], bool],
    note: Callable[[str], None],
) -> None:
    """Answer the server's orders until `over()`: refused, cut off or without a server, try again and again.

    FleetError when the certificate cannot be read; StorageError when the disk of the device takes nothing more.
    """
    try:
        trusted = server.certificate.read_bytes() if server.certificate else None
    except OSError as error:
        raise FleetError(f"cannot read the certificate {server.certificate}: {error.strerror}") from error
    wait, said = 0.0, ""
    while not over():
        signed = [NodeAuthHttpInterceptor(key.secret, key.secret.public_key())]
        with FleetHttpClient.from_server_address(
            server.address, trusted is None, trusted, interceptors=signed
        ) as client:
            session = None
            try:
                session = _Session(client, key, state, server.heartbeat, open_door=trusted is None)
                note(f"connected to {server.address}")
                wait, said = 0.0, ""
                while not over():
                    if not session.answer_next(answer):
                        time.sleep(server.poll)
            except FleetuneError:
                raise
            except Exception as error:  # the network, the server, or what Flower makes of their answers
                wait = min(max(0.5, wait * 2), LONGEST)
                if (why := _why(error)) != said:
                    note(f"{why}; trying again")
                    said = why
            finally:
                if session is not None:
                    session.end()
        until = time.monotonic() + wait * random.uniform(0.8, 1.2)
        while time.monotonic() < until and not over():
            time.sleep(0.1)


def _why(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        if error.response.status_code in (401, 403, 412):
            return _clocks_apart(error.response) or (
                "the server does not know this device's key: bring its .pub file into the server's folder of keys"
            )
        return f"the server answered {error.response.status_code}"
    if isinstance(error, httpx.HTTPError):
        certificate = str(error) if "CERTIFICATE" in str(error) else type(error).__name__
        return f"no server there ({certificate})"
    return f"{type(error).__name__}: {error}"


def _clocks_apart(response: httpx.Response) -> str:
    """Return that, and what to do, where the server's clock (its Date) and this device's differ too much; else ""."""
    try:
        server = email.utils.parsedate_to_datetime(response.headers["date"])
        seconds = (datetime.datetime.now(datetime.UTC) - server).total_seconds()
    except (KeyError, ValueError, TypeError):
        return ""
    if -BEHIND < seconds < AHEAD:
        return ""
    which = "ahead of" if seconds > 0 else "behind"
    return (
        f"this device's clock is {human_time(abs(seconds))} {which} the server's, which therefore refuses what the device "
        "signs: set the clock that is wrong (timedatectl set-ntp true)"
    )
