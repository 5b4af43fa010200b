# SPDX-License-Identifier: Apache-2.0
"""Serve the chat page and OpenAI's HTTP interface in front of an engine.

    GET /          the chat page (one file, no outside requests)
    GET /health    {"status": "ok"} while the engine lives, else 503 (also while the model is being loaded)
    /v1/..         to the engine (`proxy.py`); a streamed answer goes on piece by piece

The server binds the loopback address by default; any other address needs a token.  Every request is checked first
(`request_checks.py`).  There is no CORS header, so no other page can read an answer.  Errors have OpenAI's form, those
of the engine too.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import logging
import re
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any, Final

from fleetune.deploy.serving import proxy
from fleetune.deploy.serving import request_checks as checks
from fleetune.deploy.serving.openai_client import Address
from fleetune.deploy.serving.places import Places, Stage
from fleetune.deploy.serving.request_checks import DeadlineReader, Refusal, is_loopback
from fleetune.errors import UsageError

log = logging.getLogger(__name__)

HEAD_SECONDS: Final = 10.0  # a client whose request's head is not here by then is dropped, an idle one too
IDLE_SECONDS: Final = 60.0  # and one that sends or takes nothing for so long
REQUEST_SECONDS: Final = 180.0  # and one whose whole request is not here by then


class Front(ThreadingHTTPServer):
    """The HTTP server; `serve_forever` runs it.  It answers "loading" until `attach` gives it an engine."""

    daemon_threads = True
    request_queue_size = 128  # connections that the system holds until they are accepted

    def __init__(self, host: str, port: int, token: str) -> None:
        """Bind; `token` "" asks for none.  UsageError when the address is taken, or is no loopback address without a token."""
        self.token = token
        self.engine: Address | None = None
        self.alive: Callable[[], bool] = lambda: False
        self.loopback = is_loopback(host)
        if not self.loopback and not token:
            raise UsageError(f"{host} is open to others, so it needs a token", hint="give one with --token")
        self.page = resources.files("fleetune.deploy.serving").joinpath("chat.html").read_bytes()
        self.policy = content_policy(self.page.decode())
        self.places = Places()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise _no_place(host, port, error) from error

    def attach(self, engine: Address, alive: Callable[[], bool]) -> None:
        """Pass requests to `engine` from now on; `alive` says whether it lives."""
        self.alive, self.engine = alive, engine

    @property
    def url(self) -> str:
        """The address for a browser, as far as this machine knows it."""
        host = str(self.server_address[0])
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Accept a connection, unless all places are held by requests at the engine."""
        if not self.places.enter(request, client_address[0]):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread is to be had: the caller closes the connection
            self.places.leave(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a connection in its own thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.leave(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what breaks a connection: mostly a client that went away."""
        log.debug("connection of %s", client_address, exc_info=True)

    def server_bind(self) -> None:
        """Bind without looking up the machine's own name."""
        # HTTPServer looks its own name up here, which takes seconds on a machine without a network.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


def content_policy(page: str) -> str:
    """Return the Content-Security-Policy that allows a page's own inline script and style, and nothing else."""

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


class _Handler(BaseHTTPRequestHandler):
    """One connection: checks each request, answers it or passes it on."""

    server: Front
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # of a request that cannot be read: its answer has a status line too
    timeout = IDLE_SECONDS
    raw_requestline: bytes  # the first line, as it came

    def setup(self) -> None:
        """Read requests through a reader with a deadline."""
        super().setup()
        self.rfile.close()
        self._reader = DeadlineReader(self.connection, self.timeout)
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        """Handle a request; its time runs from now, the wait for its first byte included."""
        self.server.places.move(self.connection, Stage.HEAD)
        self._began = time.monotonic()
        self._reader.end = self._began + HEAD_SECONDS
        super().handle_one_request()

    def parse_request(self) -> bool:
        """Read the head; False when it was refused.  What follows it has more time."""
        self.command, self.requestline, self.request_version = "", "", self.default_request_version
        try:
            checks.check_request_line(self.raw_requestline)
            if not super().parse_request():
                return False
            checks.check_fields(self.headers)
        except Refusal as refusal:
            self._refuse(refusal)
            return False
        self._reader.end = self._began + REQUEST_SECONDS
        self.server.places.move(self.connection, Stage.BODY)
        return True

    def do_GET(self) -> None:
        """Answer with the page, the health, or what the engine says."""
        self._answer(has_body=False)

    def do_POST(self) -> None:
        """Pass a request to the engine."""
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        path = self.path.partition("?")[0]
        try:
            checks.check_host(self.headers, loopback=self.server.loopback)
            checks.check_origin(self.headers)
            if not has_body:
                checks.check_no_body(self.headers, self.command)
            if not has_body and path == "/":
                self._reply(200, "text/html; charset=utf-8", self.server.page)
            elif not has_body and path == "/health":
                self._health()
            else:
                checks.check_path(path)
                checks.check_token(self.headers, self.server.token)
                self._forward(checks.read_body(self.headers, self.rfile) if has_body else b"")
        except Refusal as refusal:
            self._refuse(refusal)

    def _health(self) -> None:
        up = self.server.alive()
        state = "ok" if up else "loading" if self.server.engine is None else "the engine has ended"
        self._json(200 if up else 503, {"status": state})

    def _forward(self, body: bytes) -> None:
        """Pass a request on, and its answer back: as it comes where it is a stream."""
        self.server.places.move(self.connection, Stage.ENGINE)
        with proxy.answered(self.server.engine, self.command, self.path, body) as response:
            kind = response.headers.get("Content-Type", "application/json")
            if not kind.startswith("text/event-stream"):
                answer = proxy.whole(response)
                kind = "application/json" if response.status >= 400 else kind
                self._reply(response.status, kind, answer)
                return
            self._head(response.status, kind, None)
            for piece in proxy.streamed(response):
                self._chunk(piece)
            self._chunk(b"")

    def _refuse(self, refusal: Refusal) -> None:
        self.close_connection = True  # a body may be left unread
        self._json(refusal.status, refusal.body())

    def _chunk(self, piece: bytes) -> None:
        """Write a piece of an answer of unknown length; b"" ends it."""
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
        """Answer in the same form where the standard library refuses (a method, a damaged request)."""
        refusal = Refusal(int(code), "bad_request", message or "the request cannot be read")
        if code == HTTPStatus.NOT_IMPLEMENTED:  # what it says where there is no do_DELETE
            refusal = Refusal(
                405, "method_not_allowed", f"there is no {self.command} here, GET and POST alone"
            )
        self._refuse(refusal)

    def version_string(self) -> str:
        """Return the server's name, without a version."""
        return "fleetune"

    def log_message(self, format: str, *args: object) -> None:
        """Write to the log, not to the terminal."""
        log.debug("%s " + format, self.client_address[0], *args)
