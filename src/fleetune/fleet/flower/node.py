# SPDX-License-Identifier: Apache-2.0
"""Answer a server's orders from a device, and come back with the same key whatever happens to server or network."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import logging
import random
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Final, TypeVar

import httpx
from flwr.proto import fleet_pb2 as fleet
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fleetune.common.display import human_bytes, human_time
from fleetune.common.files import PRIVATE, write_atomic
from fleetune.errors import FleetError, FleetuneError, Interrupted
from fleetune.fleet.flower import wire
from fleetune.fleet.keys import PrivateKey, is_loopback

log = logging.getLogger(__name__)

T = TypeVar("T")

NODE: Final = "node"  # file with the number of the last session
LONGEST: Final = 20.0  # seconds between two tries
PATIENCE: Final = 30.0  # seconds without a byte from the server; it answers within half of it
SLOWEST: Final = (
    8192  # bytes a second: a slower line may not have carried a piece to the server when that time is over
)
IDLE: Final = 60.0  # seconds that an idle connection is kept: the server keeps it longer
FAREWELL: Final = 5.0  # seconds for the last words of a device that leaves
PIECE: Final = 1 << 20  # bytes of an answer in one request
QUIET: Final = 1.6  # heartbeats until a request that lasts needs another beside it: the server takes two for a device's end
AGAIN: Final = 1.0  # seconds before a device says that it could not read an order: it is given it again
TWICE: Final = 412  # status for a key that comes in while it is there; one that is not registered gets 401
ANEW: Final = 410  # status from a server that was started after the device came in
SMALL: Final = 1 << 16  # bytes of any answer but an order
FIRST: Final = 2 << 20  # bytes of an order to a device that has taken no job: of the job itself
AHEAD: Final = 5.0  # seconds by which a device's clock may be ahead of the server's
BEHIND: Final = 300.0  # and behind it
NO_TLS: Final = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
)  # what OpenSSL says of an answer in plain HTTP


@dataclass(frozen=True)
class Server:
    """Where a device finds its server: HOST:PORT, and the certificate (PEM) that it trusts; without one, plain HTTP."""

    address: str
    certificate: Path | None = None
    poll: float = 0.2  # seconds between two looks whether to leave
    heartbeat: float = 10.0  # seconds
    room: Callable[[], int] = lambda: FIRST  # bytes that the next order may have

    @property
    def url(self) -> str:
        """The begin of every request's address."""
        return f"http{'s' if self.certificate else ''}://{self.address}"

    def trust(self) -> ssl.SSLContext | bool:
        """Return what a certificate is checked by; FleetError when it cannot be read."""
        if self.certificate is None:
            return False
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cadata=self.certificate.read_text("ascii"))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise FleetError(
                f"cannot read the certificate {self.certificate}: {why}", hint="--ca is the server's ca.pem"
            ) from error
        return context


class TooMuch(httpx.HTTPError):
    """An answer of a server that is larger than it may be, or compressed."""


class Line:
    """Carry requests to a server, Flower's too: an answer is read up to a limit, and never decompressed.

    No proxy of the environment is between a machine and itself.
    """

    def __init__(self, server: Server, trust: ssl.SSLContext | bool) -> None:
        self.http = httpx.Client(
            base_url=server.url,
            verify=trust,
            timeout=PATIENCE,
            limits=httpx.Limits(keepalive_expiry=IDLE),
            trust_env=not is_loopback(server.address.rpartition(":")[0]),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send a request of Flower's client, in the place of its own way to send it."""
        answer, body = self.send(context.request, SMALL)
        return httpx.Response(
            answer.status_code, headers=answer.headers, content=bytes(body), request=context.request
        )

    def send(self, request: httpx.Request, most: int) -> tuple[httpx.Response, bytearray]:
        """Return the head and the body of the answer to a request; `TooMuch` for one of more than `most` bytes.

        A small one has `PATIENCE` in all: a server that sends byte by byte is none.  The body is in memory once.
        """
        request.headers["accept-encoding"] = "identity"
        response = self.http.send(request, stream=True)
        try:
            if "content-encoding" in response.headers:
                raise TooMuch("the server compresses what it sends, which a device does not take")
            body, until = bytearray(), time.monotonic() + PATIENCE
            for piece in response.iter_raw():
                if len(body) + len(piece) > most:
                    raise TooMuch(
                        f"the server sends more than the {human_bytes(most)} that this device takes"
                    )
                if most <= SMALL and time.monotonic() > until:
                    raise httpx.ReadTimeout("the server does not end its answer", request=request)
                body += piece
        finally:
            response.close()
        return response, body


class _Session:
    """One stay at a server: heartbeats in a thread, requests for orders in another."""

    def __init__(
        self, client: FleetHttpClient, line: Line, key: PrivateKey, state: Path, server: Server
    ) -> None:
        self.client, self.line, self.key, self.server = client, line, key, server
        self.over, self.asking = threading.Event(), False
        self.node: Node | None = None  # until it has come in
        self.said = time.monotonic()  # when the last request or heartbeat began
        self.file = state / NODE

    def begin(self) -> None:
        """Come in, and say from then on that this device is there."""
        if self.file.exists():  # the last process may have gone without a word: its session would last on
            with contextlib.suppress(httpx.HTTPStatusError, ValueError, OSError):
                self.client.DeactivateNode(fleet.DeactivateNodeRequest(node_id=int(self.file.read_text())))
        self._come_in()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _come_in(self) -> None:
        pem = self.key.public.pem
        if self.server.certificate is None:
            with contextlib.suppress(httpx.HTTPStatusError):  # it is registered already
                self.client.RegisterNode(fleet.RegisterNodeFleetRequest(public_key=pem))
        request = fleet.ActivateNodeRequest(public_key=pem, heartbeat_interval=self.server.heartbeat)
        self.node = Node(node_id=self.client.ActivateNode(request).node_id)
        write_atomic(self.file, str(self.node.node_id), mode=PRIVATE)

    def _beat(self) -> None:
        """Send heartbeats; a request for an order is one too, until a slow line makes it last.

        A server that was started anew does not know the session: the device comes in again, while it works.
        """
        while not self.over.wait(self.server.heartbeat / 20):
            beats = QUIET if self.asking else random.uniform(0.5, 0.7)
            if time.monotonic() - self.said > beats * self.server.heartbeat:
                self.said = time.monotonic()
                with contextlib.suppress(httpx.HTTPError, FleetuneError):  # the main loop meets it, and acts
                    self._beat_once()

    def _beat_once(self) -> None:
        interval = self.server.heartbeat
        try:
            self.client.SendNodeHeartbeat(
                SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=interval)
            )
        except httpx.HTTPStatusError:
            self._come_in()

    def end(self) -> None:
        """Leave; a request that still waits for an order is sent away by the server."""
        self.over.set()
        if self.node is None:
            return
        request = fleet.DeactivateNodeRequest(node_id=self.node.node_id)
        with contextlib.suppress(Exception):  # whatever the server answers, this device is gone
            self.within(FAREWELL, lambda: self.client.DeactivateNode(request))

    def waited(self, call: Callable[[], T], over: Callable[[], bool]) -> T | None:
        """Return what a call gives, or raise what it raises; None where the device leaves meanwhile.

        It waits in a thread, so that this one can look whether to leave, whatever the server sends.
        """
        outcome: list[T | Exception] = []

        def make() -> None:
            try:
                outcome.append(call())
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=make, name="request", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(self.server.poll)
            if thread.is_alive() and over():
                return None
        (found,) = outcome
        if isinstance(found, Exception):
            raise found
        return found

    def within(self, seconds: float, call: Callable[[], object]) -> None:
        """Make a call of a device that leaves, and wait so long for it."""
        until = time.monotonic() + seconds
        self.waited(call, lambda: time.monotonic() > until)

    def answer_all(self, answer: Callable[[bytearray], bytes], over: Callable[[], bool]) -> None:
        """Answer orders until `over()`; httpx.HTTPError where the server is gone, or refuses."""
        number, data = "", b""
        while not over():
            found = self._ask(number, data, over)
            data = b""  # it has arrived, and need not be in memory through the next order's work
            if found is None:
                return
            number, order = found
            if not number and time.monotonic() - self.said < AGAIN:
                self.over.wait(AGAIN)  # a server that has nothing keeps the request for a while
            data = self._answer(answer, order) if number else b""
        if number:
            self.within(PATIENCE + len(data) / SLOWEST, lambda: self._send(number, data, "nothing"))

    def _answer(self, answer: Callable[[bytearray], bytes], order: bytearray) -> bytes:
        """Return the answer to an order; none, after a moment, where it cannot be read: it comes again."""
        try:
            return answer(order)
        except Interrupted:
            raise
        except FleetuneError as error:
            log.warning("an order could not be answered: %s", error.message)
            self.over.wait(AGAIN)
            return b""

    def _ask(self, number: str, data: bytes, over: Callable[[], bool]) -> tuple[str, bytearray] | None:
        """Send an answer and wait for the next order: (its number, the order), ("", nothing) where none came in time.

        None where the device leaves meanwhile.
        """
        self.asking = True
        found = self.waited(lambda: self._send(number, data, "order"), over)
        self.asking = False
        return found and (found[0].headers.get(wire.ORDER, ""), found[1])

    def _send(self, number: str, data: bytes, wants: str) -> tuple[httpx.Response, bytearray]:
        """Send an answer, large ones in pieces; return the head and the body of what comes back for the last."""
        pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)] or [b""]
        for piece in pieces[:-1]:
            self._post(number, piece, "piece")
        return self._post(number, pieces[-1], wants)

    def _post(self, number: str, piece: bytes, wants: str) -> tuple[httpx.Response, bytearray]:
        headers = {**wire.signed(self.key), wire.NEXT: wants, **({wire.ORDER: number} if number else {})}
        self.said = time.monotonic()
        patience = httpx.Timeout(PATIENCE, read=PATIENCE + len(piece) / SLOWEST)  # what is sent is on its way
        request = self.line.http.build_request(
            "POST", wire.EXCHANGE, content=piece, headers=headers, timeout=patience
        )
        answer, body = self.line.send(request, self.server.room() if wants == "order" else SMALL)
        return answer.raise_for_status(), body


def stay(
    server: Server,
    key: PrivateKey,
    state: Path,
    answer: Callable[[bytearray], bytes],
    *,
    over: Callable[[], bool],
    note: Callable[[str], None],
) -> None:
    """Answer the server's orders until `over()`: refused, cut off or without a server, try again and again.

    FleetError when the certificate cannot be read; StorageError when the disk of the device takes nothing more.
    """
    wire.hush()
    trust = server.trust()
    wait, said = 0.0, ""
    while not over():
        line = Line(server, trust)
        signs = NodeAuthHttpInterceptor(key.secret, key.secret.public_key())
        with FleetHttpClient(server.url, interceptors=[signs, line], verify=trust) as client, line.http:
            session = _Session(client, line, key, state, server)
            try:
                session.waited(session.begin, over)
                if over():
                    break
                note(f"connected to {server.address}")
                wait, said = 0.0, ""
                session.answer_all(answer, over)
            except FleetuneError:
                raise
            except Exception as error:  # the network, the server, or what Flower makes of their answers
                wait = min(max(0.5, wait * 2), LONGEST)
                why = _why(error, tls=server.certificate is not None)
                if (kind := re.sub(r"\d+", "", why)) != said:  # a clock's seconds flicker
                    note(f"{why}; trying again")
                    said = kind
            finally:
                session.end()
        until = time.monotonic() + wait * random.uniform(0.8, 1.2)
        while time.monotonic() < until and not over():
            time.sleep(0.1)


def _why(error: Exception, *, tls: bool = True) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        if error.response.status_code == TWICE:
            return "a device with this key is connected already, or one that has gone is not yet given up"
        if error.response.status_code in (401, 403):
            return _clocks_apart(error.response) or (
                "the server does not know this device's key: bring its .pub file into the server's folder of keys"
            )
        if error.response.status_code == ANEW:
            return "the server was started anew"
        return f"the server answered {error.response.status_code}"
    if isinstance(error, TooMuch):
        return str(error)
    if not isinstance(error, httpx.HTTPError):
        return f"{type(error).__name__}: {error}"
    if words := str(error).partition("certificate verify failed: ")[2]:
        return (
            f"the server's certificate is not trusted: {words.partition(' (_ssl')[0]} (its names are those given to "
            "'fleetune fleet keys certificate'; --ca is the ca.pem made there)"
        )
    if any(word in str(error) for word in NO_TLS):
        return "the server speaks plain HTTP: it was started without --certificate"
    if isinstance(error, httpx.RemoteProtocolError) and not tls:
        return "no server there that speaks plain HTTP; if it has a certificate: --ca ca.pem"
    return f"no server there ({type(error).__name__})"


def _clocks_apart(response: httpx.Response) -> str:
    """Return that, and what to do, where the server's clock (its Date) and this device's differ too much; else ""."""
    try:
        server = email.utils.parsedate_to_datetime(response.headers["date"])
        seconds = (datetime.datetime.now(datetime.UTC) - server).total_seconds()
    except (KeyError, ValueError, TypeError, OverflowError):
        return ""
    if -BEHIND < seconds < AHEAD:
        return ""
    which = "ahead of" if seconds > 0 else "behind"
    return (
        f"this device's clock is {human_time(abs(seconds))} {which} the server's, which therefore refuses what the device "
        "signs: set the clock that is wrong (timedatectl set-ntp true)"
    )
