# SPDX-License-Identifier: Apache-2.0
"""Pass a checked request to the engine, and its answer back as it comes."""

from __future__ import annotations

import http.client
import json
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from fleetune.deploy.serving.openai_client import SECONDS, Address
from fleetune.deploy.serving.request_checks import Refusal

CHUNK: Final = 1 << 16


@contextmanager
def answered(
    engine: Address | None, command: str, path: str, body: bytes, client: socket.socket
) -> Iterator[http.client.HTTPResponse]:
    """Send a request to the engine; the head of its answer.  Refusal while there is no engine, or it does not answer.

    When the `client` leaves before, the connection to the engine is closed, which then stops writing.
    """
    if engine is None:
        raise Refusal(503, "loading", "the model is being loaded")
    connection = http.client.HTTPConnection(engine.host, engine.port, timeout=SECONDS)
    try:
        headers = engine.headers() | ({"Content-Type": "application/json"} if body else {})
        try:
            connection.request(command, path, body or None, headers)
            if body:  # what has none is answered at once
                _wait(connection.sock, client)
            response = connection.getresponse()
        except TimeoutError:
            raise Refusal(504, "engine_timeout", f"no answer within {SECONDS:.0f} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Refusal(502, "engine_down", f"the engine does not answer: {error!r}") from None
        yield response
    finally:
        connection.close()


def _wait(engine: socket.socket, client: socket.socket) -> None:
    """Wait for an answer to begin; ConnectionAbortedError when the client leaves before, TimeoutError after `SECONDS`."""
    watched = [engine, client]
    while ready := select.select(watched, [], [], SECONDS)[0]:
        if engine in ready:
            return
        if not client.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError("the client has left")
        watched = [engine]  # the client has sent its next request already
    raise TimeoutError


def whole(response: http.client.HTTPResponse) -> bytes:
    """Read an answer to its end; an error of the engine gets OpenAI's form."""
    try:
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise _broken_off(error) from None
    if response.status == 500 and b"Failed to parse" in body:  # llama.cpp's answer to wrong tools
        raise Refusal(400, "bad_request", error_body(400, body)["error"]["message"])
    return json.dumps(error_body(response.status, body)).encode() if response.status >= 400 else body


def streamed(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the pieces of an answer as they come; where the engine breaks off, an event with the error."""
    try:
        while piece := response.read1(CHUNK):
            yield piece
    except (OSError, http.client.HTTPException) as error:
        yield b"data: %b\n\n" % json.dumps(_broken_off(error).body()).encode()


def error_body(status: int, body: bytes) -> dict[str, Any]:
    """Return an engine's error in OpenAI's form: what it says of the four fields, and more of its own, stays."""
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    found = found if isinstance(found, dict) else {}
    given = found.get("error", found.get("detail"))
    text = (
        given if isinstance(given, str) else "the engine says: " + body[:500].decode(errors="replace").strip()
    )
    fields: Any = Refusal(status, "engine_error", text).body()["error"]
    return {"error": fields | given if isinstance(given, dict) else fields}


def _broken_off(error: Exception) -> Refusal:
    return Refusal(502, "engine_down", f"the engine's answer broke off: {error!r}")
