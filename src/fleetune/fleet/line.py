"""Answer a server's orders from a device by the requests of `door.py`, and come back with the same key whatever happens."""

import contextlib
import logging
import math
import random
import re
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Final, TypeVar

import httpx

from fleetune.common.display import human_bytes, single_spaced
from fleetune.common.files import PRIVATE, read_text, write_atomic
from fleetune.errors import FleetuneError, Interrupted, StorageError
from fleetune.fleet import door
from fleetune.fleet import keys as keyring
from fleetune.fleet.link import Sparing

log = logging.getLogger(__name__)

T = TypeVar("T")

FILE: Final = "session"  # in a device's state: HOST:PORT, hash of the ca.pem, last session there, which a new process replaces
LONGEST: Final = 20.0  # seconds between two tries
PATIENCE: Final = 30.0  # seconds without a byte from the server; it answers within half of it
SLOWEST: Final = (
    8192  # bytes per second: a slower line may not have carried a piece to the server in that time
)
IDLE: Final = 60.0  # seconds that an idle connection is kept: the server keeps it longer
FAREWELL: Final = (
    5.0  # seconds for the last answer of a device that leaves, which is on its disk too; and for its leave
)
PIECE: Final = 1 << 20  # bytes of an answer in one request
QUIET: Final = 1.6  # heartbeats until a request that lasts needs another beside it: the server takes two for a device's end
AGAIN: Final = 1.0  # seconds before a device says that it could not read an order: it is given it again
SMALL: Final = 1 << 16  # bytes of any answer but an order
FIRST: Final = 2 << 20  # bytes of an order to a device that has taken no job: of the job itself
REFUSED: Final[Mapping[int, str]] = {
    403: "the server does not know this device's key: bring its .pub file into the server's folder of keys",
    401: "the server has revoked this device's key: its .pub file is gone from the server's folder of keys",
    409: "a device with this key (each needs its own) is connected already, or one that has gone is not yet given up",
    410: "the server was started anew",
    421: "this is another server: its certificate is for other names, or it listens elsewhere, or its ca.pem is not --ca",
}
# what OpenSSL says of a certificate, and of an answer in plain HTTP
UNTRUSTED: Final[Mapping[str, str]] = {
    "not yet valid": "is this device's clock right?",
    "expired": "is this device's clock right? else make a new one: fleetune fleet keys certificate",
    "match": "its names are those given to: fleetune fleet keys certificate DIR HOST [HOST ..]",
    "": "the invite, or --ca, is of another server",
}
NO_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")


@dataclass(frozen=True)
class Server:
    """Where a device finds its server: HOST:PORT, and the certificate (PEM) that it trusts; without one, plain HTTP."""

    address: str
    certificate: Path | None = None
    poll: float = 0.2  # seconds between two looks whether to leave
    heartbeat: float = 10.0  # seconds
    room: Callable[[], int] = lambda: FIRST  # bytes that the next order may have

    def trust(self) -> ssl.SSLContext | bool:
        """Return what a certificate is checked by; UsageError as `keyring.authority`."""
        if self.certificate is None:
            return False
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=keyring.authority(self.certificate))
        return context


class Odd(httpx.HTTPError):
    """An answer of a server that is larger than it may be, compressed, or with a head of other letters than a server's."""


class Line:
    """Requests to a server.  No proxy of the environment is between a machine and itself, and no cookie is kept."""

    def __init__(self, server: Server, trust: ssl.SSLContext | bool) -> None:
        self.http = httpx.Client(
            base_url=f"http{'s' if server.certificate else ''}://{server.address}",
            verify=trust,
            timeout=PATIENCE,
            limits=httpx.Limits(keepalive_expiry=IDLE),
            trust_env=not keyring.is_loopback(door.host_of(server.address)),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )
        self.until = math.inf  # when no answer is waited for any longer

    def post(
        self, name: str, headers: Mapping[str, str], body: bytes = b"", most: int = SMALL
    ) -> tuple[httpx.Response, bytearray]:
        """Make a request; return the head and the body of the answer, `Odd` for one of more than `most` bytes.

        A small one has `PATIENCE` in all: a server that sends byte by byte is none.  The body is in memory once.
        httpx.HTTPStatusError where the server refuses.
        """
        most_wait = PATIENCE + len(body) / SLOWEST  # what is sent is on its way
        left = max(0.1, self.until - time.monotonic())
        patience = httpx.Timeout(min(PATIENCE, left), read=min(most_wait, left))
        headers = {**headers, "accept-encoding": "identity"}
        request = self.http.build_request(
            "POST", f"/fleet/{name}", content=body, headers=headers, timeout=patience
        )
        response = self.http.send(request, stream=True)
        try:
            if "content-encoding" in response.headers:
                raise Odd("the server compresses what it sends, which a device does not take")
            if not all(
                response.headers.get(name, "").isascii()
                for name in (door.CHALLENGE, door.SESSION, door.ORDER)
            ):
                raise Odd("the head of the server's answer is not in ASCII")
            data, until = bytearray(), time.monotonic() + PATIENCE
            for piece in response.iter_raw():
                if len(data) + len(piece) > most:
                    raise Odd(f"the server sends more than the {human_bytes(most)} that this device takes")
                if most <= SMALL and time.monotonic() > until:
                    raise httpx.ReadTimeout("the server does not end its answer", request=request)
                data += piece
        finally:
            response.close()
        return response.raise_for_status(), data


class _Stay:
    """One stay at a server: heartbeats in a thread, requests for orders in another."""

    def __init__(self, line: Line, key: keyring.PrivateKey, state: Path, server: Server) -> None:
        self.line, self.key, self.server, self.file = line, key, server, state / FILE
        self._spare = Sparing()
        self.over, self.asking = threading.Event(), False
        self.session = ""  # until it has come in
        self.said = time.monotonic()  # when the last request or heartbeat began

    def begin(self) -> None:
        """Come in, and say from then on that this device is there."""
        self._come_in()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _come_in(self) -> None:
        """Begin a session, in the place of that of this device's last process."""
        key = {door.KEY: b64encode(self.key.public.pem).decode()}
        challenge = self.line.post("challenge", key)[0].headers.get(door.CHALLENGE, "")
        trusted = keyring.trusted(self.server.certificate)
        text = door.signed_text(self.server.address, trusted, challenge)
        stated = {
            door.CHALLENGE: challenge,
            door.HOST: self.server.address,
            door.TRUSTED: trusted,
            door.SIGNATURE: b64encode(keyring.sign(self.key, text)).decode(),
            door.HEARTBEAT: f"{self.server.heartbeat:g}",
            door.SESSION: self._before(trusted),
        }
        self.session = self.line.post("session", key | stated)[0].headers.get(door.SESSION, "")
        try:
            write_atomic(self.file, f"{self.server.address} {trusted} {self.session}", mode=PRIVATE)
        except StorageError as error:  # without it, a restarted device waits until this stay is given up
            log.warning("%s", error.message)

    def _before(self, trusted: str) -> str:
        """Return the last session of this device at this server; it is a secret to all others, at the same address too."""
        text, here = "", f"{self.server.address} {trusted} "
        if self.file.exists():
            text = read_text(self.file, errors="replace")
        return (
            text.removeprefix(here) if text.startswith(here) and text.isascii() and text.isprintable() else ""
        )

    def _bearer(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.session}"}

    def _beat(self) -> None:
        """Send heartbeats; a request for an order is one too, until a slow line makes it last.

        A server that was started anew does not know the session: the device comes in again, while it works.
        """
        while not self.over.wait(self.server.heartbeat / 20):
            beats = QUIET if self.asking else random.uniform(0.5, 0.7)
            if time.monotonic() - self.said > beats * self.server.heartbeat:
                self.said = time.monotonic()
                with contextlib.suppress(Exception):  # the main loop meets it, and acts
                    try:
                        self.line.post("alive", self._bearer())
                    except httpx.HTTPStatusError:
                        self._come_in()

    def end(self) -> None:
        """Leave; a request that still waits for an order is sent away by the server."""
        self.over.set()
        if self.session:
            with contextlib.suppress(Exception):  # whatever the server answers, this device is gone
                self.within(FAREWELL, lambda: self.line.post("leave", self._bearer()))

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
        (result,) = outcome
        if isinstance(result, Exception):
            raise result
        return result

    def within(self, seconds: float, call: Callable[[], object]) -> None:
        """Make a call of a device that leaves, and wait so long for it."""
        self.line.until = until = time.monotonic() + seconds
        self.waited(call, lambda: time.monotonic() > until)

    def answer_all(self, answer: Callable[[bytearray], bytes], over: Callable[[], bool]) -> None:
        """Answer orders until `over()`; httpx.HTTPError where the server is gone, or refuses."""
        number, data = "", b""
        while not over():
            self.asking = True
            given = self.waited(lambda number=number, data=data: self._send(number, data, "order"), over)  # type: ignore[misc]
            self.asking = False
            data = b""  # it has arrived, and need not be in memory through the next order's work
            if given is None:
                return
            number, order = given[0].headers.get(door.ORDER, ""), given[1]
            if not number and time.monotonic() - self.said < AGAIN:
                self.over.wait(AGAIN)  # a server that has nothing keeps the request for a while
            data = self._answer(answer, order) if number else b""
        if number:
            self.within(FAREWELL, lambda: self._send(number, data, "nothing"))

    def _answer(self, answer: Callable[[bytearray], bytes], order: bytearray) -> bytes:
        """Return the answer to an order; none, after a moment, where it cannot be read: it comes again."""
        try:
            return answer(order)
        except Interrupted:
            raise
        except FleetuneError as error:
            if said := self._spare.line(f"an order could not be answered: {single_spaced(error.message)}"):
                log.warning("%s", said)
            self.over.wait(AGAIN)
            return b""

    def _send(self, number: str, data: bytes, wants: str) -> tuple[httpx.Response, bytearray]:
        """Send an answer, large ones in pieces; return the head and the body of what comes back for the last."""
        pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)] or [b""]
        for piece in pieces[:-1]:
            self._post(number, piece, "piece", SMALL)
        return self._post(number, pieces[-1], wants, self.server.room() if wants == "order" else SMALL)

    def _post(self, number: str, piece: bytes, wants: str, most: int) -> tuple[httpx.Response, bytearray]:
        headers = {**self._bearer(), door.NEXT: wants, **({door.ORDER: number} if number else {})}
        self.said = time.monotonic()
        return self.line.post("exchange", headers, piece, most)


def stay(
    server: Server,
    key: keyring.PrivateKey,
    state: Path,
    answer: Callable[[bytearray], bytes],
    *,
    over: Callable[[], bool],
    note: Callable[[str], None],
) -> None:
    """Answer the server's orders until `over()`: refused, cut off or without a server, try again and again.

    UsageError when the certificate cannot be read.
    """
    trust = server.trust()
    wait, said = 0.0, ""
    while not over():
        line = Line(server, trust)
        with line.http:
            session = _Stay(line, key, state, server)
            try:
                until = time.monotonic() + 2 * PATIENCE
                session.waited(session.begin, lambda until=until: over() or time.monotonic() > until)  # type: ignore[misc]
                if over():
                    break
                if not session.session:
                    raise httpx.ReadTimeout("the server does not end its answers")
                note(f"connected to {server.address}")
                wait, said = 0.0, ""
                session.answer_all(answer, over)
            except FleetuneError:
                raise
            except Exception as error:  # the network, the server, or what a library makes of their answers
                wait = min(max(0.5, wait * 2), LONGEST)
                why = _why(error, tls=server.certificate is not None)
                if (kind := re.sub(r"\d+", "", why)) != said:
                    note(f"{why}; trying again")
                    said = kind
            finally:
                session.end()
        until = time.monotonic() + wait * random.uniform(0.8, 1.2)
        while time.monotonic() < until and not over():
            time.sleep(0.1)


def _why(error: Exception, *, tls: bool = True) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        return REFUSED.get(status, f"the server answered {status}")
    if isinstance(error, Odd):
        return str(error)
    if not isinstance(error, httpx.HTTPError):
        return f"{type(error).__name__}: {error}"
    if words := str(error).partition("certificate verify failed: ")[2]:
        words = words.partition(" (_ssl")[0]
        mend = next(mend for part, mend in UNTRUSTED.items() if part in words)
        return f"the server's certificate is not trusted: {words} ({mend})"
    if any(word in str(error) for word in NO_TLS):
        return "the server speaks plain HTTP: it was started without --certificate"
    if isinstance(error, httpx.RemoteProtocolError) and not tls:
        return "no server there that speaks plain HTTP; if it has a certificate: --ca ca.pem"
    return f"no server there ({type(error).__name__})"
