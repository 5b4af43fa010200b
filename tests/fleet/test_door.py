"""The door over HTTP: who comes in, whose order and answer it is, and what no request can do."""

import contextlib
import errno
import json
import os
import shutil
import socket
import struct
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import pytest
from devices_harness import free_port
from starlette.datastructures import URL
from starlette.requests import Request

from fleetune.fleet import door, http_server, keys, line, link, server
from fleetune.fleet.audit import FILE, Audit, verify
from fleetune.fleet.door import CHALLENGE, HEARTBEAT, HOST, KEY, NEXT, ORDER, SESSION, SIGNATURE, Door
from fleetune.fleet.http_server import Address
from fleetune.fleet.keys import Place, PrivateKey
from fleetune.fleet.link import Mail
from fleetune.fleet.server import Served

Head = Mapping[str, str]
Answer = httpx.Response


class House:
    """An open door, and three keys: two registered devices, which are there, and a stranger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.one, self.two, self.stranger = (keys.make(folder / name) for name in ("one", "two", "stranger"))
        self.port = free_port()
        self.door = Door(Address("127.0.0.1", self.port), [self.one.public, self.two.public])
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}/fleet/", timeout=20)
        self.heads: dict[str, Head] = {}

    def post(self, name: str, head: Head, body: bytes = b"") -> httpx.Response:
        return self.http.post(name, content=body, headers=head)

    def signed(self, key: PrivateKey, by: PrivateKey | None = None, **told: str) -> Head:
        """The head by which a key comes in: signed by another (`by`), or for one `address` and `stated` to be of another."""
        address, trusted = told.get("address", f"127.0.0.1:{self.port}"), told.get("trusted", "")
        claim = {KEY: b64encode(key.public.pem).decode()}
        challenge = self.post("challenge", claim).headers.get(CHALLENGE, "")
        signature = b64encode(keys.sign(by or key, door.signed_text(address, trusted, challenge))).decode()
        where = {HOST: told.get("stated", address), door.TRUSTED: trusted}
        return claim | where | {CHALLENGE: challenge, SIGNATURE: signature}

    def enter(self, key: PrivateKey, claim: Head = MappingProxyType({}), **told: Any) -> httpx.Response:
        """Ask to come in with what `signed` makes, and with other parts of it."""
        return self.post("session", {**self.signed(key, **told), **claim})

    def come(self, key: PrivateKey, heartbeat: str = "30") -> Head:
        """Come in anew; the head of the device's requests."""
        before = self.heads.get(key.public.name, {}).get("authorization", "").removeprefix("Bearer ")
        got = self.enter(key, {SESSION: before, HEARTBEAT: heartbeat})
        self.heads[key.public.name] = bearer(got)
        return self.heads[key.public.name]

    def exchange(self, key: PrivateKey, body: bytes = b"", number: str = "", wants: str = "order") -> Answer:
        head = self.heads[key.public.name] | {NEXT: wants} | ({ORDER: number} if number else {})
        return self.post("exchange", head, body)

    @contextlib.contextmanager
    def stay(self, key: PrivateKey, state: Path, **more: Any) -> Iterator[line._Stay]:
        """A device's side of a stay."""
        server = line.Server(f"127.0.0.1:{self.port}", **more)
        with (way := line.Line(server, False)).http:
            yield line._Stay(way, key, state, server)

    def raw(self, path: str, head: Head, size: str = "content-length: 0", sent: bytes = b"") -> socket.socket:
        """A connection on which a request was sent as these bytes."""
        opened = self.connected()
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        opened.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\n{lines}{size}\r\n\r\n".encode() + sent)
        return opened

    def connected(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def push(self, key: PrivateKey, data: bytes = b"work", common: int = 0, room: int = 1 << 24) -> str:
        number = self.door.push(key.public.fingerprint, data, common, room)
        assert number is not None
        return number

    def pull(self, number: str) -> list[tuple[str, bytes | None]]:
        pulled: list[tuple[str, bytes | None]] = []
        self.until(lambda: pulled.extend(self.door.pull({number})) or bool(pulled))
        return pulled

    def session(self, key: PrivateKey) -> door.DeviceSession:
        return self.door._sessions[key.public.fingerprint]

    def waits(self, key: PrivateKey) -> None:
        """Return when a request of the device waits for an order."""
        self.until(lambda: self.session(key).waits is not None)

    def until(self, met: Callable[[], bool]) -> None:
        for _ in range(2000):
            if met():
                return
            time.sleep(0.01)
        raise AssertionError("it does not come to pass")


def bearer(got: httpx.Response) -> Head:
    """The head of a device's requests, by the answer to its coming in."""
    assert got.status_code == 204
    return {"authorization": f"Bearer {got.headers[SESSION]}"}


@contextlib.contextmanager
def opening(folder: Path, *tls: Path, anybody: bool = False) -> Iterator[House]:
    house = House(folder)
    if anybody:
        house.door = Door(Address("127.0.0.1", house.port, *tls), None)
    house.door.open()
    with house.http:
        yield house
    house.door.close()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with opening(tmp_path_factory.mktemp("keys")) as house:
        yield house


@pytest.fixture
def house(opened: House, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(door, "HOLD", 0.2)
    opened.door.admit([opened.one.public, opened.two.public])
    for key in (opened.one, opened.two):
        opened.door._end(key.public.fingerprint)
        opened.come(key)
    assert len(opened.door.online()) == 2
    opened.door.refusals.taken()
    yield opened
    opened.door.drop(set(opened.door.mail._open))


# Who comes in ------------------------------------------------------------------------------------------
def forgeries(house: House) -> dict[str, Callable[[], httpx.Response]]:
    """What somebody without the key of device one may send to be taken for it, and what a revoked device may."""
    one, address = house.one, f"127.0.0.1:{house.port}"
    used, later = house.signed(one), house.signed(one)
    known = house.heads["one"]["authorization"].removeprefix("Bearer ")
    house.heads["one"] = bearer(house.post("session", later | {SESSION: known}))
    secret, name = house.session(one).secret, one.public.fingerprint
    others, challenge = house.session(house.two).secret, house.signed(house.two)[CHALLENGE]
    stranger = {KEY: b64encode(house.stranger.public.pem).decode()}
    return {
        "nothing": lambda: house.post("session", {}),
        "a key that is not registered": lambda: house.post("challenge", stranger),
        "its key, signed with another": lambda: house.enter(one, by=house.two),
        "signed for another server": lambda: house.enter(one, address=f"a.org:{house.port}"),
        "signed for another on this machine": lambda: house.enter(one, address=f"127.0.0.1:{house.port - 1}"),
        "for another, said to be for this": lambda: house.enter(one, address="a.org:1", stated=address),
        "for a server that another certificate vouches for": lambda: house.enter(one, trusted="ab" * 32),
        "the challenge of another key": lambda: house.enter(one, {CHALLENGE: challenge}),
        "a challenge that was made before one that was used": lambda: house.post("session", used),
        "a challenge again": lambda: house.post("session", later),
        "letters that are no signature": lambda: house.enter(one, {SIGNATURE: "!?"}),
        "a signature cut short": lambda: house.enter(one, {SIGNATURE: "AAAA"}),
        "without a session": lambda: house.post("alive", {}),
        "the session of another": lambda: house.post("alive", {"authorization": f"Bearer {name}.{others}"}),
        "its session cut": lambda: house.post("leave", {"authorization": f"Bearer {name}.{secret[:-1]}"}),
        "its session otherwise": lambda: house.post("leave", {"authorization": f"Basic {name}.{secret}"}),
    }


@pytest.mark.injects
def test_forged_identities_are_refused_and_logged(house, tmp_path, injected):
    (tmp_path / "keys").mkdir()
    for name in ("one", "two"):
        (tmp_path / "keys" / f"{name}.pub").write_bytes((house.folder / f"{name}.pub").read_bytes())
    served, audit = Served(Place("127.0.0.1", 1, tmp_path / "keys")), Audit(tmp_path)
    served._door, faults, tried, said = house.door, [], forgeries(house), list[str]()
    for name, send in tried.items():
        status = send().status_code
        served._next_refusals = 0.0
        served._log_refusals(audit, said.append)
        logged = json.loads((tmp_path / FILE).read_text().splitlines()[-1])
        if status not in (403, 410, 421) or logged.get("status") != status or logged.get("requests") != 1:
            faults.append(f"{name}: {status}, {logged}")
    assert {text.split(": ", 2)[2] for text in said} == {server.AWAY[403], server.AWAY[421]}
    assert f"turned away: one: {server.AWAY[421]}" in said
    before = len(said)
    house.enter(house.stranger)
    served._log_refusals(audit, said.append)
    assert len(said) == before  # a batch a minute, however many come
    injected("forged identities", len(tried), survived=len(tried) - len(faults))
    assert not faults, "\n".join(faults)
    assert verify(tmp_path / FILE) == (len(tried), audit.chain, 0)
    names = [json.loads(entry)["name"] for entry in (tmp_path / FILE).read_text().splitlines()]
    assert {"one", ""} == set(names)  # as whose key they came
    assert set(house.door.online()) == {house.one.public.fingerprint, house.two.public.fingerprint}


def test_a_revoked_device_that_tries_for_ever_is_said_once(house, tmp_path):
    served, said = Served(Place("127.0.0.1", 1)), list[str]()
    served._door = house.door
    house.door.admit([])
    for key in (house.one, house.one, house.two, house.stranger, house.two):
        house.enter(key)
        served._next_refusals = 0.0
        served._log_refusals(Audit(tmp_path), said.append)
    who = [text.split(": ")[1] for text in said]
    assert who == ["one", "two", house.stranger.public.fingerprint[:8], "two"]


def test_a_revoked_key_is_thrown_out_and_a_new_one_comes_in(house):
    number = house.push(house.two)
    house.door.admit([house.one.public, house.stranger.public])
    assert house.exchange(house.two).status_code == house.enter(house.two).status_code == 401
    assert house.pull(number) == [(number, None)]
    house.come(house.stranger)
    assert house.stranger.public.fingerprint in house.door.online()


@pytest.mark.parametrize("wrong", ["nothing", "a stray file", "a copy", "the rest is gone", "a new key too"])
def test_a_removal_holds_whatever_else_is_wrong_though_nobody_waits_for_devices(tmp_path, monkeypatch, wrong):
    """A stray file kept revoked devices in, as did an empty folder, and a server that was adding up."""
    monkeypatch.setattr(server, "LOOK", 0.0)
    house, folder = House(tmp_path), tmp_path / "known"
    folder.mkdir()
    for name in ("one", "two"):
        shutil.copy(tmp_path / f"{name}.pub", folder)
    with Served(Place("127.0.0.1", house.port, folder)) as served, house.http:
        house.come(house.one)
        house.come(house.two)
        (folder / "two.pub").unlink()
        if wrong == "the rest is gone":
            (folder / "one.pub").unlink()
        elif wrong != "nothing":
            shutil.copy(tmp_path / "one.pub", folder / "copy.pub")
        if wrong == "a stray file":
            (folder / "copy.pub").write_text("no key")
        if wrong == "a new key too":
            shutil.copy(tmp_path / "stranger.pub", folder)
        assert house.post("alive", house.heads["two"]).status_code == 401
        assert house.enter(house.two).status_code == 401
        stays = 401 if wrong == "the rest is gone" else 204
        assert house.post("alive", house.heads["one"]).status_code == stays
        assert house.enter(house.stranger).status_code == 403
        assert any("two is revoked" in text for text in served._news)
        assert len(served._news) == (1 if wrong == "nothing" else 2)  # what is wrong is said once


def test_a_device_that_means_another_server_is_told_so(house):
    for other in ({"address": f"a.org:{house.port}"}, {"trusted": "ab" * 32}):
        assert house.enter(house.one, **other).status_code == 421
    assert "another server" in line.REFUSED[421]
    # the key is looked at first
    assert house.enter(house.stranger, trusted="ab" * 32).status_code in (401, 403)


def test_a_key_that_is_revoked_while_it_comes_in_stays_out(house, monkeypatch):
    """The folder of keys is read in another thread than requests are answered in."""
    verify = keys.has_signed

    def slow(*given: object) -> bool:
        house.door.admit([house.one.public])
        return verify(*given)  # type: ignore[arg-type]

    head = house.signed(house.two)
    monkeypatch.setattr(keys, "has_signed", slow)
    assert house.post("session", head).status_code == 401
    assert set(house.door.online()) == {house.one.public.fingerprint}


def test_a_key_is_there_once_unless_its_own_process_comes_again(house, tmp_path):
    said: list[str] = []
    device = line.Server(f"127.0.0.1:{house.port}")
    line.stay(device, house.one, tmp_path, lambda order: b"", over=lambda: bool(said), note=said.append)
    assert said == [f"{line.REFUSED[409]}; trying again"]
    mark = house.door.online()[house.one.public.fingerprint]
    house.come(house.one)
    assert house.door.online()[house.one.public.fingerprint] != mark


def test_a_challenge_is_for_one_key_once_within_a_minute(monkeypatch):
    now = [5 * 10**9]
    monkeypatch.setattr(door.time, "monotonic_ns", lambda: now[0])
    challenges = door.Challenges()

    def made(after: float = 1) -> str:
        now[0] += int(after * 1e9)
        return challenges.new("k")

    first, second, third = made(), made(), made()
    assert not challenges.use("other", second)
    assert challenges.use("k", second)
    assert not challenges.use("k", second)
    assert not challenges.use("k", first)
    now[0] += 61 * 10**9
    assert not challenges.use("k", third)
    assert not door.Challenges().use("k", made())  # of another server
    for odd in ("", "-", "--", "1-2-3", third.replace("-", "")):
        assert not challenges.use("k", odd)


NAMES = ["a.example.org", "*.fleet.org", "10.0.0.1"]


@pytest.mark.parametrize(
    ("certificate", "called", "others"),
    [
        (NAMES, ["A.example.org", "x.fleet.org", "10.0.0.1"], ["b.example.org", "fleet.org"]),
        ([], ["127.0.0.1", "localhost"], ["127.0.0.2", "[::1]", "fleet.org"]),
    ],
)
def test_a_server_is_called_by_its_certificate(tmp_path, certificate, called, others):
    if certificate:
        keys.make_certificate(tmp_path, certificate)
    opened = Door(Address("127.0.0.1", 1, tmp_path / "server.pem" if certificate else None), None)
    assert [host for host in called + others if opened._is_called(f"{host}:1")] == called
    ported = [host for host in called + others if opened._is_called(f"{host}:2")]  # a proxy's port
    assert ported == (called if certificate else [])


def test_a_device_that_has_gone_is_known_to_have_whatever_interval_it_named(house):
    for stated, taken in (("1800", 60), ("-1", 60), ("nan", 60), ("x", 60), ("0.5", 0.5)):
        house.come(house.one, stated)
        assert house.session(house.one).heartbeat == taken
    house.session(house.one).said -= 1.1
    number = house.push(house.one)
    assert set(house.door.online()) == {house.two.public.fingerprint}
    assert house.pull(number) == [(number, None)]
    assert house.exchange(house.one).status_code == 204  # it is back, in the same stay
    assert len(house.door.online()) == 2


def test_where_any_key_comes_in_their_number_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(door, "SESSIONS", 2)
    with opening(tmp_path, anybody=True) as house:
        house.come(house.one)
        house.come(house.two)
        assert house.enter(house.stranger).status_code == 503
        house.session(house.two).said -= 1000
        house.come(house.stranger)
        assert len(house.door._sessions) == 2
        claim = {KEY: b64encode(b"no key").decode()}
        assert house.enter(house.one, claim).status_code == 403


# Orders and answers ------------------------------------------------------------------------------------
def test_an_order_is_given_until_it_is_answered_and_its_answer_taken_once(house):
    number = house.push(house.one, b"head tail", 4)
    for _ in range(2):
        got = house.exchange(house.one)
        assert (got.status_code, got.content, got.headers[ORDER]) == (200, b"head tail", number)
    assert house.exchange(house.one, b"done", number).status_code == 204
    assert house.pull(number) == [(number, b"done")]
    assert not list(house.door.pull({number}))
    house.door.drop({house.push(house.one)})
    assert house.exchange(house.one).status_code == 204
    assert not house.door.mail._open


def test_a_request_waits_for_the_order(house, monkeypatch):
    """A later one of the device sends it away: its connection may be dead. So does the device's end."""
    monkeypatch.setattr(door, "HOLD", 10.0)
    began, left = time.monotonic(), list[int]()
    earlier = threading.Thread(target=lambda: left.append(house.exchange(house.one).status_code))
    earlier.start()
    house.waits(house.one)
    threading.Timer(0.2, house.push, (house.one,)).start()
    assert house.exchange(house.one).content == b"work"
    earlier.join(5)
    going = threading.Thread(target=lambda: left.append(house.exchange(house.two).status_code))
    going.start()
    house.waits(house.two)
    assert house.post("leave", house.heads["two"]).status_code == 204
    going.join(5)
    assert left == [204, 204]
    assert set(house.door.online()) == {house.one.public.fingerprint}
    assert time.monotonic() - began < 8


def test_nobody_answers_the_order_of_another(house):
    number = house.push(house.one)
    assert house.exchange(house.two).status_code == 204  # nor is given it
    assert house.exchange(house.two, b"a lie", number).status_code == 204
    assert not list(house.door.pull({number}))
    assert house.exchange(house.one).content == b"work"
    assert house.exchange(house.one, b"the truth", number).status_code == 204
    assert house.exchange(house.one, b"second thoughts", number).status_code == 204
    assert house.pull(number) == [(number, b"the truth")]


def test_what_was_ordered_in_an_earlier_stay_is_lost(house):
    """So a process that has not taken the job yet is given no work."""
    number = house.push(house.two)
    house.come(house.two)
    assert house.pull(number) == [(number, None)]
    assert house.exchange(house.two).status_code == 204


def test_an_order_that_went_to_a_dead_connection_is_given_again(house, monkeypatch):
    """Its device is killed while its request waits: the socket is closed with a reset, which nobody looks at."""
    monkeypatch.setattr(door, "HOLD", 10.0)
    with house.raw("/fleet/exchange", house.heads["one"]) as dead:
        dead.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        house.waits(house.one)
    number = house.push(house.one)
    got = house.exchange(house.one)
    assert (got.status_code, got.content, got.headers[ORDER]) == (200, b"work", number)


def test_a_large_answer_comes_in_pieces(house, tmp_path, monkeypatch):
    monkeypatch.setattr(line, "PIECE", 1000)
    number = house.push(house.one, data := bytes(range(256)) * 1000, 200_000)
    with house.stay(house.one, tmp_path) as stay:
        stay.session = house.heads["one"]["authorization"].removeprefix("Bearer ")
        assert stay._send("", b"", "order")[1] == data
        stay._send(number, data[:12_345], "nothing")
    assert house.pull(number) == [(number, data[:12_345])]


def test_a_device_at_work_comes_in_again_when_a_heartbeat_is_refused(house, tmp_path):
    """The server was started anew: it shows the device while it works on, and has its next order ready."""
    key = house.two.public.fingerprint
    house.post("leave", house.heads["two"])
    with house.stay(house.two, tmp_path, heartbeat=2) as stay:
        stay.begin()
        try:
            before = stay.session
            house.door._end(key)  # a new server knows as much of it
            house.until(lambda: stay.session not in ("", before))  # the door knows it a moment before
            number = house.push(house.two, b"the next")
            got, body = stay._send("0" * 32, b"what nobody waits for", "order")
            assert (body, got.headers[ORDER]) == (b"the next", number)
        finally:
            stay.end()
    assert key not in house.door.online()


@pytest.mark.parametrize("text", [b"", b"x", b"\xff\xfe", b"a.b", b"9" * 5000, b"a\r\nx: y"])
def test_a_spoilt_file_of_the_last_session_keeps_no_device_out(house, tmp_path, text):
    house.post("leave", house.heads["one"])
    (tmp_path / line.FILE).write_bytes(text)
    with house.stay(house.one, tmp_path) as stay:
        stay._come_in()
    kept = (tmp_path / line.FILE).read_text()
    assert kept.startswith(f"127.0.0.1:{house.port}  {house.one.public.fingerprint}.")
    assert stay._before("") == kept.rpartition(" ")[2]
    assert stay._before("ab" * 32) == ""  # nor does another at this address
    stay.server = line.Server("localhost:1")
    assert stay._before("") == ""  # no other server learns it
    assert house.one.public.fingerprint in house.door.online()


def test_a_full_disk_keeps_no_device_out(house, tmp_path, monkeypatch, caplog):
    """Its next process is only let in when this stay is over."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    house.post("leave", house.heads["one"])
    monkeypatch.setattr(os, "fsync", full)
    with house.stay(house.one, tmp_path) as stay:
        stay._come_in()
    assert house.one.public.fingerprint in house.door.online()
    assert "the disk is full" in caplog.text
    assert not list(tmp_path.glob(f"*{line.FILE}*"))


def test_orders_that_end_alike_share_their_end():
    box, body = Mail(), bytes(1000)
    for device in "012":
        box.put(device, device.encode() + body, len(body), 100)
    letters = [box.first(device) for device in "012"]
    assert [letter.head for letter in letters if letter] == [b"0", b"1", b"2"]
    assert len({id(letter.tail) for letter in letters if letter}) == 1


# What no request can do --------------------------------------------------------------------------------
def test_what_is_too_large_is_refused(house):
    number = house.push(house.one, room=10)  # of all pieces together
    assert house.exchange(house.one).content == b"work"
    head = house.heads["one"]
    for path, length, status in (
        ("exchange", f"content-length: {door.LIMIT + 1}", 413),
        ("exchange", "content-length: 99999999999999999999", 413),
        ("exchange", "transfer-encoding: chunked", 411),
        *((path, "content-length: 1", 413) for path in ("alive", "leave", "session", "challenge")),
    ):
        with house.raw(f"/fleet/{path}", head, length) as opened:
            assert f" {status} ".encode() in opened.recv(4096)
    assert house.exchange(house.one, b"", number, "piece").status_code == 400
    for piece in (b"12345", b"67890", b"!", b"more"):
        assert house.exchange(house.one, piece, number, "piece").status_code == 204
    assert house.pull(number) == [(number, link.TOO_LARGE)]


ABSENT = "/ /fleet /fleet/ /fleet/challenge/ /fleet/../fleet/x /docs /openapi.json /v1/fleet/pull-messages"


@pytest.mark.parametrize("path", ABSENT.split())
def test_nothing_but_what_devices_use_is_there(house, path):
    """Whoever asks, and before a body is read."""
    for head in ({}, house.heads["one"]):
        with house.raw(path, head, "content-length: 1000000") as opened:
            assert b" 404 " in opened.recv(4096)
    assert house.http.get("exchange").status_code == 405


def test_a_strangers_body_is_not_read(house):
    with house.raw("/fleet/exchange", {"authorization": "Bearer x.y"}, "content-length: 1000000") as opened:
        assert b" 410 " in opened.recv(4096)


def test_half_open_connections_lock_nobody_out(house):
    """200 that send the begin of a request, or of a body, and no more."""
    with contextlib.ExitStack() as closing:
        for _ in range(100):
            head = house.heads["two"]
            closing.enter_context(house.raw("/fleet/exchange", head, "content-length: 9", b"1"))
            closing.enter_context(house.connected()).sendall(b"POST /fleet/exch")
        number, began = house.push(house.one), time.monotonic()
        assert house.exchange(house.one).content == b"work"
        assert house.exchange(house.one, b"done", number).status_code == 204
        assert house.pull(number) == [(number, b"done")]
        assert time.monotonic() - began < 5


def test_a_device_fills_no_memory_with_bodies_that_do_not_end(house):
    """Of an answer that is wanted the last one that began is kept, and of others nothing."""
    number = house.push(house.one)
    assert house.exchange(house.one).content == b"work"

    def begin(order: str) -> socket.socket:
        head = house.heads["one"] | {NEXT: "nothing", ORDER: order}
        return house.raw("/fleet/exchange", head, "content-length: 1000", b"x" * 999)

    with begin(number) as first, begin(number) as second:
        assert b" 409 " in first.recv(4096)
        with begin("0" * 32) as unwanted:
            second.sendall(b"y")
            assert b" 204 " in second.recv(4096)
            unwanted.sendall(b"z")
            assert b" 204 " in unwanted.recv(4096)
    assert house.pull(number) == [(number, b"x" * 999 + b"y")]
    assert house.session(house.one).coming is None


def test_an_order_that_is_not_read_is_not_kept(house):
    """A later request of the device ends the earlier answer, and the end of its stay ends the last."""
    number = house.push(house.one, bytes(8 << 20))
    with house.raw("/fleet/exchange", house.heads["one"]) as first:
        house.until(lambda: house.session(house.one).sending is not None)
        sending = house.session(house.one).sending
        with house.raw("/fleet/exchange", house.heads["one"]):
            house.until(sending.done)
        assert len(b"".join(iter(lambda: first.recv(1 << 16), b""))) < 8 << 20
    assert house.exchange(house.one).headers[ORDER] == number  # who reads gets it


def test_more_connections_than_may_be_are_hung_up_at_once(tmp_path, monkeypatch):
    """The other open files that the system allows are for the run."""
    monkeypatch.setattr(http_server, "_connections", lambda: 3)
    with opening(tmp_path) as house:
        with contextlib.ExitStack() as closing:
            opened = [closing.enter_context(house.connected()) for _ in range(8)]
            time.sleep(0.2)
            ended = 0
            for one in opened:
                one.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    ended += one.recv(1) == b""
            assert ended == 5
        time.sleep(0.2)
        assert house.come(house.one)


def test_requests_that_wait_in_one_connection_fill_no_memory(house, monkeypatch):
    """A client that sends request after request without reading is not read on, while the first waits."""
    monkeypatch.setattr(door, "HOLD", 5.0)
    with house.raw("/fleet/exchange", house.heads["one"]) as opened:
        house.waits(house.one)
        opened.settimeout(0.5)
        lines = f"POST /fleet/alive HTTP/1.1\r\nhost: x\r\nauthorization: {house.heads['one']['authorization']}\r\n"
        block, sent = (lines + "content-length: 0\r\n\r\n").encode() * 500, 0
        with contextlib.suppress(TimeoutError):
            while sent < 100 << 20:
                sent += opened.send(block)
        assert sent < 30 << 20  # what the system's buffers hold


def test_a_connection_without_a_request_is_closed(house, monkeypatch):
    """The first request of a connection, or a later one."""
    monkeypatch.setattr(http_server, "HEAD", 0.3)
    with house.connected() as opened:
        opened.sendall(b"POST /fleet/exch")
        assert opened.recv(1) == b""
    with house.raw("/fleet/alive", house.heads["one"]) as opened:
        assert b" 204 " in opened.recv(4096)
        opened.sendall(b"POST /fleet/exch")
        assert opened.recv(1) == b""


@pytest.mark.parametrize("begin", [b"POST / HTTP/1.1\r\nX: a", b"POST /v1/fleet/"])
def test_a_head_that_does_not_end_is_not_kept(house, begin):
    with house.raw("/fleet/alive", house.heads["one"]) as opened:
        assert b" 204 " in opened.recv(4096)
        opened.sendall(begin)
        sent, answered = 0, b""
        with contextlib.suppress(ConnectionError):
            while sent < 50 * http_server.LONGEST_HEAD:
                opened.sendall(b"a" * 4096)
                sent += 4096
                time.sleep(0.001)
        with contextlib.suppress(ConnectionError):
            answered = opened.recv(4096)
        assert sent < 50 * http_server.LONGEST_HEAD or answered[:12] == b"HTTP/1.1 400"


def test_a_connection_that_does_not_greet_in_tls_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(http_server, "HEAD", 0.3)
    keys.make_certificate(tmp_path, ["127.0.0.1"])
    tls = tmp_path / "server.pem", tmp_path / "server.key"
    with opening(tmp_path, *tls, anybody=True) as house, house.connected() as opened:
        assert opened.recv(1) == b""


def test_what_a_stranger_states_as_a_key_is_logged_as_a_hash_alone(house):
    """No control characters of a token, such as C1's, reach the audit log."""
    for token in ('x"}\x85{"t": 1\x9b2J', "f" * 63, "F" * 64, "0" * 64 + "0"):
        house.post("alive", {"authorization": f"Bearer {token}.secret".encode("latin-1")})  # type: ignore[dict-item]
    assert {key for _, _, key in house.door.refusals.taken()} == {""}


def test_what_a_request_calls_the_server_is_not_in_the_log(house, monkeypatch):
    """Starlette 0.40 makes a request's URL, and its path, of the Host that it states; a malformed one has no URL."""

    def url(request: Request) -> URL:
        return URL(f"http://{request.headers['host']}{request.scope['path']}")

    monkeypatch.setattr(Request, "url", property(url))
    for host in ("127.0.0.1/joined-device-d1?", "[", "x/\x9b2J"):
        lines = f"POST /fleet/session HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\n\r\n"
        with house.connected() as opened:
            opened.sendall(lines.encode("latin-1"))
            assert b" 403 " in opened.recv(4096)
        assert house.door.refusals.taken() == {(403, "/fleet/session", ""): 1}


def test_refusals_are_counted_in_bounded_memory():
    refusals = door.Refusals()
    for i in range(1000):
        refusals.note(403, "/fleet/session", f"{i}", known=False)
    refusals.note(401, "/fleet/session", "revoked", known=True)
    counts = refusals.taken()
    assert counts.pop((401, "/fleet/session", "revoked")) == 1
    assert len(counts) == door.KINDS + 1
    assert counts[0, "", ""] == 1000 - door.KINDS
    assert not refusals.taken()
