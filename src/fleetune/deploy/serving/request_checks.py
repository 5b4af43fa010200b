# SPDX-License-Identifier: Apache-2.0
"""Check a request before anything acts on it: form, host, origin, path, token, body, size and time.

    form      the request line is printable ASCII, every header line is one, and those that are decided on come once
    host      on the loopback address the `Host` must be this machine: a stranger's page whose name was re-pointed to
              127.0.0.1 (DNS rebinding) is refused
    origin    a request that another page makes (`Origin`) is refused everywhere
    path      a fixed list; there is no directory and no file
    token     compared in constant time, where the server has one
    body      JSON of at most `MAX_BODY` bytes, with one Content-Length; none for a GET
    time      the head and the whole request must be here within a time, however slowly they trickle in

Every refusal is an error in OpenAI's form: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import re
import socket
import time
from contextlib import suppress
from email import errors
from email.message import Message
from typing import Any, Final

PATHS: Final = ("models", "chat/completions", "completions", "embeddings", "responses")  # under /v1/
MAX_BODY: Final = 4 << 20
LINE: Final = re.compile(rb"[!-~]+ [!-~]+ HTTP/[0-9]\.[0-9]\r?\n")
ONCE: Final = ("Host", "Origin", "Authorization", "Content-Length", "Content-Type")
NO_FIELD: Final = (
    errors.MissingHeaderBodySeparatorDefect,
    errors.FirstHeaderLineIsContinuationDefect,
    errors.InvalidHeaderDefect,
)


class Refusal(Exception):
    """An answer that is an error: HTTP status, OpenAI's code, and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message

    def body(self) -> dict[str, object]:
        """Return the answer in OpenAI's form."""
        kind = {401: "authentication_error", 403: "permission_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach what is bound to `host`."""
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def check_request_line(line: bytes) -> None:
    """Refuse a first line that is not a method, a target and a version in printable ASCII."""
    if not LINE.fullmatch(line):
        raise Refusal(400, "bad_request", f"the request line cannot be read: {line[:100]!r}")


def check_fields(headers: Message) -> None:
    """Refuse a header with a line that is none, and two lines of a name where each reader might take another."""
    if any(isinstance(defect, NO_FIELD) for defect in headers.defects):
        raise Refusal(400, "bad_header", "a line of the header is not 'name: value'")
    for name in ONCE:
        if len(headers.get_all(name, [])) > 1:
            raise Refusal(400, "repeated_header", f"there is more than one {name}")


def check_host(headers: Message, *, loopback: bool) -> None:
    """Refuse a request to a loopback server (`loopback`) under any name but this machine's."""
    host = headers.get("Host", "")
    name = re.sub(r":\d+$", "", host)
    if loopback and not is_loopback(name.strip("[]").lower()):
        raise Refusal(403, "wrong_host", f"this server is not '{host}': use its loopback address")


def check_origin(headers: Message) -> None:
    """Refuse a request that says it comes from another page."""
    host, origin = headers.get("Host", ""), headers.get("Origin")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        raise Refusal(403, "wrong_origin", "requests from other pages are refused")


def check_no_body(headers: Message, command: str) -> None:
    """Refuse a body where there is none to be: unread it would be taken for the next request of a shared connection."""
    if headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers:
        raise Refusal(400, "unexpected_body", f"a {command} has no body")


def check_path(path: str) -> None:
    """Refuse a path that is not one of the engine's."""
    if not (path.startswith("/v1/") and path.removeprefix("/v1/") in PATHS):
        raise Refusal(404, "not_found", f"there is nothing at {path}")


def check_token(headers: Message, token: str) -> None:
    """Refuse a request without the server's `token`; "" asks for none."""
    given = headers.get("Authorization", "").encode()
    if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise Refusal(401, "invalid_api_key", "the token is missing or wrong")


def read_body(headers: Message, file: io.BufferedIOBase) -> bytes:
    """Read a request's body from `file`; Refusal unless it is JSON of a length that is stated and allowed."""
    length = headers.get("Content-Length", "")
    if "Transfer-Encoding" in headers or not length:
        raise Refusal(411, "length_required", "a request needs a Content-Length")
    if not re.fullmatch(r"[0-9]{1,12}", length):
        raise Refusal(400, "bad_length", "the Content-Length is no number")
    if int(length) > MAX_BODY:
        raise Refusal(413, "too_large", f"a request has at most {MAX_BODY} bytes, this one {length}")
    if headers.get_content_type() != "application/json":
        raise Refusal(415, "not_json", "a request is JSON: send Content-Type: application/json")
    try:
        body = file.read(int(length))
    except TimeoutError:
        raise Refusal(408, "timeout", "the request did not come") from None
    if len(body) < int(length):
        raise Refusal(400, "cut_short", "the request ended early")
    return body


class DeadlineReader(io.RawIOBase):
    """A stream of a client's bytes with a deadline `end`, so that slow single bytes cannot hold a connection open."""

    def __init__(self, connection: socket.socket, idle: float) -> None:
        """Wait at most `idle` seconds for the next bytes."""
        self.connection, self.idle, self.end = connection, idle, 0.0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes; TimeoutError when none come for `idle` seconds, or at the time `end`."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request takes too long")
        self.connection.settimeout(min(self.idle, left))
        try:
            return self.connection.recv_into(buffer)
        finally:
            self.connection.settimeout(self.idle)
