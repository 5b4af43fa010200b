# SPDX-License-Identifier: Apache-2.0
"""Show the chat page, and OpenAI's HTTP interface in front of an engine.

    GET /          the chat page (one file, no outside requests)
    GET /health    {"status": "ok"} while the engine lives, else 503 (also while the model is being loaded)
    /v1/..         to the engine (`proxy.py`); a streamed answer goes on piece by piece

With a second engine (`beside`), which has the base model, a request goes to the engine whose model it names, and
`/v1/models` names both; the base's entry says `"fleetune": "base"`.

Errors have OpenAI's form, those of the engine too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources

from fleetune.deploy.serving import proxy
from fleetune.deploy.serving import request_checks as checks
from fleetune.deploy.serving.front import Exchange, content_policy
from fleetune.deploy.serving.openai_client import MAX_TOKENS, TEMPERATURE, Address


def _page() -> str:
    """Return the chat page: one file, with the script that draws Markdown and the defaults in it."""
    folder = resources.files("fleetune.deploy.serving")
    text = folder.joinpath("chat.html").read_text(encoding="utf-8")
    text = text.replace("/* markdown */", folder.joinpath("chat_markdown.js").read_text(encoding="utf-8"))
    return text.replace("{{temperature}}", f"{TEMPERATURE:g}").replace("{{max_tokens}}", str(MAX_TOKENS))


class EngineSite:
    """A `Site` before an engine.  It answers "loading" until `attach` gives it one."""

    methods: tuple[str, ...] = ("GET", "POST")

    def __init__(self) -> None:
        self.engine: Address | None = None
        self.alive: Callable[[], bool] = lambda: False
        self.names: tuple[str, ...] = ()  # of the model and the base beside it; () without a second engine
        self.base: Address | None = None
        text = _page()
        self.page, self.policy = text.encode(), content_policy(text)

    def attach(self, engine: Address, alive: Callable[[], bool]) -> None:
        """Pass requests to `engine` from now on; `alive` says whether it lives."""
        self.alive, self.engine = alive, engine

    def beside(self, base: Address, names: tuple[str, str]) -> None:
        """Pass requests that name the second of these models to `base`."""
        self.base, self.names = base, names

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
            if self.base is not None and not has_body and path == "/v1/models":
                exchange.json(200, self._models())
                return
            self._forward(exchange, body)

    def _models(self) -> dict[str, object]:
        own, base = ({"id": name, "object": "model", "owned_by": "fleetune"} for name in self.names)
        return {"object": "list", "data": [own, base | {"fleetune": "base"}]}

    def _engine_for(self, body: bytes) -> Address | None:
        """Return the engine whose model a request names; the first where it names none."""
        if self.base is None:
            return self.engine
        try:
            asked = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            return self.engine  # which says what is wrong with it
        named = isinstance(asked, dict) and asked.get("model") == self.names[1]
        return self.base if named else self.engine

    def _health(self, exchange: Exchange) -> None:
        up = self.alive()
        state = "ok" if up else "loading" if self.engine is None else "the engine has ended"
        exchange.json(200 if up else 503, {"status": state})

    def _forward(self, exchange: Exchange, body: bytes) -> None:
        """Pass a request on, and its answer back: as it comes where it is a stream."""
        exchange.hold()
        engine, client = self._engine_for(body), exchange.connection
        with proxy.answered(engine, exchange.command, exchange.path, body, client) as response:
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
