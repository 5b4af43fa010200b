# SPDX-License-Identifier: Apache-2.0
"""The door to an engine: a small HTTP server that shows the chat page and passes OpenAI's interface through.

    GET /          the chat page (one file, no outside requests)
    GET /health    {"status": "ok"} while the engine lives, else 503 (also while the model is being loaded)
    /v1/..         to the engine; a streamed answer goes on piece by piece

It binds the loopback address unless told otherwise.  There the `Host` of a request must be this machine (a page of
a stranger whose name is re-pointed to 127.0.0.1 is refused), and off it a token is asked for, compared in constant
time.  A request that says it comes from another page (`Origin`) is refused everywhere, bodies are limited and are
JSON, and there is no CORS header, no directory and no file to be had.  Errors have OpenAI's form:
{"error": {"message", "type", "param", "code"}}, those of the engine too.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import http.client
import io
import ipaddress
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any, Final

from fleetune.deploy.serving.openai_client import SECONDS, Address
from fleetune.errors import UsageError

log = logging.getLogger(__name__)

PATHS: Final = ("models", "chat/completions", "completions", "embeddings", "responses")  # under /v1/
MAX_BODY: Final = 4 << 20
MAX_CONNECTIONS: Final = 64
IDLE_SECONDS: Final = 60.0  # a client that sends or takes nothing for so long is dropped
REQUEST_SECONDS: Final = 180.0  # and one whose whole request is not here by then
CHUNK: Final = 1 << 16


class Front(ThreadingHTTPServer):
    """The server; `serve_forever` runs it.  `token` "" asks for none.  It says "loading" until `attach`."""

    daemon_threads = True

    def __init__(self, host: str, port: int, token: str) -> None:
        """Bind; UsageError when the address cannot be had, or is no loopback address and there is no token."""
        self.token = token
        self.engine: Address | None = None
        self.alive: Callable[[], bool] = lambda: False
        self.loopback = is_loopback(host)
        if not self.loopback and not token:
            raise UsageError(f"{host} is open to others, so it needs a token", hint="give one with --token")
        self.page = resources.files("fleetune.deploy.serving").joinpath("chat.html").read_bytes()
        self.policy = content_policy(self.page.decode())
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise _no_place(host, port, error) from error

    def attach(self, engine: Address, alive: Callable[[], bool]) -> None:
        """Pass requests on to `engine` from now on; `alive` says whether it lives."""
        self.alive, self.engine = alive, engine

    @property
    def url(self) -> str:
        """Where it is found, as far as this machine knows."""
        host = str(self.server_address[0])
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection, unless there are too many."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread is to be had: the caller closes the connection
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a connection in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""
        log.debug("connection of %s", client_address, exc_info=True)

    def server_bind(self) -> None:
        """Bind without asking a name server who we are."""
        # HTTPServer looks its own name up here, which takes seconds on a machine without a network.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound to `host`."""
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def content_policy(page: str) -> str:
    """The Content-Security-Policy under which a page's own inline script and style run, and nothing else."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(b.encode()).digest()).decode() for b in blocks)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {hashes('script')};"
        f" style-src {hashes('style')}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _no_place(host: str, port: int, error: Exception) -> UsageError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return UsageError(f"port {port} is in use", hint="choose another, or --port 0 for any free one")
    if isinstance(error, OverflowError):
        return UsageError(f"there is no port {port}", hint="ports go from 0 (any free one) to 65535")
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return UsageError(f"cannot listen on {host}:{port}: {reason}", hint="see --host and --port")


class _Refusal(Exception):
    """An answer that is an error: HTTP status, OpenAI's type and code, and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message

    def body(self) -> dict[str, object]:
        kind = {401: "authentication_error", 403: "permission_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class _Reader(io.RawIOBase):
    """What a client sends, up to the time `end`: a byte now and then does not keep a place."""

    def __init__(self, connection: socket.socket, idle: float) -> None:
        self.connection, self.idle, self.end = connection, idle, 0.0

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes; TimeoutError when none come for `idle` seconds, or it is `end`."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request takes too long")
        self.connection.settimeout(min(self.idle, left))
        try:
            return self.connection.recv_into(buffer)
        finally:
            self.connection.settimeout(self.idle)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Front
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS

    def setup(self) -> None:
        """Read what comes with a time by which it must be here."""
        super().setup()
        self.rfile.close()
        self._reader = _Reader(self.connection, self.timeout)
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        """Take a request; its time runs from now, waiting for its first byte among it."""
        self._reader.end = time.monotonic() + REQUEST_SECONDS
        super().handle_one_request()

    def do_GET(self) -> None:
        """The page, the health, or something of the engine's."""
        self._answer(b"")

    def do_POST(self) -> None:
        """Something for the engine."""
        self._answer(None)

    def _answer(self, body: bytes | None) -> None:
        try:
            self._check_origin()
            if body is not None and (
                self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers
            ):
                # left unread it would be taken for the next request of a connection that a proxy shares
                raise _Refusal(400, "unexpected_body", f"a {self.command} has no body")
            path = self.path.partition("?")[0]
            if body is not None and path == "/":
                self._reply(200, "text/html; charset=utf-8", self.server.page)
            elif body is not None and path == "/health":
                self._health()
            elif path.removeprefix("/v1/") in PATHS and path.startswith("/v1/"):
                self._check_token()
                self._forward(self._body() if body is None else body)
            else:
                raise _Refusal(404, "not_found", f"there is nothing at {path}")
        except _Refusal as refusal:
            self.close_connection = True  # a body may be left unread
            self._json(refusal.status, refusal.body())

    def _health(self) -> None:
        up = self.server.alive()
        state = "ok" if up else "loading" if self.server.engine is None else "the engine has ended"
        self._json(200 if up else 503, {"status": state})

    def _check_origin(self) -> None:
        host = self.headers.get("Host", "")
        name = re.sub(r":\d+$", "", host)
        if self.server.loopback and not is_loopback(name.strip("[]").lower()):
            raise _Refusal(403, "wrong_host", f"this server is not '{host}': use its loopback address")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise _Refusal(403, "wrong_origin", "requests from other pages are refused")

    def _check_token(self) -> None:
        given = self.headers.get("Authorization", "").encode()
        if self.server.token and not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            raise _Refusal(401, "invalid_api_key", "the token is missing or wrong")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not length:
            raise _Refusal(411, "length_required", "a request needs a Content-Length")
        if not re.fullmatch(r"[0-9]{1,12}", length) or len(self.headers.get_all("Content-Length", [])) > 1:
            raise _Refusal(400, "bad_length", "the Content-Length is no number")
        if int(length) > MAX_BODY:
            raise _Refusal(413, "too_large", f"a request has at most {MAX_BODY} bytes, this one {length}")
        if self.headers.get_content_type() != "application/json":
            raise _Refusal(415, "not_json", "a request is JSON: send Content-Type: application/json")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise _Refusal(408, "timeout", "the request did not come") from None
        if len(body) < int(length):
            raise _Refusal(400, "cut_short", "the request ended early")
        return body

    def _forward(self, body: bytes) -> None:
        """Pass a request on, and its answer back as it comes."""
        engine = self.server.engine
        if engine is None:
            raise _Refusal(503, "loading", "the model is being loaded")
        connection = http.client.HTTPConnection(engine.host, engine.port, timeout=SECONDS)
        try:
            headers = engine.headers() | ({"Content-Type": "application/json"} if body else {})
            try:
                connection.request(self.command, self.path, body or None, headers)
                response = connection.getresponse()
            except TimeoutError:
                raise _Refusal(504, "engine_timeout", f"no answer within {SECONDS:.0f} s") from None
            except (OSError, http.client.HTTPException) as error:
                raise _Refusal(502, "engine_down", f"the engine does not answer: {error!r}") from None
            self._pass(response)
        finally:
            connection.close()

    def _pass(self, response: http.client.HTTPResponse) -> None:
        kind = response.headers.get("Content-Type", "application/json")
        if not kind.startswith("text/event-stream"):
            try:
                whole = response.read()
            except (OSError, http.client.HTTPException) as error:
                raise _Refusal(502, "engine_down", f"the engine's answer broke off: {error!r}") from None
            if response.status >= 400:
                self._json(response.status, _error(response.status, whole))
                return
            self._reply(response.status, kind, whole)
            return
        self._head(response.status, kind, None)
        for piece in _stream(response):
            self._chunk(piece)
        self._chunk(b"")

    def _chunk(self, piece: bytes) -> None:
        """A piece of an answer of unknown length; b"" ends it."""
        if self.request_version == "HTTP/1.1":
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        self.wfile.write(piece)

    def _json(self, status: int, value: object) -> None:
        self._reply(status, "application/json", json.dumps(value).encode())

    def _reply(self, status: int, kind: str, body: bytes) -> None:
        self._head(status, kind, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, kind: str, length: int | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        elif self.request_version == "HTTP/1.1":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        if self.close_connection:
            self.send_header("Connection", "close")
        if status == 405:
            self.send_header("Allow", "GET, POST")
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself (a method, a damaged request), in the same form."""
        self.close_connection = True
        refusal = _Refusal(int(code), "bad_request", message or "the request cannot be read")
        if code == HTTPStatus.NOT_IMPLEMENTED:  # what it says where there is no do_DELETE
            refusal = _Refusal(
                405, "method_not_allowed", f"there is no {self.command} here, GET and POST alone"
            )
        self._json(refusal.status, refusal.body())

    def version_string(self) -> str:
        """Who we are, without versions."""
        return "fleetune"

    def log_message(self, format: str, *args: object) -> None:
        """To the log, not to the terminal."""
        log.debug("%s " + format, self.client_address[0], *args)


def _error(status: int, whole: bytes) -> dict[str, object]:
    """An engine's error in OpenAI's form: what it says of the four fields, and more of its own, stays."""
    try:
        found = json.loads(whole)
    except ValueError:
        found = None
    found = found if isinstance(found, dict) else {}
    given = found.get("error", found.get("detail"))
    text = (
        given
        if isinstance(given, str)
        else "the engine says: " + whole[:500].decode(errors="replace").strip()
    )
    fields: Any = _Refusal(status, "engine_error", text).body()["error"]
    return {"error": fields | given if isinstance(given, dict) else fields}


def _stream(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The pieces of an answer as they come; an event that tells the error where the engine breaks off."""
    try:
        while piece := response.read1(CHUNK):
            yield piece
    except (OSError, http.client.HTTPException) as error:
        refusal = _Refusal(502, "engine_down", f"the engine's answer broke off: {error!r}")
        yield b"data: %b\n\n" % json.dumps(refusal.body()).encode()
