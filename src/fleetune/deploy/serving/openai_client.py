# SPDX-License-Identifier: Apache-2.0
"""Stream text from a server of OpenAI's HTTP interface (server-sent events), with the standard library alone."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fleetune.errors import FleetuneError

TEMPERATURE: Final = (
    0.0  # unless asked for another, on the page and in the terminal: the likeliest answer, the same each time
)
MAX_TOKENS: Final = 512  # of an answer, unless asked for another
SECONDS: Final = 600.0  # of silence from an engine until it counts as hung


@dataclass(frozen=True)
class Address:
    """The host and port of an engine, and the key that it asks for."""

    host: str
    port: int
    key: str

    def headers(self) -> dict[str, str]:
        """Return the headers of every request."""
        return {"Authorization": f"Bearer {self.key}"}


class Refused(FleetuneError):
    """The server answered with an error; it goes on with other requests."""


def pieces(at: Address, path: str, body: Mapping[str, Any]) -> Generator[str, None, None]:
    """Yield the text of a streamed answer to `body` as it comes; closing the generator ends the request.

    Refused when the server says no; OSError or HTTPException when the connection breaks, also in the middle.
    """
    connection = http.client.HTTPConnection(at.host, at.port, timeout=SECONDS)
    try:
        headers = at.headers() | {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps({**body, "stream": True}).encode(), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise Refused(_reason(response.read(), response.status))
        finished = False
        for line in response:
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                text, ends = _event(line[5:])
                finished = finished or ends
                if text:
                    yield text
        if not finished:
            raise http.client.IncompleteRead(b"")
    finally:
        connection.close()


def _event(data: bytes) -> tuple[str, bool]:
    """Return the text of one event, "" for none, and whether it is the last; Refused when it is an error."""
    event = json.loads(data)
    if "error" in event:
        raise Refused(_reason(data, 500))
    if not event.get("choices"):  # a count of tokens
        return "", False
    choice = event["choices"][0]
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return str(text), choice.get("finish_reason") is not None


def _reason(raw: bytes, status: int) -> str:
    """Return why a server refused: the message of an error in OpenAI's form, else the start of the body."""
    try:
        error = json.loads(raw)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}: " + raw[:200].decode(errors="replace").strip()
