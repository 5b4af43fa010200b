# SPDX-License-Identifier: Apache-2.0
"""The real gate over HTTP: forged identities are refused and logged, and a device cannot fill the server's memory."""

from __future__ import annotations

import base64
import datetime
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fault_report import Injected
from fleetune.fleet import keys, server
from fleetune.fleet.audit import FILE, Audit, verify
from fleetune.fleet.keys import fingerprint
from fleetune.fleet.orders import Order, Reply
from fleetune.fleet.remote import ROOM
from fleetune.fleet.server import Place, Served

pytest.importorskip("fleetune.fleet.flower.gate")
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2 as fleet
from flwr.proto import message_pb2
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_object_tree

from fleetune.fleet.flower import door as doors
from fleetune.fleet.flower import limits, wire

HOUR = datetime.timedelta(hours=1)


class Door:
    """A server of three keys, and a way to send it requests that a device's program would not send."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "keys").mkdir()
        self.keys = [keys.make(folder / f"dev-{c}") for c in range(3)]
        for c in range(3):
            (folder / f"dev-{c}.pub").rename(folder / "keys" / f"dev-{c}.pub")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.served = Served(Place("127.0.0.1", port, folder / "keys"))
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)

    def __enter__(self) -> Door:
        self.served.__enter__()
        self.gate = self.served._gate
        self.nodes = [self.gate.state.get_node_id_by_public_key(k.public.pem) or 0 for k in self.keys]
        for key in self.keys:
            assert self.activate(key).status_code == 200
        self.gate.online()
        self.gate.refusals.taken()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.close()
        self.served.__exit__(ValueError, None, None)

    def post(self, path: str, message: Any, head: dict[str, str]) -> httpx.Response:
        return self.http.post(
            f"/v1/fleet/{path}", content=message.SerializeToString(), headers={"content-type": "application/protobuf", **head},
        )  # fmt: skip

    def activate(self, key: keys.PrivateKey, head: dict[str, str] | None = None) -> httpx.Response:
        request = fleet.ActivateNodeRequest(public_key=key.public.pem, heartbeat_interval=30)
        return self.post("activate-node", request, head or signed(key))

    def ask(self, node: int, head: dict[str, str]) -> httpx.Response:
        """Ask for messages as this node."""
        return self.post("pull-messages", fleet.PullMessagesRequest(node=Node(node_id=node)), head)

    def order(self, device: int, body: bytes = b"x") -> tuple[str, Message]:
        """Give a device an order; its number, and the message as the device gets it."""
        order = Order("work", 1, device, 7, body)
        number = self.gate.push(self.keys[device].public.fingerprint, order.encode(), order.common, ROOM)
        assert number is not None
        said = self.ask(self.nodes[device], signed(self.keys[device]))
        return number, message_from_proto(
            fleet.PullMessagesResponse.FromString(said.content).messages_list[0]
        )

    def answer(
        self, device: int, message: Message, data: bytes, *, change: Callable[[Any], None] = lambda r: None
    ) -> httpx.Response:
        """Announce an answer as this device; `change` may spoil the request."""
        key, node = self.keys[device], Node(node_id=self.nodes[device])
        reply = wire.answer_to(message, data)
        request = fleet.PushMessagesRequest(
            node=node, messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
        )  # fmt: skip
        change(request)
        return self.post("push-messages", request, signed(key))

    def give(self, device: int, announced: httpx.Response, id: str, content: bytes) -> httpx.Response:
        """Upload an object."""
        said = fleet.PushMessagesResponse.FromString(announced.content)
        request = message_pb2.PushObjectRequest(
            node=Node(node_id=self.nodes[device]), run_id=self.gate.run, object_id=id, object_content=content,
            session_id=said.session_id,
        )  # fmt: skip
        return self.post("push-object", request, signed(self.keys[device]))

    @property
    def held(self) -> tuple[int, int, int]:
        """Objects, sessions of uploads and answers that the server has."""
        state = self.gate.state
        return len(state.object_store.store), len(state._object_push_sessions), len(state.message_res_store)  # type: ignore[attr-defined]


def signed(
    key: keys.PrivateKey, *, of: keys.PrivateKey | None = None, pem: bytes = b"", stamp: str = "", shift: datetime.timedelta = 0 * HOUR,
) -> dict[str, str]:  # fmt: skip
    """The head of a request: whose key it claims (`of`, `pem`), signed by `key` at a time."""
    stamp = stamp or (datetime.datetime.now(datetime.UTC) + shift).isoformat()
    signature = key.secret.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    claimed = pem or (of or key).public.pem
    return {
        "flwr-public-key": base64.b64encode(claimed).decode(), "flwr-timestamp": stamp,
        "flwr-signature": base64.b64encode(signature).decode(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with Door(tmp_path_factory.mktemp("door")) as opened:
        yield opened


def forgeries(door: Door) -> dict[str, Callable[[], httpx.Response]]:
    """What somebody without the key of device 0 may send to be taken for it."""
    honest, other, revoked = door.keys
    node = door.nodes[0]
    stranger = keys.make(door.folder / "stranger")
    curve = ec.generate_private_key(ec.SECP256R1())
    small = keys.PrivateKey(curve, keys.PublicKey("small", keys._pem(curve.public_key())))
    edwards = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(
        forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
    seen = signed(honest)
    assert door.ask(node, seen).status_code == 200  # somebody reads this request on its way
    _, its = door.order(0)
    _, own = door.order(1)

    def named(node: int) -> Callable[[Any], None]:
        return lambda request: setattr(request.messages_list[0].metadata, "src_node_id", node)

    return {
        "nothing signed": lambda: door.ask(node, {}),
        "a key that is not registered": lambda: door.activate(stranger),
        "a key on another curve": lambda: door.activate(small),
        "a key of another kind": lambda: door.ask(node, signed(other, pem=edwards)),
        "its key, signed with another": lambda: door.ask(node, signed(stranger, of=honest)),
        "its number, with another device's key": lambda: door.ask(node, signed(other)),
        "signed an hour ago": lambda: door.ask(node, signed(honest, shift=-HOUR)),
        "signed for in an hour": lambda: door.ask(node, signed(honest, shift=HOUR)),
        "a request sent again": lambda: door.ask(node, seen),
        "a request sent again with another body": lambda: door.post(
            "send-node-heartbeat", SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30), seen
        ),
        "signed without a time zone": lambda: door.ask(node, signed(honest, stamp="2030-01-01T00:00:00")),
        "a signature cut short": lambda: door.ask(node, {**signed(honest), "flwr-signature": "AAAA"}),
        "letters that are no signature": lambda: door.ask(node, {**signed(honest), "flwr-signature": "!?"}),
        "an answer in its name": lambda: door.answer(1, own, b"lie", change=named(node)),
        "an answer to its order": lambda: door.answer(1, its, b"lie", change=named(door.nodes[1])),
        "a revoked key": lambda: door.activate(revoked),
        "a revoked key that registers itself": lambda: door.post(
            "register-node", fleet.RegisterNodeFleetRequest(public_key=revoked.public.pem), signed(revoked)
        ),
    }  # fmt: skip


@pytest.mark.injects
def test_forged_identities_are_refused_and_logged(
    door: Door, tmp_path: Path, injected: Injected, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = forgeries(door)
    assert len(tried) >= 12
    door.gate.admit([k.public for k in door.keys[:2]])
    audit = Audit(tmp_path)
    monkeypatch.setattr(server, "REFUSALS", 0.0)
    before, faults = door.held, []
    for name, send in tried.items():
        status = send().status_code
        door.served._log_refusals(audit)
        line = (
            json.loads((tmp_path / FILE).read_text().splitlines()[-1]) if (tmp_path / FILE).exists() else {}
        )
        if status not in (401, 403, 412) or line.get("status") != status or line.get("requests") != 1:
            faults.append(f"{name}: {status}, {line}")
    injected("forged identities", len(tried), survived=len(tried) - len(faults))
    assert not faults, "\n".join(faults)
    assert verify(tmp_path / FILE) == (len(tried), audit.chain, 0)
    assert door.held == before
    names = [json.loads(line)["name"] for line in (tmp_path / FILE).read_text().splitlines()]
    assert {"dev-0", "dev-1", "dev-2", ""} == set(names)  # as whose key they came
    assert door.ask(door.nodes[0], signed(door.keys[0])).status_code == 200  # who it is, still comes in
    door.gate.admit([k.public for k in door.keys])  # the revoked one is registered again
    door.nodes[2] = door.gate.state.get_node_id_by_public_key(door.keys[2].public.pem) or 0
    assert door.activate(door.keys[2]).status_code == 200


def test_refusals_are_counted_in_bounded_memory() -> None:
    found = limits.Refusals()
    for i in range(1000):
        found.note(401, "/v1/fleet/pull-messages", f"{i}")
    counts = found.taken()
    assert len(counts) == limits.KINDS + 1
    assert counts[0, "", ""] == 1000 - limits.KINDS
    assert not found.taken()


def test_an_honest_answer_passes_and_leaves_nothing_behind(door: Door) -> None:
    before = door.held
    number, message = door.order(0, bytes(3 << 20))
    data = Reply("done", bytes(16), 1, bytes(range(256)) * 10_000).encode()  # three pieces
    announced = door.answer(0, message, data)
    assert not list(door.gate.pull({number}))
    objects = wire.objects_of(wire.answer_to(message, data))
    wanted = fleet.PushMessagesResponse.FromString(announced.content).objects_to_push
    assert len(set(wanted) - set(objects)) == 1  # the message itself, which states a time
    id = next(id for id in wanted if id in objects)
    assert message_pb2.PushObjectResponse.FromString(
        door.give(0, announced, id, objects[id].deflate()).content
    ).stored
    door.gate.drop({number})
    assert door.held == before  # a late answer, of which a part is there, is forgotten with its order


def bomb(request: Any) -> None:
    """A tree of few nodes that stands for 2^30: each has the one before it two times."""
    tree = request.message_object_trees[0]
    root = tree.object_id
    tree.Clear()
    tree.object_id = root
    tree.children.add(object_id="0" * 64)
    for i in range(1, 30):
        node = tree.children.add(object_id=f"{i:064x}")
        node.children.add(object_id=f"{i - 1:064x}")
        node.children.add(object_id=f"{i - 1:064x}")


def nested(request: Any) -> None:
    node = request.message_object_trees[0]
    for i in range(60):
        node = node.children.add(object_id=f"{i:064x}")


def many(request: Any) -> None:
    record = request.message_object_trees[0].children[0]
    for i in range(ROOM // wire.PIECE + 1):
        record.children.add(object_id=f"{i:064x}")


def same_twice(request: Any) -> None:
    record = request.message_object_trees[0].children[0]
    record.children.add(object_id=record.children[0].object_id)


UPLOADS: dict[str, tuple[Callable[[Any], None], int]] = {
    "more pieces than its order allows": (many, 413),
    "a tree that stands for 2^30 objects": (bomb, 400),
    "a tree 60 deep": (nested, 400),
    "a piece two times": (same_twice, 400),
    "two answers at once": (lambda r: r.messages_list.append(r.messages_list[0]), 400),
    "no answer": (lambda r: r.ClearField("messages_list"), 400),
    "no tree": (lambda r: r.ClearField("message_object_trees"), 400),
    "a tree of another message": (lambda r: setattr(r.message_object_trees[0], "object_id", "f" * 64), 400),
    "an answer that nobody waits for": (lambda r: setattr(r.messages_list[0].metadata, "reply_to_message_id", "f" * 64), 200),
}  # fmt: skip


@pytest.mark.injects
def test_a_device_cannot_fill_the_servers_memory(door: Door, injected: Injected) -> None:
    _, message = door.order(1)
    before, faults = door.held, []
    for name, (change, wanted) in UPLOADS.items():
        said = door.answer(1, message, b"an answer", change=change)
        if said.status_code != wanted or door.held != before:
            faults.append(f"{name}: {said.status_code}, {door.held}, {before} before")
    for content in (b"", b"junk", b"x" * (1 << 20)):  # objects that were never announced
        said = door.give(1, httpx.Response(200), "a" * 64, content)
        if (
            said.status_code != 200
            or message_pb2.PushObjectResponse.FromString(said.content).stored
            or door.held != before
        ):
            faults.append(f"an object that nobody asked for: {said.status_code}")
    if door.give(1, httpx.Response(200), "a" * 64, b"x" * (doors.LIMIT + 1)).status_code != 413:
        faults.append("a piece that is too large")
    announced = door.answer(1, message, b"an answer")
    assert announced.status_code == 200
    once = door.held
    assert door.answer(1, message, b"another answer").status_code == 200  # nobody waits for a second one
    if door.held != once:
        faults.append("a second answer to one order")
    injected("uploads that nobody asked for", len(UPLOADS) + 5, survived=len(UPLOADS) + 5 - len(faults))
    assert not faults, "\n".join(faults)


def test_a_time_is_signed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    began, now = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC), [0.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    once = limits.Once(lambda signed: now[0] - (signed - began).total_seconds())

    def fresh(signed: float, at: float, key: str = "aw==") -> bool:
        now[0] = at
        return once.fresh(key, (began + datetime.timedelta(seconds=signed)).isoformat())

    assert [fresh(s, at=3) for s in (0, 1, 0.5, 1, 2)] == [
        True,
        True,
        True,
        False,
        True,
    ]  # two may overtake each other
    assert fresh(1, 3, "b3RoZXI=")
    assert not fresh(2, 3, "ax==")  # the same key: the last bits of its text count for nothing
    assert fresh(30, 30)
    assert not fresh(2.5, 30)  # long after a later one
    assert [fresh(s - 200, s, "c2xvdw==") for s in (31, 32, 33)] == [True] * 3  # a clock that is 200 s behind
    assert [fresh(s - 100, s) for s in (40, 200, 330, 336)] == [False] * 3 + [True]  # one that was set back
    for s in range(400, 2000):
        assert fresh(s, s)
    assert len(once._signers[fingerprint(b"k")].seen) <= 22
    assert not fresh(1900, 2000)


@pytest.mark.parametrize(
    "path",
    ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/push-object", "/v1/fleetx", "/"],
)
def test_nothing_but_the_devices_interface_is_there(door: Door, path: str) -> None:
    assert door.http.post(path, content=b"").status_code == 404
    assert door.http.get(path).status_code == 404
