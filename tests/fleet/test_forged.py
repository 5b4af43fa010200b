# SPDX-License-Identifier: Apache-2.0
"""The real gate over HTTP: forged identities are refused and logged, and nothing but what devices use is there."""

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
from fleetune.fleet.remote import ROOM
from fleetune.fleet.server import Place, Served

pytest.importorskip("fleetune.fleet.flower.gate")
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from flwr.proto import fleet_pb2 as fleet
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node

from fleetune.fleet.flower import limits, wire
from fleetune.fleet.flower.door import BODIES

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
            f"/v1/fleet/{path}",
            content=message.SerializeToString(),
            headers={"content-type": "application/protobuf", **head},
        )

    def activate(self, key: keys.PrivateKey, head: dict[str, str] | None = None) -> httpx.Response:
        request = fleet.ActivateNodeRequest(public_key=key.public.pem, heartbeat_interval=30)
        return self.post("activate-node", request, head or signed(key))

    def ask(self, node: int, head: dict[str, str]) -> httpx.Response:
        """Send a heartbeat as this node."""
        beat = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30)
        return self.post("send-node-heartbeat", beat, head)

    def order(self, device: int) -> str:
        """Give a device an order; its number."""
        number = self.gate.push(self.keys[device].public.fingerprint, b"work", 0, ROOM)
        assert number is not None
        return str(number)


def signed(
    key: keys.PrivateKey,
    *,
    of: keys.PrivateKey | None = None,
    pem: bytes = b"",
    stamp: str = "",
    shift: datetime.timedelta = 0 * HOUR,
) -> dict[str, str]:
    """The head of a request: whose key it claims (`of`, `pem`), signed by `key` at a time."""
    stamp = stamp or (datetime.datetime.now(datetime.UTC) + shift).isoformat()
    signature = key.secret.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    claimed = pem or (of or key).public.pem
    return {
        "flwr-public-key": base64.b64encode(claimed).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": base64.b64encode(signature).decode(),
    }


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
    edwards = (
        ed25519.Ed25519PrivateKey.generate()
        .public_key()
        .public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    )
    seen = signed(honest)
    assert door.ask(node, seen).status_code == 200  # somebody reads this request on its way
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
        "a request sent again for another purpose": lambda: door.http.post(wire.EXCHANGE, headers=seen),
        "another device's end": lambda: door.post(
            "deactivate-node", fleet.DeactivateNodeRequest(node_id=node), signed(other)
        ),
        "signed without a time zone": lambda: door.ask(node, signed(honest, stamp="2030-01-01T00:00:00")),
        "a signature cut short": lambda: door.ask(node, {**signed(honest), "flwr-signature": "AAAA"}),
        "letters that are no signature": lambda: door.ask(node, {**signed(honest), "flwr-signature": "!?"}),
        "a revoked key": lambda: door.activate(revoked),
        "a revoked key that registers itself": lambda: door.post(
            "register-node", fleet.RegisterNodeFleetRequest(public_key=revoked.public.pem), signed(revoked)
        ),
    }


@pytest.mark.injects
def test_forged_identities_are_refused_and_logged(
    door: Door, tmp_path: Path, injected: Injected, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = forgeries(door)
    assert len(tried) >= 12
    door.gate.admit([k.public for k in door.keys[:2]])
    audit = Audit(tmp_path)
    monkeypatch.setattr(server, "REFUSALS", 0.0)
    faults = []
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
    names = [json.loads(line)["name"] for line in (tmp_path / FILE).read_text().splitlines()]
    assert {"dev-0", "dev-1", "dev-2", ""} == set(names)  # as whose key they came
    assert door.ask(door.nodes[0], signed(door.keys[0])).status_code == 200  # who it is, still comes in
    door.gate.admit([k.public for k in door.keys])  # the revoked one is registered again
    door.nodes[2] = door.gate.state.get_node_id_by_public_key(door.keys[2].public.pem) or 0
    assert door.activate(door.keys[2]).status_code == 200


def test_refusals_are_counted_in_bounded_memory() -> None:
    found = limits.Refusals()
    for i in range(1000):
        found.note(401, "/v1/fleet/exchange", f"{i}")
    counts = found.taken()
    assert len(counts) == limits.KINDS + 1
    assert counts[0, "", ""] == 1000 - limits.KINDS
    assert not found.taken()


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


FLOWERS = "pull-messages push-messages pull-object push-object confirm-message-received get-run get-fab unregister-node"
OTHERS = "/ /v1/fleetx /v1/control/start-run /v1/control/register-node /v1/runtime/push-object"


@pytest.mark.parametrize("path", [*(f"/v1/fleet/{path}" for path in FLOWERS.split()), *OTHERS.split()])
def test_nothing_but_what_devices_use_is_there(door: Door, path: str) -> None:
    """Flower's messages, by which a device could fill the server's memory, neither: whoever signs, before a body is read."""
    host, port = door.http.base_url.host, door.http.base_url.port
    for head in ({}, signed(door.keys[0])):
        assert door.http.get(path, headers=head).status_code == 404
        with socket.create_connection((host, port or 0), timeout=10) as opened:
            heads = "".join(f"{name}: {value}\r\n" for name, value in head.items())
            opened.sendall(f"POST {path} HTTP/1.1\r\n{heads}content-length: 1000000\r\n\r\n".encode())
            assert b" 404 " in opened.recv(4096)


def test_a_body_is_no_larger_than_what_it_says_needs(door: Door) -> None:
    for path, most in BODIES.items():
        for size, wanted in ((most, 401), (most + 1, 413)):
            assert door.http.post(path, content=bytes(size)).status_code == wanted
