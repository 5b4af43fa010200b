# SPDX-License-Identifier: Apache-2.0
"""An answer and the next order in one request: whose it is says the signature alone."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from fleetune.fleet import keys, mail
from fleetune.fleet.keys import PrivateKey
from fleetune.fleet.mail import Mail

gates = pytest.importorskip("fleetune.fleet.flower.gate")

from flwr.server.superlink.linkstate import in_memory_linkstate  # noqa: E402
from flwr.supernode.fleet_http_client import FleetHttpClient  # noqa: E402
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor  # noqa: E402

from fleetune.fleet.flower import door, exchange, node, wire  # noqa: E402


class Place(NamedTuple):
    """An open gate, and three keys: two registered devices and a stranger."""

    gate: gates.Gate
    url: str
    one: PrivateKey
    two: PrivateKey
    stranger: PrivateKey


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("keys")
    made = [keys.make(folder / name) for name in ("one", "two", "stranger")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    gate = gates.Gate(gates.Address("127.0.0.1", port), [k.public for k in made[:2]])
    gate.open()
    yield Place(gate, f"http://127.0.0.1:{port}", *made)
    gate.close()


@pytest.fixture(autouse=True)
def joined(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(exchange, "HOLD", 0.2)
    for key in (place.one, place.two):
        assert place.gate.state.acknowledge_node_heartbeat(node_of(place, key), 30.0)
    assert len(place.gate.online()) == 2
    yield
    place.gate.drop(set(place.gate.mail._open))


def node_of(place: Place, key: PrivateKey) -> int:
    found = place.gate.state.get_node_id_by_public_key(key.public.pem)
    assert found is not None
    return int(found)


def post(
    place: Place, key: PrivateKey, body: bytes = b"", number: str = "", wants: str = "order"
) -> httpx.Response:
    headers = {**wire.signed(key), wire.NEXT: wants, **({wire.ORDER: number} if number else {})}
    return httpx.post(place.url + wire.EXCHANGE, content=body, headers=headers, timeout=20)


def push(place: Place, key: PrivateKey, data: bytes = b"work", common: int = 0, room: int = 1 << 24) -> str:
    number = place.gate.push(key.public.fingerprint, data, common, room)
    assert number is not None
    return str(number)


def pull(place: Place, number: str) -> list[tuple[str, bytes | None]]:
    for _ in range(200):
        if found := list(place.gate.pull({number})):
            return found
        time.sleep(0.01)
    return []


def test_an_order_is_given_until_it_is_answered_and_its_answer_taken_once(place: Place) -> None:
    number = push(place, place.one, b"head tail", 4)
    for _ in range(2):
        got = post(place, place.one)
        assert (got.status_code, got.content, got.headers[wire.ORDER]) == (200, b"head tail", number)
    assert post(place, place.one, b"done", number).status_code == 204
    assert pull(place, number) == [(number, b"done")]
    assert not list(place.gate.pull({number}))


def test_a_device_that_has_gone_is_known_to_have_whatever_interval_it_named(place: Place) -> None:
    state, number = place.gate.state, node_of(place, place.one)
    now = in_memory_linkstate.now().timestamp()
    assert state.acknowledge_node_heartbeat(number, 1800.0)
    assert state.nodes[number].online_until < now + 130
    assert state.deactivate_node(number)
    assert state.activate_node(number, 1800.0)
    assert state.nodes[number].online_until < now + 130


def test_a_request_waits_for_the_order(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "HOLD", 10.0)
    later = threading.Timer(0.2, push, (place, place.one))
    later.start()
    began = time.monotonic()
    got = post(place, place.one)
    assert got.content == b"work"
    assert time.monotonic() - began < 5
    post(place, place.one, b"done", got.headers[wire.ORDER], "nothing")
    # a later request of the device sends the earlier away: its connection may be dead, and would swallow the order
    lost: list[int] = []
    earlier = threading.Thread(target=lambda: lost.append(post(place, place.one).status_code))
    earlier.start()
    waits(place, place.one)
    threading.Timer(0.2, push, (place, place.one)).start()
    assert post(place, place.one).content == b"work"
    earlier.join(5)
    assert lost == [204]
    # one that leaves is not waited for
    left = threading.Thread(target=lambda: lost.append(post(place, place.two).status_code))
    left.start()
    waits(place, place.two)
    place.gate.state.deactivate_node(node_of(place, place.two))
    left.join(5)
    assert lost == [204, 204]
    assert place.two.public.fingerprint not in place.gate.online()


def waits(place: Place, key: PrivateKey) -> None:
    for _ in range(500):
        if node_of(place, key) in place.gate._exchange._waiting:
            return
        time.sleep(0.01)
    raise AssertionError("no request waits")


def test_who_has_no_key_or_another_comes_not_in(place: Place) -> None:
    push(place, place.one)
    good = wire.signed(place.one)
    forged = {**good, **{k: v for k, v in wire.signed(place.stranger).items() if "key" not in k.lower()}}
    for headers in ({}, wire.signed(place.stranger), forged, dict.fromkeys(good, "x")):
        assert httpx.post(place.url + wire.EXCHANGE, headers=headers).status_code == 401
    assert httpx.post(place.url + wire.EXCHANGE, headers=good).content == b"work"
    assert httpx.post(place.url + wire.EXCHANGE, headers=good).status_code == 401  # the same headers again


def test_what_is_too_large_is_refused(place: Place) -> None:
    number = push(place, place.one, room=10)  # of all pieces together
    assert post(place, place.one).content == b"work"
    host, _, port = place.url.removeprefix("http://").partition(":")
    signed = "".join(f"{k}: {v}\r\n" for k, v in wire.signed(place.one).items())
    for length in (f"content-length: {door.LIMIT + 1}", "transfer-encoding: chunked"):
        with socket.create_connection((host, int(port)), timeout=10) as opened:
            opened.sendall(f"POST {wire.EXCHANGE} HTTP/1.1\r\nhost: x\r\n{signed}{length}\r\n\r\n".encode())
            assert b" 413 " in opened.recv(4096)
    for piece in (b"12345", b"67890", b"!", b"more"):
        assert post(place, place.one, piece, number, "piece").status_code == 204
    assert pull(place, number) == [(number, mail.TOO_LARGE)]


def test_a_large_answer_comes_in_pieces(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "PIECE", 1000)
    number = push(place, place.one, data := bytes(range(256)) * 1000, 200_000)
    server = node.Server(place.url.removeprefix("http://"))
    line = node.Line(server, False)
    with line.http:
        session = node._Session.__new__(node._Session)
        session.line, session.key, session.server = line, place.one, server
        _, body = session._send("", b"", "order")
        assert body == data
        session._send(number, data[:12_345], "nothing")
    assert pull(place, number) == [(number, data[:12_345])]


def test_an_order_that_went_to_a_dead_connection_is_given_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its device is killed while its request waits: the socket is closed with a reset, which nobody looks at."""
    monkeypatch.setattr(exchange, "HOLD", 10.0)
    host, _, port = place.url.removeprefix("http://").partition(":")
    heads = "".join(f"{k}: {v}\r\n" for k, v in wire.signed(place.one).items()) + "content-length: 0\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as dead:
        dead.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        dead.sendall(f"POST {wire.EXCHANGE} HTTP/1.1\r\nhost: x\r\n{heads}".encode())
        waits(place, place.one)
    number = push(place, place.one)
    got = post(place, place.one)
    assert (got.status_code, got.content, got.headers[wire.ORDER]) == (200, b"work", number)


@pytest.mark.parametrize("how", ["activate_node", "acknowledge_node_heartbeat"])
def test_what_was_ordered_in_an_earlier_session_is_lost(place: Place, how: str) -> None:
    """So a process that has not taken the job yet is given no work, and one that comes and goes keeps no orders open."""
    number, node = push(place, place.two), node_of(place, place.two)
    place.gate.state.deactivate_node(node)
    assert getattr(place.gate.state, how)(node, 30.0)
    assert pull(place, number) == [(number, None)]
    assert post(place, place.two).status_code == 204


def test_a_device_of_an_earlier_servers_life_is_told_to_come_in_anew(place: Place, tmp_path: Path) -> None:
    third = keys.make(tmp_path / "third")
    place.gate.admit([place.one.public, place.two.public, third.public])
    try:
        assert post(place, third).status_code == 410
        assert third.public.fingerprint not in place.gate.online()
    finally:
        place.gate.admit([place.one.public, place.two.public])


def test_a_device_at_work_comes_in_again_when_a_heartbeat_is_refused(place: Place, tmp_path: Path) -> None:
    """The server was started anew: it shows the device while it works on, and has its next order ready."""
    place.gate.state.deactivate_node(node_of(place, place.two))
    server = node.Server(place.url.removeprefix("http://"))
    line = node.Line(server, False)
    signs = NodeAuthHttpInterceptor(place.two.secret, place.two.secret.public_key())
    with FleetHttpClient(place.url, interceptors=[signs, line]) as client, line.http:
        session = node._Session(client, line, place.two, tmp_path, server)
        session.begin()
        try:
            place.gate.admit([place.one.public])
            place.gate.admit([place.one.public, place.two.public])  # a new server knows as much of it
            assert place.two.public.fingerprint not in place.gate.online()
            session._beat_once()
            assert place.two.public.fingerprint in place.gate.online()
            number = push(place, place.two, b"the next")
            got, body = session._send("0" * 32, b"what nobody waits for", "order")
            assert (body, got.headers[wire.ORDER]) == (b"the next", number)
        finally:
            session.end()


def test_nobody_answers_the_order_of_another(place: Place) -> None:
    number = push(place, place.one)
    assert post(place, place.two).status_code == 204  # nor is given it
    assert post(place, place.two, b"a lie", number).status_code == 204
    assert not list(place.gate.pull({number}))
    assert post(place, place.one).content == b"work"
    assert post(place, place.one, b"the truth", number).status_code == 204
    assert post(place, place.one, b"second thoughts", number).status_code == 204
    assert pull(place, number) == [(number, b"the truth")]


def test_an_order_that_was_dropped_is_not_given(place: Place) -> None:
    place.gate.drop({push(place, place.one)})
    assert post(place, place.one).status_code == 204
    assert not place.gate.mail._open


def test_orders_that_end_alike_share_their_end() -> None:
    box = Mail()
    body = bytes(1000)
    for device in range(3):
        box.put(device, b"%d" % device + body, len(body), 100)
    letters = [box.first(device) for device in range(3)]
    assert [letter.head for letter in letters if letter] == [b"0", b"1", b"2"]
    assert len({id(letter.tail) for letter in letters if letter}) == 1


def test_the_order_of_a_device_that_is_away_is_lost(place: Place) -> None:
    number = push(place, place.two)
    place.gate.state.deactivate_node(node_of(place, place.two))
    assert place.two.public.fingerprint not in place.gate.online()
    assert pull(place, number) == [(number, None)]


def test_a_key_that_never_joined_can_be_revoked(place: Place, tmp_path: Path) -> None:
    third = keys.make(tmp_path / "third").public
    place.gate.admit([place.one.public, place.two.public, third])
    place.gate.admit([place.one.public, place.two.public])
    assert place.gate.state.get_node_id_by_public_key(third.pem) is None


def test_half_open_connections_lock_nobody_out(place: Place) -> None:
    """200 that send the begin of a request, or of a body, and no more."""
    host, _, port = place.url.removeprefix("http://").partition(":")
    signed = "".join(f"{k}: {v}\r\n" for k, v in wire.signed(place.two).items())
    begins = [
        b"POST /v1/fleet/exch",
        f"POST {wire.EXCHANGE} HTTP/1.1\r\n{signed}content-length: 9\r\n\r\n1".encode(),
    ]
    opened = [socket.create_connection((host, int(port)), timeout=10) for _ in range(200)]
    try:
        for n, connection in enumerate(opened):
            connection.sendall(begins[n % 2])
        number = push(place, place.one)
        began = time.monotonic()
        assert post(place, place.one).content == b"work"
        assert post(place, place.one, b"done", number).status_code == 204
        assert pull(place, number) == [(number, b"done")]
        assert time.monotonic() - began < 5
    finally:
        for connection in opened:
            connection.close()


def test_a_device_fills_no_memory_with_bodies_that_do_not_end(place: Place) -> None:
    """Of an answer that is wanted the last one that began is kept, and of others nothing."""
    host, _, port = place.url.removeprefix("http://").partition(":")
    number = push(place, place.one)
    assert post(place, place.one).content == b"work"

    def begin(order: str) -> socket.socket:
        heads = {**wire.signed(place.one), wire.NEXT: "nothing", wire.ORDER: order, "content-length": "1000"}
        opened = socket.create_connection((host, int(port)), timeout=10)
        opened.sendall(f"POST {wire.EXCHANGE} HTTP/1.1\r\nhost: x\r\n".encode())
        opened.sendall("".join(f"{k}: {v}\r\n" for k, v in heads.items()).encode() + b"\r\n" + b"x" * 999)
        return opened

    with begin(number) as first, begin(number) as second:
        assert b" 409 " in first.recv(4096)
        with begin("0" * 32) as unwanted:
            second.sendall(b"y")
            assert b" 204 " in second.recv(4096)
            unwanted.sendall(b"z")
            assert b" 204 " in unwanted.recv(4096)
    assert pull(place, number) == [(number, b"x" * 999 + b"y")]
    assert not place.gate._exchange._coming


def test_a_key_that_is_there_already_is_told_so(place: Place, tmp_path: Path) -> None:
    said: list[str] = []
    address = place.url.removeprefix("http://")
    node.stay(
        node.Server(address),
        place.one,
        tmp_path,
        lambda order: b"",
        over=lambda: bool(said),
        note=said.append,
    )
    assert "a device with this key is connected already" in said[0]


@pytest.mark.faults
def test_a_slow_line_loses_no_device(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that takes longer than the server waits for a heartbeat: the device is in one session all the time."""
    monkeypatch.setattr(in_memory_linkstate, "HEARTBEAT_PATIENCE", 0.25)
    monkeypatch.setattr(node, "QUIET", node.QUIET * 0.25 / 2)
    key, answer = place.two.public.fingerprint, bytes(100_000)
    assert place.gate.state.deactivate_node(node_of(place, place.two))
    marks, numbers, found = set[str](), set[str](), list[tuple[str, bytes | None]]()
    until = time.monotonic() + 20

    def over() -> bool:
        if mark := place.gate.online().get(key):
            marks.add(mark)
            if not numbers:
                numbers.add(push(place, place.two))
        found.extend(place.gate.pull(numbers))
        return bool(found) or len(marks) > 1 or time.monotonic() > until

    with slow_line(place, 20_000) as address:
        server = node.Server(address, poll=0.05)
        node.stay(server, place.two, tmp_path, lambda order: answer, over=over, note=print)
    assert found == [(*numbers, answer)]


@contextlib.contextmanager
def slow_line(place: Place, speed: int) -> Iterator[str]:
    """An address from which so many bytes a second get to the place."""
    host, _, port = place.url.removeprefix("http://").partition(":")

    def carry(here: socket.socket, there: socket.socket, at_once: int) -> None:
        with contextlib.suppress(OSError):
            while data := here.recv(at_once):
                there.sendall(data)
                time.sleep(len(data) / speed if at_once < speed else 0)
            there.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                here = opened.enter_context(listener.accept()[0])
                there = opened.enter_context(socket.create_connection((host, int(port))))
                threading.Thread(target=carry, args=(here, there, speed // 20), daemon=True).start()
                threading.Thread(target=carry, args=(there, here, 1 << 16), daemon=True).start()

    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_connection_without_a_request_is_closed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HEAD", 0.2)
    host, _, port = place.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as opened:
        opened.sendall(b"POST /v1/fleet/exch")
        assert opened.recv(1) == b""
    with socket.create_connection((host, int(port)), timeout=10) as opened:
        opened.sendall(b"POST /v1/control/start-run HTTP/1.1\r\n\r\n")
        assert b" 404 " in opened.recv(4096)
        assert opened.recv(1) == b""


@pytest.mark.parametrize("begin", [b"X: a", b"POST /v1/fleet/"])
def test_a_head_that_does_not_end_is_not_kept(place: Place, begin: bytes) -> None:
    """Of a first request, of a later one on the connection, and of a line of any kind."""
    host, _, port = place.url.removeprefix("http://").partition(":")
    heads = "".join(f"{k}: {v}\r\n" for k, v in wire.signed(place.one).items())
    whole = f"POST {wire.EXCHANGE} HTTP/1.1\r\nhost: x\r\n{heads}content-length: 0\r\n\r\n"
    for first in ("", whole):
        with socket.create_connection((host, int(port)), timeout=10) as opened:
            if first:
                opened.sendall(first.encode())
                assert b" 204 " in opened.recv(4096)
            opened.sendall((b"POST / HTTP/1.1\r\n" if begin[:1] == b"X" else b"") + begin)
            sent = 0
            with pytest.raises(ConnectionError):
                while sent < 50 * door.LONGEST_HEAD:
                    opened.sendall(b"a" * 4096)
                    sent += 4096
                    time.sleep(0.001)
            assert sent >= door.LONGEST_HEAD - 4096


def test_a_strangers_body_is_not_read(place: Place) -> None:
    """To Flower's own requests neither: they are refused before it has come."""
    host, _, port = place.url.removeprefix("http://").partition(":")
    signed = "".join(f"{k}: {v}\r\n" for k, v in wire.signed(place.stranger).items())
    for path in (wire.EXCHANGE, "/v1/fleet/activate-node"):
        with socket.create_connection((host, int(port)), timeout=10) as opened:
            opened.sendall(f"POST {path} HTTP/1.1\r\n{signed}content-length: {door.SMALL}\r\n\r\n".encode())
            assert b" 401 " in opened.recv(4096)
