# SPDX-License-Identifier: Apache-2.0
"""Be many devices in one process: they answer a server's orders at once, and do no work.

Each has a key and a connection of its own.  What goes over the connection is what a real device sends, byte for byte:
signed headers, orders and replies of the fleet's codec.  With `stock`, they are clients of Flower's FedAvg on its own server,
as light as can be: one request for the message, one for each of its objects, and as many for the reply.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import resource
import time
from typing import Any

from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2 as fleet
from flwr.proto import message_pb2 as messages
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fleetune.common.memory import rss
from fleetune.fleet.flower import wire
from fleetune.fleet.keys import PrivateKey, PublicKey
from fleetune.fleet.orders import Device, Order, Reply
from fleetune.tuning.messages import Message as Inner
from fleetune.tuning.messages import decode, encode

POLL = 0.2  # seconds between two requests for a message of Flower's
ROWS = 8  # of every device


def key_of(number: int) -> PrivateKey:
    """Return the key of a simulated device: the same in every process."""
    seed = hashlib.sha256(f"simulated device {number}".encode()).digest()
    secret = ec.derive_private_key(int.from_bytes(seed, "big"), ec.SECP384R1())
    pem = secret.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    return PrivateKey(secret, PublicKey(f"sim-{number:05d}", pem))


def answer(data: bytes) -> tuple[Order, bytes]:
    """Return an order and its answer: a device that has learned nothing new."""
    order = Order.decode(data)
    if order.what == "job":
        device = Device(ROWS, "0" * 64, 1 << 32, 1, "0")
        return order, Reply("ready", order.nonce, order.round, device.to_json()).encode()
    if order.what == "end":
        return order, Reply("done", order.nonce, order.round).encode()
    asked = decode(order.body)
    body = encode(Inner(asked.round, asked.base, asked.payload))
    return order, Reply("done", order.nonce, order.round, body, (order.round, 0), 0.0, 1).encode()


class Line:
    """A connection to the server: HTTP/1.1, one request at a time."""

    def __init__(self, host: str, port: int, key: PrivateKey) -> None:
        self.host, self.port, self.key = host, port, key
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes, **more: str) -> tuple[dict[str, str], bytes]:
        """Send a signed request; the headers and the body of what comes back.  OSError for a status over 299."""
        if self.streams is None or self.streams[0].at_eof():
            self.streams = await asyncio.open_connection(self.host, self.port, limit=1 << 20)
        reader, writer = self.streams
        headers = {"host": self.host, "content-length": str(len(body)), **wire.signed(self.key), **more}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        found = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        data = await reader.readexactly(int(found.get("content-length", 0)))
        if found.get("connection") == "close":
            writer.close()
            self.streams = None
        if int(lines[0].split()[1]) > 299:
            raise OSError(f"{path}: {lines[0]} {data[:200]!r}")
        return found, data

    async def call(self, path: str, request: Any, kind: Any) -> Any:
        """Make a call of Flower's Fleet API."""
        _, data = await self.post(
            f"/v1/fleet/{path}", request.SerializeToString(), **{"content-type": "application/protobuf"}
        )
        return kind.FromString(data)


class Simulated:
    """One device; `times` collects the seconds from an order to the end of its answer."""

    def __init__(self, host: str, port: int, number: int, times: dict[int, list[float]]) -> None:
        self.line, self.beats = (Line(host, port, key_of(number)) for _ in range(2))
        self.times = times

    async def run(self, protocol: str, register: bool) -> None:
        """Join, answer until the run ends."""
        await asyncio.sleep(random.uniform(0, 1))
        pem = self.line.key.public.pem
        if register:
            request = fleet.RegisterNodeFleetRequest(public_key=pem)
            await self.line.call("register-node", request, fleet.RegisterNodeFleetResponse)
        activate = fleet.ActivateNodeRequest(public_key=pem, heartbeat_interval=30.0)
        self.node = Node(
            node_id=(await self.line.call("activate-node", activate, fleet.ActivateNodeResponse)).node_id
        )
        await (self._stock() if protocol == "stock" else self._exchange())

    def _note(self, order: Order, began: float) -> None:
        if order.what == "work":
            self.times.setdefault(order.round, []).append(time.monotonic() - began)

    async def _stock(self) -> None:
        beating = asyncio.create_task(self._beat())
        while not beating.done():
            pulled = await self.line.call(
                "pull-messages", fleet.PullMessagesRequest(node=self.node), fleet.PullMessagesResponse
            )
            if not pulled.messages_list:
                await asyncio.sleep(POLL)
                continue
            await self._answer_message(pulled)

    async def _answer_message(self, pulled: Any) -> None:
        node, tree = self.node, pulled.message_object_trees[0]
        run = message_from_proto(pulled.messages_list[0]).metadata.run_id
        contents = {}
        for part in iterate_object_tree(tree):
            wanted = messages.PullObjectRequest(node=node, run_id=run, object_id=part.object_id)
            while not (
                got := await self.line.call("pull-object", wanted, messages.PullObjectResponse)
            ).object_available:
                await asyncio.sleep(POLL)  # the message is there before its objects
            contents[part.object_id] = got.object_content
        confirm = messages.ConfirmMessageReceivedRequest(
            node=node, run_id=run, message_object_id=tree.object_id
        )
        await self.line.call("confirm-message-received", confirm, messages.ConfirmMessageReceivedResponse)
        message = inflate_object_from_contents(tree.object_id, contents)
        assert isinstance(message, Message)
        wire.set_id(message, tree.object_id)
        metrics = MetricRecord({"num-examples": ROWS})
        reply = Message(
            RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message
        )
        wire.set_id(reply, reply.object_id)
        with no_object_id_recompute():
            objects = get_all_nested_objects(reply)
            request = fleet.PushMessagesRequest(
                node=node, messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)], clientapp_runtime_list=[0.0],
            )  # fmt: skip
            pushed = await self.line.call("push-messages", request, fleet.PushMessagesResponse)
            for id in pushed.objects_to_push:
                push = messages.PushObjectRequest(
                    node=node, run_id=run, object_id=id, object_content=objects[id].deflate(), session_id=pushed.session_id
                )  # fmt: skip
                await self.line.call("push-object", push, messages.PushObjectResponse)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(random.uniform(15, 20))
            beat = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=30.0)
            await self.beats.call("send-node-heartbeat", beat, SendNodeHeartbeatResponse)

    async def _exchange(self) -> None:
        headers, body = {}, b""
        while True:
            headers, data = await self.line.post(wire.EXCHANGE, body, **headers)
            if not (number := headers.get(wire.ORDER)):
                headers, body = {}, b""
                continue
            began = time.monotonic()
            order, body = answer(data)
            headers = {wire.ORDER: number}
            if order.what == "end":
                await self.line.post(wire.EXCHANGE, body, **headers, **{wire.NEXT: "nothing"})
                return
            self._note(order, began)


async def main(address: str, count: int, protocol: str, register: bool) -> dict[str, Any]:
    """Be so many devices until the run ends; what they saw."""
    host, _, port = address.rpartition(":")
    times: dict[int, list[float]] = {}
    devices = [Simulated(host, int(port), n, times) for n in range(count)]
    found = await asyncio.gather(*(d.run(protocol, register) for d in devices), return_exceptions=True)
    errors = [repr(e) for e in found if isinstance(e, BaseException)]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "times": times,
        "errors": errors[:5],
        "failed": len(errors),
        "rss": rss(),
        "cpu": usage.ru_utime + usage.ru_stime,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="the server's HOST:PORT")
    parser.add_argument("count", type=int, help="devices")
    parser.add_argument("protocol", help="exchange, or stock: on Flower's own server")
    parser.add_argument(
        "keys", choices=("register", "keys"), help="register: the server does not know the keys"
    )
    args = parser.parse_args()
    print(json.dumps(asyncio.run(main(args.address, args.count, args.protocol, args.keys == "register"))))
