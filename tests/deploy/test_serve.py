# SPDX-License-Identifier: Apache-2.0
"""The door before an engine: what goes through it, what does not, and what is told when the engine breaks."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import re
import socket
import threading
import time
from contextlib import suppress

import pytest
from serve_harness import KEY, ask, door, error_of, raw, running

from fleetune.deploy.serving import front as serve
from fleetune.deploy.serving import places, proxy, request_checks
from fleetune.deploy.serving.engine_site import EngineSite
from fleetune.deploy.serving.front import Front
from fleetune.deploy.serving.openai_client import Address
from fleetune.deploy.serving.request_checks import MAX_BODY
from fleetune.errors import UsageError

CHAT = "/v1/chat/completions"
QUESTION = json.dumps({"messages": [{"role": "user", "content": "Capital of France?"}]}).encode()
STREAM = json.dumps({"messages": [{"role": "user", "content": "Capital?"}], "stream": True}).encode()


# What goes through ------------------------------------------------------------------------------------


def test_a_question_and_its_answer_go_through_as_they_are(front, upstream):
    status, headers, body = ask(
        front, "POST", CHAT + "?a=1", QUESTION, Authorization="Bearer mine", X_Other="x"
    )
    assert status == 200
    assert json.loads(body)["choices"][0]["message"]["content"] == "Paris."
    assert headers["Content-Type"] == "application/json"
    method, path, seen, sent = upstream.seen[-1]
    assert (method, path, sent) == ("POST", CHAT + "?a=1", QUESTION)
    assert seen["Authorization"] == f"Bearer {KEY}"  # the engine's own key; the client's goes no further
    assert "X-Other" not in seen


def test_models_are_listed_through_it(front):
    status, _, body = ask(front, "GET", "/v1/models")
    assert (status, json.loads(body)["data"][0]["id"]) == (200, "tiny.gguf")


def test_a_streamed_piece_arrives_before_the_next_is_made(front, upstream):
    upstream.go.clear()
    connection = http.client.HTTPConnection("127.0.0.1", front.server_port, timeout=10)
    connection.request("POST", CHAT, STREAM, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "text/event-stream"
    first = response.readline()
    assert json.loads(first[5:])["choices"][0]["delta"]["content"] == "Par"
    assert not upstream.go.is_set()  # nothing after it has left the engine yet
    upstream.go.set()
    rest = response.read()
    connection.close()
    assert rest.count(b"data: ") == 4
    assert rest.endswith(b"data: [DONE]\n\n")


def test_a_client_that_goes_away_ends_the_request_to_the_engine(front, upstream):
    upstream.answer = ["x"] * 100_000
    connection = http.client.HTTPConnection("127.0.0.1", front.server_port, timeout=10)
    connection.request("POST", CHAT, STREAM, {"Content-Type": "application/json"})
    connection.getresponse().read(50)
    connection.sock.close()  # type: ignore[union-attr]
    connection.close()
    assert upstream.gone.wait(20)


def test_a_client_that_goes_away_before_its_answer_frees_the_engine(front, upstream):
    upstream.mode = "wait"
    upstream.go.clear()
    connection = http.client.HTTPConnection("127.0.0.1", front.server_port, timeout=10)
    connection.request("POST", CHAT, QUESTION, {"Content-Type": "application/json"})
    assert not upstream.gone.wait(0.3)
    connection.close()
    assert upstream.gone.wait(20)


def test_a_next_request_before_the_answer_is_no_leaving(front, upstream):
    upstream.mode = "wait"
    upstream.go.clear()
    head = (
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", front.server_port), timeout=10) as client:
        request = head % (CHAT.encode(), len(QUESTION)) + QUESTION
        client.sendall(request)
        assert not upstream.gone.wait(0.3)
        client.sendall(request)
        assert not upstream.gone.wait(0.3)
        upstream.go.set()
        found = b""
        while found.count(b"Paris.") < 2:
            piece = client.recv(1 << 16)
            assert piece, found
            found += piece


def test_what_the_engine_cannot_parse_is_the_requests_fault(front, upstream):
    upstream.mode = "tools"
    status, _, body = ask(front, "POST", CHAT, QUESTION)
    assert status == 400
    assert error_of(body) == {
        "message": "Failed to parse tools: 5", "type": "invalid_request_error", "param": None, "code": "bad_request"
    }  # fmt: skip


def test_a_stream_for_http_1_0_ends_with_the_connection(front):
    head = f"POST {CHAT} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(STREAM), STREAM)
    answer = raw(front, request, ends=False)
    headers, _, body = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in headers
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


def test_an_error_of_the_engine_is_passed_on(front, upstream):
    upstream.mode = "refuse"
    status, _, body = ask(front, "POST", CHAT, QUESTION)
    error = error_of(body)  # the engine's own has no "param"
    assert (status, error["message"]) == (400, "the context is full")
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, 400)


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (b'{"detail": "no such model"}', "no such model"),
        (b'{"error": "no such model"}', "no such model"),
        (b"[1]", "the engine says: [1]"),
        (b'{"error": {"type": "odd"}}', 'the engine says: {"error": {"type": "odd"}}'),
    ],
)
def test_errors_of_other_forms_get_all_four_fields(whole, message):
    error = error_of(json.dumps(proxy.error_body(404, whole)).encode())
    assert (error["message"], error["param"], error["code"]) == (message, None, "engine_error")


def test_an_error_page_of_the_engine_gets_openais_form(front, upstream):
    upstream.mode = "plain"
    status, _, body = ask(front, "POST", CHAT, QUESTION)
    assert status == 500
    assert "Internal Server Error" in error_of(body)["message"]


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1/", "/v1/audio/transcriptions", "/v1/../slots", "/slots", "/x/v1/models"]
)
def test_other_paths_are_not_to_be_had(path, front, upstream):
    status, _, body = ask(front, "GET", path)
    assert (status, error_of(body)["code"]) == (404, "not_found")
    assert upstream.seen == []


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "TRACE"])
def test_other_methods_are_refused_in_openais_form(method, front, upstream):
    status, headers, body = ask(front, method, CHAT)
    assert (status, headers["Allow"]) == (405, "GET, POST")
    assert (error_of(body)["type"], error_of(body)["code"]) == ("invalid_request_error", "method_not_allowed")
    assert upstream.seen == []
    assert not any(name.lower().startswith("access-control") for name in headers)


# The page ---------------------------------------------------------------------------------------------


def test_the_page_runs_its_own_script_and_style_alone(front):
    status, headers, body = ask(front, "GET", "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    text = body.decode()
    assert not re.search(r"\son\w+=|\sstyle=|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert set(re.findall(r"https?://[^'\"\s]+", text)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, no request


# Who may ask ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer secretx",
        "Bearer secre",
        "secret",
        "Basic secret",
        "bearer secret",
    ],
)
def test_without_the_token_nothing_reaches_the_engine(given, upstream, monkeypatch):
    monkeypatch.setattr(serve, "GUESS", 0.0)
    with door(upstream, "secret") as front:
        for method, path, body in (("POST", CHAT, QUESTION), ("GET", "/v1/models", None)):
            headers = {"Authorization": given} if given else {}
            status, answer, raw_body = ask(front, method, path, body, **headers)
            assert (status, answer["WWW-Authenticate"]) == (401, "Bearer")
            assert error_of(raw_body)["code"] == "invalid_api_key"
    assert upstream.seen == []


def test_with_the_token_it_answers_and_page_and_health_need_none(upstream):
    with door(upstream, "secret") as front:
        assert ask(front, "POST", CHAT, QUESTION, Authorization="Bearer secret")[0] == 200
        assert ask(front, "GET", "/")[0] == 200
        assert ask(front, "GET", "/health")[0] == 200


def test_a_token_is_compared_in_constant_time(upstream, monkeypatch):
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(request_checks, "hmac", type("hmac", (), {"compare_digest": staticmethod(compare)}))
    with door(upstream, "secret") as front:
        assert ask(front, "GET", "/v1/models", Authorization="Bearer wrong")[0] == 401
    assert compared == [(b"Bearer wrong", b"Bearer secret")]


def test_after_a_wrong_token_its_address_waits_and_no_other(upstream, monkeypatch):
    monkeypatch.setattr(serve, "GUESS", 1.0)
    with door(upstream, "secret") as front:

        def seconds(token: str, source: str = "127.0.0.1") -> float:
            began = time.monotonic()
            head = f"Authorization: Bearer {token}\r\n" if token else ""
            with socket.create_connection(front.server_address[:2], 10, (source, 0)) as opened:
                opened.sendall(f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode())
                assert opened.recv(12) == (b"HTTP/1.1 200" if token == "secret" else b"HTTP/1.1 401")
            return time.monotonic() - began

        assert max(seconds(""), seconds("secret"), seconds("wrong")) < 0.7
        assert seconds("secret", "127.0.0.2") < 0.7
        assert seconds("secret") > 0.3  # right or wrong
        seconds("wrong")
        assert seconds("wrong") > 0.9
        assert seconds("wrong", "127.0.0.2") < 0.7
        began = time.monotonic()
        at_once = [threading.Thread(target=seconds, args=("wrong", "127.0.0.3")) for _ in range(3)]
        for guess in at_once:
            guess.start()
        for guess in at_once:
            guess.join()
        assert time.monotonic() - began > 1.9  # one after another
        monkeypatch.setattr(serve, "ADDRESSES", 1)
        seconds("wrong", "127.0.0.4")
        assert list(front.guessed) == ["127.0.0.4"]


def test_a_short_token_is_for_this_machine_alone():
    assert serve.token_for("127.0.0.1", "x") == ("x", False)
    assert serve.token_for("0.0.0.0", "x" * 16) == ("x" * 16, False)
    with pytest.raises(
        UsageError, match="the token has 15 characters, and others can guess at it: 16 at least"
    ):
        serve.token_for("0.0.0.0", "x" * 15)


def test_a_token_beyond_ascii_is_only_wrong(upstream):
    with door(upstream, "secret") as front:
        assert raw(
            front,
            "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sécret\r\n\r\n".encode(),
        ).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "",
        "localhost.evil",
        "[fe80::1]",
    ],
)
def test_a_name_that_was_pointed_here_is_refused(host, front, upstream):
    for path in ("/", "/health", "/v1/models"):
        status, _, body = ask(front, "GET", path, Host=host)
        assert (status, error_of(body)["code"]) == (403, "wrong_host")
    assert upstream.seen == []


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:1234", "127.9.9.9", "[::1]:8080", "[::1]"]
)
def test_the_names_of_this_machine_are_taken(host, front):
    assert ask(front, "GET", "/v1/models", Host=host)[0] == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "file://"]
)
def test_requests_of_other_pages_are_refused(origin, front, upstream):
    status, _, body = ask(front, "POST", CHAT, QUESTION, Host="127.0.0.1:8080", Origin=origin)
    assert (status, error_of(body)["code"]) == (403, "wrong_origin")
    assert upstream.seen == []


def test_requests_of_its_own_page_are_taken_also_behind_tls(front):
    for origin in ("http://127.0.0.1:8080", "https://127.0.0.1:8080"):
        assert ask(front, "POST", CHAT, QUESTION, Host="127.0.0.1:8080", Origin=origin)[0] == 200


def test_off_loopback_there_must_be_a_token_and_any_host_will_do(upstream):
    with pytest.raises(UsageError, match="token"):
        Front("0.0.0.0", 0, "", EngineSite())
    with door(upstream, "secret", "0.0.0.0") as front:
        assert not front.loopback
        assert socket.gethostname() in front.url
        assert ask(front, "GET", "/v1/models", Host="box.lan", Authorization="Bearer secret")[0] == 200
        assert ask(front, "GET", "/v1/models", Host="box.lan")[0] == 401


@pytest.mark.parametrize(("host", "own"), [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("example.org", False)])  # fmt: skip
def test_which_addresses_are_this_machine(host, own):
    assert request_checks.is_loopback(host) is own


# Bodies -----------------------------------------------------------------------------------------------


def _post(front: Front, headers: str, body: bytes = b"") -> tuple[int, str]:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}\r\n\r\n"
    answer = raw(front, head.encode() + body)
    return int(answer.split()[1]), error_of(answer.partition(b"\r\n\r\n")[2])["code"]


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        ("X: 1", b"", 411, "length_required"),
        ("Transfer-Encoding: chunked", b"1\r\n{\r\n0\r\n\r\n", 411, "length_required"),
        ("Transfer-Encoding: chunked\r\nContent-Length: 2", b"{}", 411, "length_required"),
        ("Content-Length: -1", b"", 400, "bad_length"),
        ("Content-Length: 1e3", b"", 400, "bad_length"),
        ("Content-Length: 2\r\nContent-Length: 3", b"{} ", 400, "repeated_header"),
        (f"Content-Length: {MAX_BODY + 1}", b"", 413, "too_large"),
        ("Content-Length: 99999999999", b"", 413, "too_large"),
        ("Content-Length: 9", b"{}", 400, "cut_short"),
    ],
)
def test_bodies_that_are_refused(headers, body, status, code, front, upstream):
    assert _post(front, headers, body) == (status, code)
    assert upstream.seen == []


@pytest.mark.parametrize("header", ["Content-Length: %d", "Transfer-Encoding: chunked\r\nX: %d"])
@pytest.mark.parametrize("path", ["/", "/health", "/v1/models"])
def test_a_body_where_none_belongs_is_not_taken_for_the_next_request(path, header, front, upstream):
    inner = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    smuggled = inner.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(QUESTION), QUESTION)
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{header % len(smuggled)}\r\n\r\n"
    answer = raw(front, head.encode() + smuggled)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert upstream.seen == []
    assert ask(front, "GET", path, Content_Length="0")[0] == 200


def test_a_body_of_the_largest_size_goes_through(front, upstream):
    body = QUESTION + b" " * (MAX_BODY - len(QUESTION))
    assert ask(front, "POST", CHAT, body)[0] == 200
    assert len(upstream.seen[-1][3]) == MAX_BODY


def test_a_body_that_a_form_could_send_is_refused(front, upstream):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        status, _, body = ask(front, "POST", CHAT, QUESTION, Content_Type=kind)
        assert (status, error_of(body)["code"]) == (415, "not_json")
        assert "Content-Type: application/json" in error_of(body)["message"]
    assert upstream.seen == []


def test_a_body_that_does_not_come_is_not_waited_for(front, monkeypatch):
    monkeypatch.setattr(serve.Exchange, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", front.server_port), timeout=20) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\n".encode()
        )
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("part", ["line", "headers", "body"])
def test_a_request_that_trickles_in_does_not_keep_its_place(part, front, upstream, monkeypatch):
    monkeypatch.setattr(serve, "REQUEST_SECONDS" if part == "body" else "HEAD_SECONDS", 0.5)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
    sent = {"line": "", "headers": head[:-4] + "\r\nX: ", "body": head}[part]
    with socket.create_connection(("127.0.0.1", front.server_port), timeout=0.05) as connection:
        connection.sendall(sent.encode())
        began = time.monotonic()
        answer = None
        while answer is None and time.monotonic() - began < 10:
            with suppress(TimeoutError, ConnectionError):
                connection.sendall(b" ")
            with suppress(TimeoutError):
                answer = connection.recv(1 << 16)
    assert answer is not None
    assert 0.4 < time.monotonic() - began < 5
    assert answer.startswith(b"HTTP/1.1 408") if part == "body" else answer == b""
    assert upstream.seen == []


def test_a_late_request_leaves_the_answer_its_time():
    here, there = socket.socketpair()
    with here, there:
        reader = request_checks.DeadlineReader(here, 60.0)
        reader.end = time.monotonic() + 1
        there.sendall(b"late")
        assert reader.readinto(bytearray(9)) == 4
        assert here.gettimeout() == 60.0


def test_an_answer_may_take_longer_than_its_request(front, upstream, monkeypatch):
    monkeypatch.setattr(serve, "REQUEST_SECONDS", 0.3)
    upstream.go.clear()
    threading.Timer(0.6, upstream.go.set).start()
    body = json.dumps({**json.loads(QUESTION), "stream": True}).encode()
    status, _, answer = ask(front, "POST", CHAT, body)
    assert (status, answer.count(b"data: ")) == (200, 5)


# Too many, and broken ---------------------------------------------------------------------------------


def test_a_connection_for_which_there_is_no_thread_gives_its_place_back(upstream, monkeypatch):
    monkeypatch.setattr(serve, "Places", lambda: places.Places(total=1))
    start, failed = threading.Thread.start, []

    def none_left(thread):
        if not failed and thread._target == front.process_request_thread:
            failed.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    with door(upstream) as front:
        monkeypatch.setattr(threading.Thread, "start", none_left)
        with socket.create_connection(("127.0.0.1", front.server_port), timeout=20) as connection:
            assert connection.recv(10) == b""
        assert ask(front, "GET", "/health")[0] == 200
    assert failed


def test_an_engine_that_dies_before_its_answer_is_a_502(front, upstream):
    upstream.mode = "fall"
    status, _, body = ask(front, "POST", CHAT, QUESTION)
    assert (status, error_of(body)["code"], error_of(body)["type"]) == (502, "engine_down", "server_error")


def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error_event(front, upstream):
    upstream.mode = "die"
    status, _, body = ask(front, "POST", CHAT, STREAM)
    first, last = [json.loads(line[5:]) for line in body.splitlines() if line]
    assert (status, first["choices"][0]["delta"]["content"]) == (200, "Par")
    assert last["error"]["code"] == "engine_down"


def test_no_engine_at_the_port_is_a_502(upstream):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        front = Front("127.0.0.1", 0, "", EngineSite())
        front.site.attach(Address("127.0.0.1", taken.getsockname()[1], KEY), lambda: False)
        with running(front):
            assert ask(front, "POST", CHAT, QUESTION)[0] == 502
            status, _, body = ask(front, "GET", "/health")
            assert (status, json.loads(body)["status"]) == (503, "the engine has ended")
    upstream.server_close()


def test_an_engine_that_says_nothing_is_a_504(front, upstream, monkeypatch):
    monkeypatch.setattr(proxy, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        front.site.attach(Address("127.0.0.1", mute.getsockname()[1], KEY), lambda: True)
        status, _, body = ask(front, "POST", CHAT, QUESTION)
    assert (status, error_of(body)["code"]) == (504, "engine_timeout")


def test_until_the_engine_is_ready_it_says_loading(upstream):
    front = Front("127.0.0.1", 0, "", EngineSite())
    with running(front), running(upstream):
        status, _, body = ask(front, "POST", CHAT, QUESTION)
        assert (status, error_of(body)["code"]) == (503, "loading")
        assert json.loads(ask(front, "GET", "/health")[2]) == {"status": "loading"}
        front.site.attach(upstream.address, lambda: True)
        assert ask(front, "POST", CHAT, QUESTION)[0] == 200
        assert json.loads(ask(front, "GET", "/health")[2]) == {"status": "ok"}


def test_a_port_in_use_or_out_of_range_is_said(front):
    with pytest.raises(UsageError, match=f"port {front.server_port} is in use"):
        Front("127.0.0.1", front.server_port, "", EngineSite())
    with pytest.raises(UsageError, match="no port 70000"):
        Front("127.0.0.1", 70000, "", EngineSite())
    with pytest.raises(UsageError, match="cannot listen"):
        Front("198.51.100.7", 0, "secret", EngineSite())


def test_garbage_gets_an_error_of_the_same_form(front):
    answer = raw(front, b"\x16\x03\x01nonsense\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert error_of(answer.partition(b"\r\n\r\n")[2])["type"] == "invalid_request_error"
