# SPDX-License-Identifier: Apache-2.0
"""Show the chat page, and OpenAI's HTTP interface in front of an engine.

    GET /          the chat page (one file, no outside requests)
    GET /health    {"status": "ok"} while the engine lives, else 503 (also while the model is being loaded)
    /v1/..         to the engine (`proxy.py`); a streamed answer goes on piece by piece

Errors have OpenAI's form, those of the engine too.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

from fleetune.deploy.serving import proxy
from fleetune.deploy.serving import request_checks as checks
from fleetune.deploy.serving.front import Exchange, content_policy
from fleetune.deploy.serving.openai_client import Address


class EngineSite:
    """A `Site` before an engine.  It answers "loading" until `attach` gives it one."""

    methods: tuple[str, ...] = ("GET", "POST")

    def __init__(self) -> None:
        self.engine: Address | None = None
        self.alive: Callable[[], bool] = lambda: False
        self.page = resources.files("fleetune.deploy.serving").joinpath("chat.html").read_bytes()
        self.policy = content_policy(self.page.decode())

    def attach(self, engine: Address, alive: Callable[[], bool]) -> None:
        """Pass requests to `engine` from now on; `alive` says whether it lives."""
        self.alive, self.engine = alive, engine

    def answer(self, exchange: Exchange, path: str) -> None:
        """Answer with the page, the health, or what the engine says."""
        has_body = exchange.command == "POST"
        if not has_body and path == "/":
            exchange.reply(200, "text/html; charset=utf-8", self.page)
        elif not has_body and path == "/health":
            self._health(exchange)
        else:
            checks.check_path(path)
            exchange.check_token()
            body = checks.read_body(exchange.headers, exchange.rfile) if has_body else b""
            self._forward(exchange, body)

    def _health(self, exchange: Exchange) -> None:
        up = self.alive()
        state = "ok" if up else "loading" if self.engine is None else "the engine has ended"
        exchange.json(200 if up else 503, {"status": state})

    def _forward(self, exchange: Exchange, body: bytes) -> None:
        """Pass a request on, and its answer back: as it comes where it is a stream."""
        exchange.hold()
        with proxy.answered(self.engine, exchange.command, exchange.path, body) as response:
            kind = response.headers.get("Content-Type", "application/json")
            if not kind.startswith("text/event-stream"):
                answer = proxy.whole(response)
                kind = "application/json" if response.status >= 400 else kind
                exchange.reply(response.status, kind, answer)
                return
            exchange.head(response.status, kind, None)
            for piece in proxy.streamed(response):
                exchange.chunk(piece)
            exchange.chunk(b"")
