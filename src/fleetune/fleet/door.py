"""Let devices in, carry their orders and answers, and know who is there: five requests over HTTPS.

    POST /fleet/challenge      fleetune-key: base64 of the public key (PEM)
    204                        fleetune-challenge: a text that this key may sign within a minute, once
    POST /fleet/session        fleetune-key, fleetune-challenge; fleetune-signature: base64 of `signed_text`'s ECDSA signature;
                               fleetune-host, fleetune-trusted: HOST:PORT as the device calls the server, and SHA-256 of the
                               certificate (ca.pem) that it trusts; fleetune-heartbeat: seconds;
                               fleetune-session: that of the device's last process, if it has one
    204                        fleetune-session: a secret that the requests below state as `authorization: Bearer ..`
    POST /fleet/alive          a heartbeat
    POST /fleet/leave          the device goes
    POST /fleet/exchange       fleetune-order: NUMBER      the body is the answer to this order, or a piece of it
                               fleetune-next: order        wait for the next order (the default)
                                              piece        none: the next piece follows
                                              nothing      none: the device leaves
    200                        fleetune-order: NUMBER; the body is the order, the one before again if it was not answered
    204                        there was none

    403 the key may not come in, or has not signed this      409 the key is there already, or a later request took over
    401 the key was revoked
    410 no such session: the server has begun anew           421 the device means a server of another name or ca.pem
    404, 411, 413 no request of a device

A signature is of the server's name, port and certificate authority too, so that no server can use it to be the device elsewhere.
Before a session is known, no body is read; an answer belongs to an open order of the device and has a bound (`link.py`).
"""

import asyncio
import hashlib
import hmac
import ipaddress
import itertools
import re
import secrets
import threading
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from fleetune.fleet import keys as keyring
from fleetune.fleet.http_server import Address, HttpServer
from fleetune.fleet.keys import PublicKey
from fleetune.fleet.link import Letter, Mail

KEY: Final = "fleetune-key"
CHALLENGE: Final = "fleetune-challenge"
SIGNATURE: Final = "fleetune-signature"
HOST: Final = "fleetune-host"
TRUSTED: Final = "fleetune-trusted"
HEARTBEAT: Final = "fleetune-heartbeat"
SESSION: Final = "fleetune-session"
ORDER: Final = "fleetune-order"
NEXT: Final = "fleetune-next"

LIMIT: Final = 2 << 20  # bytes of a piece of an answer
LONGEST_KEY: Final = 1024  # characters of a public key in a request's head
HOLD: Final = 15.0  # seconds a request waits for an order: less than two heartbeats, of which one may fail
RAREST: Final = 60.0  # seconds between two heartbeats of a device; ours send one in 10 s
SIGNED: Final = 60.0  # seconds in which a challenge has to come back
BODY: Final = 240.0  # seconds that a piece of an answer may take: a device gives up before
CHUNK: Final = 1 << 16  # bytes handed to a connection at once: more would lie in memory for each device
SESSIONS: Final = 1 << 12  # of devices that are there, where any key may come in
KINDS: Final = 16  # of refusals that are told apart between two looks


def signed_text(address: str, trusted: str, challenge: str) -> bytes:
    """Return what a device signs to come in to the server at this HOST:PORT, which it trusts by this hash of a certificate."""
    called = f"{plain(host_of(address))}:{address.rpartition(':')[2]}"
    return f"a device comes in to a Fleetune fleet\n{called}\n{trusted}\n{challenge}".encode()


def host_of(address: str) -> str:
    """Return the name or address alone of HOST:PORT."""
    return address.rpartition(":")[0].strip("[]")


def plain(host: str) -> str:
    """Return a name or an address in one form; localhost is 127.0.0.1, as a server listens there."""
    host = "127.0.0.1" if host.lower() == "localhost" else host
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().rstrip(".")


@dataclass
class DeviceSession:
    """One stay of a device; the parts below the line belong to the event loop."""

    secret: str
    key: PublicKey
    mark: str  # differs from that of any other stay
    heartbeat: float  # seconds
    said: float = field(default_factory=time.monotonic)  # when it was last heard
    # ----
    waits: asyncio.Future[None] | None = None  # its request that waits for an order
    coming: asyncio.Future[bytes] | None = None  # the body that is on its way
    sending: asyncio.Task[Any] | None = None  # the request whose order is on its way, or was

    @property
    def online(self) -> bool:
        """Whether it was heard within its last two heartbeats."""
        return time.monotonic() - self.said < 2 * self.heartbeat

    def stop_sending(self) -> None:
        """End the answer that is on its way: a device that does not read one would else hold as many orders as it asks for."""
        if self.sending is not None:
            self.sending.cancel()
            self.sending = None

    def end(self) -> None:
        """End what is on its way, in both directions."""
        self.wake()
        self.stop_sending()
        if self.coming is not None:
            self.coming.cancel()

    def wake(self) -> None:
        """Have its waiting request look again."""
        if self.waits is not None and not self.waits.done():
            self.waits.set_result(None)


class Challenges:
    """Texts to sign: of this server, for one key, once, within `SIGNED` seconds; none is kept until it is used."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._used: dict[str, int] = {}  # by key: when its last one was made

    def new(self, key: str) -> str:
        """Return a text for the key with this hash."""
        text = f"{time.monotonic_ns()}-{secrets.token_hex(16)}"
        return f"{text}-{self._mac(key, text)}"

    def use(self, key: str, challenge: str) -> bool:
        """Tell whether a text is one for this key that was not used yet, nor one made after it; it is then used."""
        text, _, mac = challenge.rpartition("-")
        if not hmac.compare_digest(mac.encode(), self._mac(key, text).encode()):
            return False
        made = int(text.partition("-")[0])
        if time.monotonic_ns() - made > SIGNED * 1e9 or made <= self._used.get(key, 0):
            return False
        if len(self._used) >= SESSIONS:  # those before are too old by now
            self._used = {k: at for k, at in self._used.items() if time.monotonic_ns() - at < SIGNED * 1e9}
        self._used[key] = made
        return True

    def _mac(self, key: str, text: str) -> str:
        return hmac.new(self._secret, f"{key} {text}".encode(), hashlib.sha256).hexdigest()


class Refusals:
    """Requests that were answered with an error, by status, path and the key that they claimed."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, str, str], int] = {}
        self._lock = threading.Lock()

    def note(self, status: int, path: str, key: str, *, known: bool) -> None:
        """Count one; beyond `KINDS` of them, as one of no kind in particular, but for a key that is `known`."""
        kind = status, path, key
        with self._lock:
            if kind not in self._counts and not known and len(self._counts) >= KINDS:
                kind = 0, "", ""
            self._counts[kind] = self._counts.get(kind, 0) + 1

    def taken(self) -> dict[tuple[int, str, str], int]:
        """Return the counts since the last call: (status, path, hash of the claimed key) -> requests; 0 for others."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return counts


class Door:
    """A `Link` to devices.  With `keys`, only these come in; without, any that has a key of its own.

    Its requests run in a thread with an event loop; what every link has may be called from another.
    """

    def __init__(
        self, address: Address, keys: Sequence[PublicKey] | None, look: Callable[[], None] = lambda: None
    ) -> None:
        """Before a key or a session is believed, `look()` may `admit` others."""
        self.address, self.refusals, self.mail, self._look = address, Refusals(), Mail(), look
        self.mail.ring = self._ring
        self._challenges = Challenges()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._keys = None if keys is None else {key.fingerprint: key for key in keys}
        self._sessions: dict[str, DeviceSession] = {}  # by key
        self._here: dict[str, str] = {}  # key -> mark, at the last look
        self._names = {} if keys is None else {key.fingerprint: key.name for key in keys}
        self._hosts, self._trusted = None, ""
        if address.certificate is not None:
            self._hosts = {plain(name) for name in keyring.hosts_of(address.certificate)}
            self._trusted = keyring.trusted(address.certificate.with_name("ca.pem"))
        self._closing = False
        self._server = HttpServer(self._app(), address)

    def _app(self) -> Starlette:
        answers: Mapping[str, Callable[[Request], Awaitable[Response]]] = {
            "challenge": self._challenge,
            "session": self._session,
            "alive": self._alive,
            "leave": self._leave,
            "exchange": self._exchange,
        }
        routes = [Route(f"/fleet/{name}", answer, methods=["POST"]) for name, answer in answers.items()]
        app = Starlette(routes=routes, exception_handlers={HTTPException: self._refuse})
        app.router.redirect_slashes = False
        return app

    def open(self) -> None:
        """Start to listen; FleetError where that is not possible."""
        self._server.open()

    def close(self) -> None:
        """Stop listening; requests that wait for an order are answered."""
        self._closing = True
        for session in list(self._sessions.values()):
            self._server.call(session.wake)
        self._server.close()

    def admit(self, keys: Sequence[PublicKey]) -> None:
        """Make these the keys whose devices may come in; others that are there are thrown out."""
        with self._lock:
            self._keys = {key.fingerprint: key for key in keys}
        self._names |= {key.fingerprint: key.name for key in keys}
        for key in list(self._sessions.keys() - self._keys.keys()):
            self._end(key)

    # What every link has ----------------------------------------------------------------------------------

    def online(self) -> Mapping[str, str]:
        """Return the devices that are there now, each with a mark of its stay.

        The orders of those that have gone since the last look are lost.
        """
        with self._lock:
            here = {key: session.mark for key, session in self._sessions.items() if session.online}
        before, self._here = self._here, here
        for key in before.keys() - here.keys():
            self.mail.lose(key)
        return here

    def name(self, key: str) -> str:
        """Return what the device with this key is called: its key file, or the begin of its key's hash."""
        return self._names.get(key, key[:8])

    def push(self, key: str, data: bytes, common: int, room: int) -> str | None:
        """Queue an order for a device; its last `common` bytes are kept once where the order before ended with them."""
        return self.mail.put(key, data, common, room) if key in self._sessions else None

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield the answers that are complete, None for one that will not come: its device is away."""
        for number in self.mail.answered(numbers):
            yield number, self.mail.pull(number)

    def drop(self, numbers: set[str]) -> None:
        """Forget orders that nobody waits for any longer."""
        self.mail.drop(numbers)

    # Coming in and going ----------------------------------------------------------------------------------

    async def _challenge(self, request: Request) -> Response:
        _check_length(request, 0)
        return Response(
            status_code=204, headers={CHALLENGE: self._challenges.new(self._key(request).fingerprint)}
        )

    async def _session(self, request: Request) -> Response:
        _check_length(request, 0)
        key, called = self._key(request), request.headers.get(HOST, "")
        if not self._is_called(called):
            raise HTTPException(421)
        challenge = request.headers.get(CHALLENGE, "")
        try:
            signature = b64decode(request.headers.get(SIGNATURE, ""), validate=True)
            trusted = request.headers.get(TRUSTED, "")
            signed = keyring.has_signed(key, signature, signed_text(called, trusted, challenge))
        except ValueError as error:
            raise HTTPException(403) from error
        if not signed or not self._challenges.use(key.fingerprint, challenge):
            raise HTTPException(403)
        if trusted != self._trusted:
            raise HTTPException(421)
        before = self._sessions.get(key.fingerprint)
        known = request.headers.get(SESSION, "")
        if before is not None and before.online and not _same(before.secret, known.partition(".")[2]):
            raise HTTPException(409)
        heartbeat = _seconds(request.headers.get(HEARTBEAT, ""))
        session = DeviceSession(secrets.token_urlsafe(32), key, f"stay {next(self._numbers)}", heartbeat)
        self._end(key.fingerprint)
        with self._lock:
            self._make_room()
            if self._keys is not None and key.fingerprint not in self._keys:
                raise HTTPException(401)  # revoked while it came in
            self._sessions[key.fingerprint] = session
        return Response(status_code=204, headers={SESSION: f"{key.fingerprint}.{session.secret}"})

    def _make_room(self) -> None:
        """Forget those that have gone where any key may come in; HTTPException 503 where too many are there."""
        if self._keys is None and len(self._sessions) >= SESSIONS:
            self._sessions = {key: session for key, session in self._sessions.items() if session.online}
            if len(self._sessions) >= SESSIONS:
                raise HTTPException(503)

    def _key(self, request: Request) -> PublicKey:
        """Return the key that a request states; HTTPException 403 where it may not come in, 401 where it did before."""
        stated = request.headers.get(KEY, "")
        self._look()
        try:
            pem = b64decode(stated, validate=True) if len(stated) <= LONGEST_KEY else b""
            key, keys = PublicKey("", pem), self._keys
        except ValueError as error:
            raise HTTPException(403) from error
        if keys is not None and key.fingerprint not in keys:
            raise HTTPException(401 if key.fingerprint in self._names else 403)
        return key if keys is None else keys[key.fingerprint]

    def _is_called(self, address: str) -> bool:
        """Tell whether this server is called so: by a name of its certificate, or without one as it listens."""
        host = plain(host_of(address))
        if self._hosts is None:
            return (host, address.rpartition(":")[2]) == (plain(self.address.host), str(self.address.port))
        return host in self._hosts or f"*.{host.partition('.')[2]}" in self._hosts

    async def _alive(self, request: Request) -> Response:
        _check_length(request, 0)
        self._of(request)
        return Response(status_code=204)

    async def _leave(self, request: Request) -> Response:
        _check_length(request, 0)
        self._end(self._of(request).key.fingerprint)
        return Response(status_code=204)

    def _of(self, request: Request) -> DeviceSession:
        """Return the session of a request, heard now; HTTPException 410 where there is none."""
        way, _, stated = request.headers.get("authorization", "").partition(" ")
        key, _, secret = stated.partition(".")
        self._look()
        session = self._sessions.get(key)
        if session is None and self._keys is not None and key not in self._keys and key in self._names:
            raise HTTPException(401)
        if way != "Bearer" or session is None or not _same(session.secret, secret):
            raise HTTPException(410)
        session.said = time.monotonic()
        return session

    def _end(self, key: str) -> None:
        """End a device's stay, if there is one: what it was ordered is lost."""
        with self._lock:
            session = self._sessions.pop(key, None)
        self.mail.lose(key)
        if session is not None:
            self._server.call(session.end)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        """Count a request that is refused, and end its connection."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        path, key = request.scope["path"][:64] if status != 404 else "", _claimed(request)
        self.refusals.note(status, path, key, known=key in self._names)
        return Response(status_code=status, headers={"connection": "close"})

    # Answers and orders -----------------------------------------------------------------------------------

    async def _exchange(self, request: Request) -> Response:
        session, wants = self._of(request), request.headers.get(NEXT, "order")
        _check_length(request, LIMIT)
        if wants == "piece" and request.headers.get("content-length", "0") == "0":
            raise HTTPException(400)  # a piece of nothing, as often as a device likes
        if number := request.headers.get(ORDER):
            try:
                piece = await self._body(session, number, request)
            except ClientDisconnect:
                return Response(status_code=204)
            except TimeoutError as error:
                raise HTTPException(408) from error
            self.mail.answer(session.key.fingerprint, number, piece, last=wants != "piece")
        session.stop_sending()
        letter = await self._next(session) if wants == "order" and not self._closing else None
        if letter is None:
            return Response(status_code=204)
        session.sending = asyncio.current_task()
        return _letter(letter)

    async def _body(self, session: DeviceSession, number: str, request: Request) -> bytes:
        """Return an answer's bytes, b"" for one that nobody waits for: it is thrown away as it comes.

        A device has one on its way, so that its connections fill no memory: HTTPException 409 when a later one begins.
        """
        if not self.mail.waits(session.key.fingerprint, number):
            await asyncio.wait_for(_thrown_away(request), BODY)
            return b""
        if session.coming is not None:
            session.coming.cancel()
        coming = session.coming = asyncio.ensure_future(request.body())
        try:
            await asyncio.wait([coming], timeout=BODY)
        finally:
            coming.cancel()
            if session.coming is coming:
                session.coming = None
        if not coming.done() or coming.cancelled():
            raise HTTPException(409)
        return coming.result()

    async def _next(self, session: DeviceSession) -> Letter | None:
        """Return the next order for a device; None where none comes, or a later request of it waits."""
        key = session.key.fingerprint
        session.wake()  # a request that waits is from before: its connection is dead
        session.waits = None
        if (letter := self.mail.first(key)) is not None:
            return letter
        mine = session.waits = asyncio.get_running_loop().create_future()
        await asyncio.wait([mine], timeout=HOLD)
        if session.waits is not mine or self._sessions.get(key) is not session:
            return None
        session.waits = None
        session.said = time.monotonic()
        return self.mail.first(key)

    def _ring(self, key: str) -> None:
        """Have a device's request look again; from any thread."""
        if (session := self._sessions.get(key)) is not None and not self._closing:
            self._server.call(session.wake)


async def _thrown_away(request: Request) -> None:
    async for _ in request.stream():
        pass


def _same(secret: str, stated: str) -> bool:
    return hmac.compare_digest(secret.encode(), stated.encode())


def _seconds(stated: str) -> float:
    """Return the heartbeat that a device states, `RAREST` for what is none."""
    try:
        seconds = float(stated)
    except ValueError:
        return RAREST
    return min(seconds, RAREST) if seconds > 0 else RAREST


def _check_length(request: Request, most: int) -> None:
    """HTTPException for a body of no stated length, or of more bytes."""
    length = request.headers.get("content-length", "0")
    if "transfer-encoding" in request.headers or not (length.isascii() and length.isdigit()):
        raise HTTPException(411)
    if len(length) > 9 or int(length) > most:
        raise HTTPException(413)


def _claimed(request: Request) -> str:
    """Return the hash of the key that a request claims, which nothing may prove; "" for none."""
    bearer, stated = request.headers.get("authorization", ""), request.headers.get(KEY, "")
    if bearer and not stated:
        stated = bearer.partition(" ")[2].partition(".")[0]
        return stated if re.fullmatch("[0-9a-f]{64}", stated) else ""  # written into the audit log
    try:
        return keyring.fingerprint(b64decode(stated, validate=True)) if 0 < len(stated) <= LONGEST_KEY else ""
    except ValueError:
        return ""


def _letter(letter: Letter) -> Response:
    """Return an order as an answer, in chunks that never copy the part which all orders share."""
    parts = [letter.head, letter.tail]
    length = sum(map(len, parts))
    if length <= CHUNK:
        parts = [b"".join(parts)]

    async def chunks() -> AsyncIterator[bytes]:
        for part in parts:
            for start in range(0, len(part), CHUNK):
                yield part[start : start + CHUNK]
                await asyncio.sleep(0)  # where the device has hung up, asyncio learns it here

    headers = {ORDER: letter.number, "content-length": str(length)}
    return StreamingResponse(chunks(), headers=headers, media_type="application/octet-stream")
