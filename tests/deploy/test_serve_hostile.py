# SPDX-License-Identifier: Apache-2.0
"""The door under attack: connections that keep others out, and requests that cannot be read."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from serve_harness import ask, error_of, raw

from fleetune.deploy.serving import front as serve
from fleetune.deploy.serving.front import Front
from fleetune.deploy.serving.places import Places, Stage

CHAT = "/v1/chat/completions"
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
STREAM = b'{"messages": [{"role": "user", "content": "?"}], "stream": true}'
POST = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()


@contextmanager
def connections(front: Front, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """`count` connections to the door that have sent something and then wait."""
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", front.server_port), timeout=20)
            found.append(stack.enter_context(connection))
            connection.sendall(sent)
        yield found


# Places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", MODELS[:30], POST + b"Content-Length: 99\r\n\r\n{"])
def test_200_half_open_connections_keep_nobody_out(sent, front):
    with connections(front, 200, sent):
        began = time.monotonic()
        for _ in range(5):
            assert ask(front, "GET", "/v1/models")[0] == 200
        assert time.monotonic() - began < 2


def test_connections_that_are_opened_all_the_time_keep_nobody_out(front):
    done = threading.Event()

    def flood() -> None:
        while not done.is_set():
            with connections(front, 100, MODELS[:30]):
                pass

    attacker = threading.Thread(target=flood)
    attacker.start()
    try:
        began = time.monotonic()
        assert ask(front, "GET", "/v1/models")[0] == 200
        assert time.monotonic() - began < 2
    finally:
        done.set()
        attacker.join()


def test_an_answer_is_not_cut_off_by_connections_that_wait(front, upstream):
    upstream.go.clear()
    with connections(front, 1, POST + b"Content-Length: %d\r\n\r\n" % len(STREAM) + STREAM) as (honest,):
        found = honest.recv(1 << 16)
        with connections(front, 200, POST + b"Content-Length: 99\r\n\r\n{"):
            upstream.go.set()
            while b"[DONE]" not in found and (piece := honest.recv(1 << 16)):
                found += piece
    assert b"[DONE]" in found


def test_the_head_of_a_request_has_10_seconds(front, monkeypatch):
    assert serve.HEAD_SECONDS <= 10
    monkeypatch.setattr(serve, "HEAD_SECONDS", 0.2)
    with connections(front, 1, MODELS) as (half,):
        began = time.monotonic()
        assert half.recv(10) == b""
    assert 0.1 < time.monotonic() - began < 5


@contextmanager
def pairs(count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        both = [socket.socketpair() for _ in range(count)]
        for pair in both:
            for end in pair:
                stack.enter_context(end)
        yield [here for here, _ in both]


def is_cut(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False


def test_the_oldest_head_gives_way_before_any_body():
    with pairs(4) as (body, old, young, new):
        places = Places(total=3, of_address=3)
        for connection in (body, old, young):
            assert places.enter(connection, "a")
        places.move(body, Stage.BODY)
        assert places.enter(new, "b")
        assert [is_cut(c) for c in (body, old, young, new)] == [False, True, False, False]
        with pytest.raises(ConnectionAbortedError):
            places.move(old, Stage.ENGINE)  # it was read to its end in the same moment: too late
        places.leave(old)
        assert places.enter(old, "c")
        assert [is_cut(c) for c in (body, young)] == [False, True]


def test_requests_at_the_engine_keep_their_places():
    with pairs(4) as (first, second, third, other):
        places = Places(total=3, of_address=2)
        for connection in (first, second):
            assert places.enter(connection, "a")
            places.move(connection, Stage.ENGINE)
        assert not places.enter(third, "a")  # the address has all that one may have
        assert places.enter(third, "b")
        places.move(third, Stage.ENGINE)
        assert not places.enter(other, "c")  # all are held
        places.leave(first)
        assert places.enter(other, "c")
        assert not any(is_cut(c) for c in (first, second, third, other))


def test_an_address_at_its_limit_loses_a_connection_of_its_own():
    with pairs(4) as (stranger, own, second, third):
        places = Places(total=9, of_address=2)
        assert all(places.enter(c, a) for c, a in [(stranger, "b"), (own, "a"), (second, "a"), (third, "a")])
        assert [is_cut(c) for c in (stranger, own, second, third)] == [False, True, False, False]


# Requests that cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00",
        b"\r\n",
        b"GET\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/x\r\n\r\n",
        b"GET / HTTP/1_0.1\r\n\r\n",
        b"GET / a HTTP/1.1\r\n\r\n",
        b"GET /v1/models?a=\x01 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models?a=\x7f HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models?a=\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET\x0b/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
        MODELS + b"Host: localhost\r\n\r\n",
        MODELS + b"host: evil.example\r\n\r\n",
        MODELS + b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n",
        MODELS + b"Content-Length: 0\r\nContent-Length: 9\r\n\r\n",
        MODELS + b"no field\r\nX: 1\r\n\r\n",
        MODELS + b"Content-Length : 9\r\n\r\n",
        MODELS + b": nothing\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n Host: localhost\r\n\r\n",
    ],
)
def test_a_request_that_cannot_be_read_is_a_400(request_bytes, front, upstream):
    head, _, body = raw(front, request_bytes).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert error_of(body)["type"] == "invalid_request_error"
    assert upstream.seen == []


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", 414),
        (MODELS + b"X: " + b"a" * 70000 + b"\r\n\r\n", 431),
        (MODELS + b"".join(b"X%d: 1\r\n" % i for i in range(200)) + b"\r\n", 431),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
    ],
)
def test_other_faults_of_a_head_have_their_status(request_bytes, status, front):
    head, _, body = raw(front, request_bytes).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert error_of(body)["type"] in ("invalid_request_error", "server_error")


def test_every_answer_to_a_changed_request_has_a_status_line(front):
    draw = random.Random(7)
    whole = MODELS + b"Connection: close\r\n\r\n"
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(changed))
            changed[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        answer = raw(front, bytes(changed))
        assert answer.startswith(b"HTTP/1.1 "), bytes(changed)
        assert int(answer.split()[1]) in (200, 400, 403, 404, 405, 431, 505), bytes(changed)
