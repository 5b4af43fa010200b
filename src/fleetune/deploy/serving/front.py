# SPDX-License-Identifier: Apache-2.0
"""Serve a site over HTTP: check every request, limit slow clients and many connections, and let the site answer.

What is shown is a `Site`: the chat page with the engine behind it (`engine_site.py`), or a fleet's live page.

The server binds the loopback address by default; any other address needs a token.  Every request is checked first
(`request_checks.py`).  There is no CORS header, so no other page can read an answer.  Errors have OpenAI's form.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Protocol

from fleetune.deploy.serving import request_checks as checks
from fleetune.deploy.serving.places import Places, Stage
from fleetune.deploy.serving.request_checks import DeadlineReader, Refusal, is_loopback
from fleetune.errors import UsageError

log = logging.getLogger(__name__)

HEAD_SECONDS: Final = 10.0  # a client whose request's head is not here by then is dropped, an idle one too
IDLE_SECONDS: Final = 60.0  # and one that sends or takes nothing for so long
REQUEST_SECONDS: Final = 180.0  # and one whose whole request is not here by then
TOKEN: Final = "FLEETUNE_TOKEN"  # in the environment: the token that clients must present
SHORTEST: Final = 16  # characters of one that others than this machine may guess at
ADDRESSES: Final = 1024  # whose guesses are remembered
GUESS: Final = 1.0  # seconds after a wrong token in which its address gets no answer, right or wrong


class Guesses:
    """When the last wrong token of an address came; one is looked at at a time."""

    def __init__(self) -> None:
        self.lock, self.wrong = threading.Lock(), -GUESS


class Site(Protocol):
    """What a server shows."""

    methods: tuple[str, ...]  # of HTTP; any other is refused
    policy: str  # Content-Security-Policy of its page

    def answer(self, exchange: Exchange, path: str) -> None:
        """Answer a request for `path` (without its query) that has passed the checks of host and origin.

        Refusal for an error.  A site that has a secret calls `exchange.check_token` first.
        """
        ...


class Front(ThreadingHTTPServer):
    """The HTTP server of a site; `serve_forever` runs it."""

    daemon_threads = True
    request_queue_size = 128  # connections that the system holds until they are accepted

    def __init__(self, host: str, port: int, token: str, site: Site) -> None:
        """Bind; `token` "" asks for none.  UsageError when the address is taken, or is no loopback address without a token."""
        self.token, self.site = token, site
        self.loopback = is_loopback(host)
        if not self.loopback and not token:
            raise UsageError(f"{host} is open to others, so it needs a token", hint="give one with --token")
        self.places = Places()
        self.guessed: dict[str, Guesses] = {}  # by address, of late
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Exchange)
        except (OSError, OverflowError) as error:
            raise _no_place(host, port, error) from error

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

    def server_close(self) -> None:
        """Stop listening, and end the connections that are kept open for more requests."""
        super().server_close()
        self.places.cut_all()

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


@contextmanager
def listening(host: str, port: int, token: str, site: Site) -> Iterator[Front]:
    """Serve a site from a thread while the block runs; UsageError as `Front`."""
    front = Front("127.0.0.1" if host == "localhost" else host, port, token, site)
    threading.Thread(target=front.serve_forever, args=(0.1,), daemon=True).start()
    try:
        yield front
    finally:
        front.shutdown()
        front.server_close()


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


def token_for(host: str, given: str | None) -> tuple[str, bool]:
    """Return the token that a client must present, "" for none, and whether it was made here.

    It is the `given` one, or the environment's; off the loopback address one is made where there is neither.  UsageError
    for one that no header can hold.
    """
    token = given if given is not None else os.environ.get(TOKEN, "")
    if not token.isascii() or any(not 32 < ord(c) < 127 for c in token):
        raise UsageError("a token is of letters, digits and marks, without spaces", hint="leave it out")
    if given == "":
        raise UsageError("the token is empty", hint=f"leave it out, or set {TOKEN}")
    if 0 < len(token) < SHORTEST and not is_loopback(host):
        raise UsageError(
            f"the token has {len(token)} characters, and others can guess at it: {SHORTEST} at least",
            hint="leave it out: one is made",
        )
    if token or is_loopback(host):
        return token, False
    return secrets.token_urlsafe(24), True


def _no_place(host: str, port: int, error: Exception) -> UsageError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return UsageError(f"port {port} is in use", hint="choose another, or 0 for any free one")
    if isinstance(error, OverflowError):
        return UsageError(f"there is no port {port}", hint="ports go from 0 (any free one) to 65535")
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return UsageError(f"cannot listen on {host}:{port}: {reason}", hint="choose an address of this machine")


class Exchange(BaseHTTPRequestHandler):
    """One connection: checks each request and lets the site answer it, with the methods under "For sites"."""

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
        """Answer a request without a body."""
        self._answer(has_body=False)

    def do_POST(self) -> None:
        """Answer a request with a body."""
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        try:
            if self.command not in self.server.site.methods:
                raise self._no_method()
            checks.check_host(self.headers, loopback=self.server.loopback)
            checks.check_origin(self.headers)
            if not has_body:
                checks.check_no_body(self.headers, self.command)
            self.server.site.answer(self, self.path.partition("?")[0])
        except Refusal as refusal:
            self._refuse(refusal)

    # For sites ----------------------------------------------------------------------------------------

    def check_token(self) -> None:
        """Refuse a request without the server's token, where it has one.

        An address whose guess was wrong waits before its next one is looked at, and its guesses are looked at one by one.
        Other addresses do not wait.
        """
        if "Authorization" not in self.headers:
            return checks.check_token(self.headers, self.server.token)  # no guess
        if len(self.server.guessed) > ADDRESSES:
            self.server.guessed.clear()
        own = self.server.guessed.setdefault(str(self.client_address[0]), Guesses())
        with own.lock:
            time.sleep(max(0.0, own.wrong + GUESS - time.monotonic()))
            try:
                checks.check_token(self.headers, self.server.token)
            except Refusal:
                own.wrong = time.monotonic()
                raise

    def hold(self) -> None:
        """Keep this connection's place until it is answered, whoever else comes."""
        self.server.places.move(self.connection, Stage.ENGINE)

    def json(self, status: int, value: object) -> None:
        """Answer with JSON."""
        self.reply(status, "application/json", json.dumps(value).encode())

    def reply(self, status: int, kind: str, body: bytes) -> None:
        """Answer with a body of the type `kind`."""
        self.head(status, kind, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, status: int, kind: str, length: int | None) -> None:
        """Write the head of an answer; with `length` None its pieces follow (`chunk`)."""
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
            self.send_header("Allow", ", ".join(self.server.site.methods))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Security-Policy", self.server.site.policy)
        self.end_headers()

    def chunk(self, piece: bytes) -> None:
        """Write a piece of an answer of unknown length; b"" ends it."""
        if self.request_version == "HTTP/1.1":
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        self.wfile.write(piece)

    # Errors, and what the standard library calls ------------------------------------------------------

    def _refuse(self, refusal: Refusal) -> None:
        self.close_connection = True  # a body may be left unread
        self.json(refusal.status, refusal.body())

    def _no_method(self) -> Refusal:
        there = " and ".join(self.server.site.methods)
        return Refusal(405, "method_not_allowed", f"there is no {self.command} here, {there} alone")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer in the same form where the standard library refuses (a method, a damaged request)."""
        refusal = Refusal(int(code), "bad_request", message or "the request cannot be read")
        if code == HTTPStatus.NOT_IMPLEMENTED:  # what it says where there is no do_DELETE
            refusal = self._no_method()
        self._refuse(refusal)

    def version_string(self) -> str:
        """Return the server's name, without a version."""
        return "fleetune"

    def log_message(self, format: str, *args: object) -> None:
        """Write to the log, not to the terminal."""
        log.debug("%s " + format, self.client_address[0], *args)
