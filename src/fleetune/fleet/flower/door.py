# SPDX-License-Identifier: Apache-2.0
"""Keep out what is no request of a device: before a byte of a body is read, and before anything of Flower's runs."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from typing import Final, cast

from fastapi import HTTPException, Request, Response
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fleetune.fleet.flower import wire
from fleetune.fleet.flower.exchange import Exchange
from fleetune.fleet.flower.limits import Once
from fleetune.fleet.flower.state import State

LIMIT: Final = 2 << 20  # bytes of an exchange's body: a piece of an answer and its frame
SMALL: Final = 1 << 14  # bytes of any other body: a key, a number, a time
BODIES: Final = {  # paths that devices use, and the bytes that a body may have; of Flower's interface nothing else is there
    wire.EXCHANGE: LIMIT,
    **{f"/v1/fleet/{p}-node": SMALL for p in ("register", "activate", "deactivate")},
    "/v1/fleet/send-node-heartbeat": SMALL,
}
HEAD: Final = 20.0  # seconds in which a new connection has to send the head of a request
LONGEST_HEAD: Final = 1 << 15  # bytes of it


class Door:
    """Let through requests of a limited size that a key has signed, once; ours go to the exchange, others to Flower.

    With `any_key` a key may be new, since it registers by Flower's interface.
    """

    def __init__(self, app: ASGIApp, state: State, exchange: Exchange, once: Once, any_key: bool) -> None:
        self.app, self.state, self.exchange, self.once, self.any_key = app, state, exchange, once, any_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; a connection that is refused is closed."""
        request = Request(scope, receive)
        try:
            _check_size(request)
            node = self._node(request)
            if scope["path"] == wire.EXCHANGE:
                await self.exchange.answer(node, request, send)
                return
        except HTTPException as refused:
            await Response(status_code=refused.status_code, headers={"connection": "close"})(
                scope, receive, send
            )
        else:
            await self.app(scope, receive, send)

    def _node(self, request: Request) -> int | None:
        """Return the node whose key has signed a request, None for a new one; HTTPException 401 where it may not come in."""
        try:
            stated = request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER]
            key = b64decode(stated, validate=True)
        except (KeyError, ValueError) as error:
            raise HTTPException(401) from error
        if (node := self.state.get_node_id_by_public_key(key)) is None and not self.any_key:
            raise HTTPException(401)
        claim = {"protobuf_request": ActivateNodeRequest(public_key=key)}  # where Flower looks for it
        authenticate_node(Request({**request.scope, "state": claim}))
        if not self.once.fresh(stated, request.headers[TIMESTAMP_HEADER]):
            raise HTTPException(401)
        return node


def _check_size(request: Request) -> None:
    """Raise HTTPException for a request to anything else than the devices' interface, or with too large a body."""
    path = request.scope["path"]
    if path not in BODIES:
        raise HTTPException(404)
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()) or int(length) > BODIES[path]:
        raise HTTPException(413)


class Connection(HttpToolsProtocol):
    """A connection that is closed when no request comes: half-open ones would take all that the system allows.

    So is one whose request's head does not end: the parser keeps a line, however long, until it is whole.
    """

    _head: int | None = None  # bytes that came with a head that has not ended, None outside of one

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the head of a request."""
        super().connection_made(transport)
        self.loop.call_later(HEAD, self._check_head)

    def on_message_begin(self) -> None:
        """Begin to count."""
        super().on_message_begin()
        self._head = 0

    def on_headers_complete(self) -> None:
        """Count no more: the body has a limit of its own."""
        self._head = None
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Take the next request, and read no more while others wait: a client could send them without end."""
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head has become too long."""
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > LONGEST_HEAD:
                self.transport.abort()

    def _check_head(self) -> None:
        if cast(object, self.cycle) is None:
            self.transport.close()
