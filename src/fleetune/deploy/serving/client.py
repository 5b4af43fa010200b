# SPDX-License-Identifier: Apache-2.0
"""Talk to an engine through OpenAI's HTTP interface (server-sent events), with the standard library alone."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from fleetune.deploy.serving.engines import Session
from fleetune.errors import FleetuneError, UsageError

SECONDS: Final = 600.0  # of silence from an engine until it counts as hung

Turn = dict[str, str]  # role, content


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: the likeliest at temperature 0, else with `seed`; of `max_tokens` tokens at most."""

    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 42

    def check(self) -> None:
        """UsageError for numbers that mean nothing."""
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens} is below 1", hint="the default is 512")
        if not 0 <= self.temperature <= 2:
            raise UsageError(
                f"--temperature {self.temperature} is not in 0..2", hint="0 is the likeliest answer"
            )


class Refused(FleetuneError):
    """The engine answered with an error; it goes on with other requests."""


class Conversation:
    """A conversation with a running engine, which remembers what was said before.

    `turns` are the turns so far, each with a `role` (system, user, assistant) and a `content`.
    """

    def __init__(self, session: Session, sampling: Sampling, system: str = "") -> None:
        self._session, self._sampling = session, sampling
        self._begun: list[Turn] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Turn] = list(self._begun)

    def say(self, text: str) -> str:
        """Return the answer to `text`.  Refused, with the conversation as it was, when it has grown too long."""
        return "".join(self.pieces(text))

    def pieces(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to `text` as it is written; closing the generator ends it, and what came is remembered."""
        asked, answer = [*self.turns, {"role": "user", "content": text}], ""
        written = _streamed(self._session, asked, self._sampling)
        try:
            for piece in written:
                answer += piece
                yield piece
        finally:
            written.close()
            if answer:
                self.turns = [*asked, {"role": "assistant", "content": answer}]

    def restart(self) -> None:
        """Forget what was said, but for the system prompt."""
        self.turns = list(self._begun)


def _streamed(session: Session, turns: list[Turn], sampling: Sampling) -> Generator[str, None, None]:
    """Yield the text of an answer as it comes.

    Refused when the engine says no; FleetuneError when the connection breaks, also in the middle.
    """
    body = {
        "model": session.model.name,
        "messages": turns,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        "stream": True,
    }
    connection = session.connection(SECONDS)
    try:
        headers = session.headers | {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
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
    except (OSError, http.client.HTTPException) as error:
        raise session.failed(f"the answer of {session.engine.name} broke off: {error!r}") from error
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
    return str((choice.get("delta") or {}).get("content") or ""), choice.get("finish_reason") is not None


def _reason(raw: bytes, status: int) -> str:
    """Return why an engine refused: the message of an error in OpenAI's form, else the start of the body."""
    try:
        error = json.loads(raw)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}: " + raw[:200].decode(errors="replace").strip()
