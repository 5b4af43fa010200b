"""What a server sends is read by a device up to a limit, never decompressed, and by no proxy on the machine itself."""

import contextlib
import gzip
import hashlib
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from fleetune.common.memory import rss
from fleetune.errors import UsageError
from fleetune.fleet import door, keys, line
from fleetune.fleet.line import Server, stay
from fleetune.fleet.link import BURST, KINDS, Sparing

MILLION = 1_000_000


@contextlib.contextmanager
def hostile(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on this machine whose answers are those of a handler; its HOST:PORT."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


class Quiet(BaseHTTPRequestHandler):
    """Takes a request, and answers with the head of 200."""

    asked: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.asked.append(self.headers)
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def begin(self, status: int, *head: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in head:
            self.send_header(name, value)
        self.end_headers()

    def pour(self, piece: bytes, times: int = 400, pause: float = 0.0) -> None:
        with contextlib.suppress(OSError):
            for _ in range(times):
                self.wfile.write(piece)
                time.sleep(pause)

    def log_message(self, format: str, *args: object) -> None:
        pass


def says(status: int, *head: tuple[str, str]) -> type[Quiet]:
    """A server that answers with this alone, and keeps what it was asked."""

    class Says(Quiet):
        asked: ClassVar[list[Any]] = []

        def answer(self) -> None:
            self.begin(status, *head)

    return Says


class Bomb(Quiet):
    """Compresses a thousand to one."""

    def answer(self) -> None:
        body = gzip.compress(bytes(100 * MILLION))
        self.begin(200, ("content-encoding", "gzip"), ("content-length", str(len(body))))
        self.pour(body, 1)


class Endless(Quiet):
    """Sends for as long as somebody reads."""

    def answer(self) -> None:
        self.begin(200)
        self.pour(bytes(MILLION))


def stayed(way: line.Line, key: keys.PrivateKey, state: Path, server: Server) -> line._Stay:
    """A device that has come in."""
    stay = line._Stay(way, key, state, server)
    stay.session = "x.y"
    return stay


def joined(address: str, state: Path, over: Callable[[], bool] | None = None) -> list[str]:
    """What a device says that stays with a server until `over`, or until it has said something."""
    said = list[str]()
    key = keys.make(state / f"key-{time.monotonic_ns()}")
    stay(Server(address), key, state, lambda order: b"", over=over or (lambda: bool(said)), note=said.append)
    return said


@pytest.mark.parametrize(("handler", "why"), [(Bomb, "compresses what it sends"), (Endless, "more than the")])
def test_no_answer_fills_a_devices_memory(tmp_path, handler, why):
    """Neither that to its request for an order, nor that to another."""
    key, before = keys.make(tmp_path / "key"), rss()
    with hostile(handler) as address:
        server = Server(address)
        with (way := line.Line(server, False)).http, pytest.raises(line.Odd, match=why):
            stayed(way, key, tmp_path, server)._send("", b"", "order")
        assert why in joined(address, tmp_path)[0]
    assert rss() - before < 30 * MILLION
    assert handler.asked.pop()["accept-encoding"] == "identity"


def test_a_head_in_no_letters_of_a_server_is_answered_as_a_bad_one(tmp_path):
    with hostile(says(204, ("fleetune-challenge", "\xe9"))) as address:
        assert joined(address, tmp_path)[0] == "the head of the server's answer is not in ASCII; trying again"


def test_a_device_trusts_one_certificate(tmp_path):
    """A server that hands out two could be either, and a signature names one."""
    one, two = (keys.make_certificate(tmp_path / name, ["127.0.0.1"]) for name in ("one", "two"))
    both = tmp_path / "both.pem"
    for second in (one, two):
        both.write_text(one.read_text() + second.read_text())
        with pytest.raises(UsageError, match="holds 2 certificates"):
            Server("127.0.0.1:1", both).trust()
        with pytest.raises(UsageError, match="holds 2 certificates"):
            keys.trusted(both)
    context = Server("127.0.0.1:1", one).trust()
    assert isinstance(context, ssl.SSLContext)
    (held,) = context.get_ca_certs(binary_form=True)
    assert hashlib.sha256(held).hexdigest() == keys.trusted(one)
    with pytest.raises(UsageError, match="cannot read the certificate"):
        Server("127.0.0.1:1", tmp_path / "none.pem").trust()


def test_an_order_may_be_as_large_as_the_device_says(tmp_path):
    class Large(Quiet):
        def answer(self) -> None:
            self.begin(200, ("content-length", str(3 * MILLION)))
            self.pour(bytes(MILLION // 10), 30)

    key, most = keys.make(tmp_path / "key"), [3 * MILLION]
    with hostile(Large) as address:
        server = Server(address, room=lambda: most[0])
        with (way := line.Line(server, False)).http:
            session = stayed(way, key, tmp_path, server)
            tracemalloc.start()
            assert len(session._send("", b"", "order")[1]) == 3 * MILLION
            # once; the server of the test has another
            assert tracemalloc.get_traced_memory()[1] < 5 * MILLION
            tracemalloc.stop()
            most[0] -= 1
            with pytest.raises(line.Odd):
                session._send("", b"", "order")


def test_no_proxy_is_between_a_machine_and_itself(tmp_path, monkeypatch):
    refuses = says(401)
    with socket.create_server(("127.0.0.1", 0)) as proxy, hostile(refuses) as address:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        joined(address, tmp_path)
        proxy.settimeout(0.1)
        with pytest.raises(TimeoutError):
            proxy.accept()
    assert refuses.asked
    assert line.Line(Server("fleet.example.org:1"), False).http.trust_env  # others are reached as usual


def test_what_is_wrong_is_told_once(tmp_path, monkeypatch):
    told = says(403)
    monkeypatch.setattr(line, "LONGEST", 0.01)
    with hostile(told) as address:
        said = joined(address, tmp_path, lambda: len(told.asked) >= 6)
    assert said == [f"{line.REFUSED[403]}; trying again"]


class Drips(Quiet):
    """Sends a small answer byte by byte."""

    def answer(self) -> None:
        self.begin(200, ("content-length", "60000"))
        self.pour(b"x", pause=0.05)


class Processing(Quiet):
    """Says that it is at work, again and again."""

    def answer(self) -> None:
        self.pour(b"HTTP/1.1 102 Processing\r\n\r\n", pause=0.05)


@pytest.mark.parametrize("handler", [Drips, Processing])
def test_a_device_that_comes_in_hears_that_it_shall_leave(tmp_path, handler):
    began = time.monotonic()
    with hostile(handler) as address:
        joined(address, tmp_path, lambda: time.monotonic() - began > 1)
        assert time.monotonic() - began < 8


def test_a_small_answer_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(line, "PATIENCE", 0.5)
    with hostile(Drips) as address:
        assert joined(address, tmp_path) == ["no server there (ReadTimeout); trying again"]


@pytest.mark.parametrize("handler", [Drips, Processing])
def test_last_words_to_a_server_take_a_few_seconds(tmp_path, monkeypatch, handler):
    monkeypatch.setattr(line, "FAREWELL", 0.3)
    with hostile(handler) as address:
        server = Server(address)
        with (way := line.Line(server, False)).http:
            session = stayed(way, keys.make(tmp_path / "key"), tmp_path, server)
            began = time.monotonic()
            session.end()
            assert time.monotonic() - began < 5


class Holds(Quiet):
    """Gives one order, and takes every piece of its answer in its own time."""

    def answer(self) -> None:
        if self.headers.get(door.ORDER):
            time.sleep(3)
        self.begin(200, (door.ORDER, "1") if self.path.endswith("exchange") else (door.SESSION, "s.x"))


def test_a_server_that_takes_its_time_does_not_hold_a_device_that_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(line, "FAREWELL", 0.3)
    monkeypatch.setattr(line, "PIECE", 1 << 10)
    began, done, stopped = time.monotonic(), list[bytearray](), threading.Event()

    def answer(order: bytearray) -> bytes:
        done.append(order)
        stopped.set()
        return bytes(1 << 22)

    with hostile(Holds) as address:
        key, said = keys.make(tmp_path / "key"), list[str]()
        stay(Server(address), key, tmp_path, answer, over=stopped.is_set, note=said.append)
        assert len(done) == 1
        assert time.monotonic() - began < 2.5
        until = time.monotonic() + 2  # nor does a request of it go on
        while any(thread.name == "request" for thread in threading.enumerate()):
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("why", "mend"),
    [
        ("certificate is not yet valid", "is this device's clock right?"),
        ("certificate has expired", "is this device's clock right?"),
        ("Hostname mismatch, certificate is not valid for 'x'.", "its names are those given to"),
        ("unable to get local issuer certificate", "the invite, or --ca, is of another server"),
    ],
)
def test_what_to_do_about_a_certificate_is_said(why, mend):
    error = httpx.ConnectError(
        f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {why} (_ssl.c:1006)"
    )
    assert line._why(error).startswith(f"the server's certificate is not trusted: {why} ({mend}")


def test_ever_new_lines_fill_no_log() -> None:
    spare = Sparing()
    said = [spare.line(f"{chr(ord('a') + n % 26) * n} failed") for n in range(1, 500)]
    assert sum(map(bool, said)) <= KINDS + BURST + 1
    assert said[-1] == ""
