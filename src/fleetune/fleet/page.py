"""Show a running fleet in a browser (`/`), as JSON (`/status`) and to Prometheus (`/metrics`), read-only."""

import asyncio
import base64
import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from fleetune.common.events import FleetShown, as_dict
from fleetune.errors import FleetuneError, UsageError
from fleetune.fleet import status
from fleetune.fleet.http_server import Address, HttpServer
from fleetune.fleet.keys import is_loopback
from fleetune.report import page, runlog, single
from fleetune.runs import rundir

PORT: Final = 8471
FRESH: Final = 2.0  # seconds for which an answer is given again
REST: Final = 20.0  # and at least so many times the seconds that it took to make
SHORTEST: Final = 12  # characters of a password, off this machine
WRONG: Final = 1.0  # seconds that a wrong password costs everybody who gives one
QUEUE: Final = 4  # wrong ones that wait
LARGEST: Final = 16 << 20  # bytes of a metrics.jsonl that the report is made of while the fleet runs
MOST_DEVICES: Final = 200  # in the table
WORDS: Final = ("device", "does", "last reply")  # its columns that are no numbers


def place(text: str, fleet: Address) -> Address:
    """Read PORT, HOST:PORT, or "" for this machine and `PORT`; with the fleet's certificate off this machine.

    UsageError for anything else.
    """
    host, colon, port = text.rpartition(":")
    if (text and not (port.isascii() and port.isdigit())) or (colon and not host):
        raise UsageError(
            f"--page {text} is not a port", hint=f"--page, --page {PORT}, or --page 0.0.0.0:{PORT}"
        )
    host = host.strip("[]") or "127.0.0.1"
    if is_loopback(host):
        return Address(host, int(port or PORT))
    if fleet.certificate is None:
        raise UsageError(
            f"--page {text} can be reached from other machines: the page there needs TLS",
            hint="give --certificate DIR, or show it on this machine alone: --page",
        )
    return Address(host, int(port or PORT), fleet.certificate, fleet.key)


class LivePage:
    """A page that shows a run from `show` on, between `open` and `close`."""

    def __init__(self, address: Address, password: str | None = None) -> None:
        """Off this machine a password is made where none is given; UsageError for a short one."""
        local = is_loopback(address.host)
        if password and not local and len(password) < SHORTEST:
            raise UsageError(
                f"the page's password has {len(password)} characters",
                hint=f"FLEETUNE_PASSWORD: {SHORTEST} or more",
            )
        self.password = password or (None if local else secrets.token_urlsafe(16))
        self.run: Path | None = None
        self._wrong, self._waiting = asyncio.Lock(), 0
        self._lock = threading.Lock()
        self._made: dict[str, tuple[float, Response]] = {}  # by path: until when it is fresh
        routes = [Route(path, self._answer) for path in ANSWERS]
        app = Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=self._check)])
        app.router.redirect_slashes = False
        self._server = HttpServer(app, address)
        way = "https" if address.certificate else "http"
        shown = f"[{address.host}]" if ":" in address.host else address.host
        self.url = f"{way}://{shown}:{address.port}/"

    def open(self) -> None:
        """Start to listen; FleetError where that is not possible."""
        self._server.open()

    def close(self) -> None:
        """Stop listening."""
        self._server.close()

    async def _check(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Ask for the password; a wrong one is answered a second later, one after another."""
        if self.password is not None:
            given = request.headers.get("authorization", "")
            if not _gives(given, self.password):
                if given and not await self._made_wait():
                    return Response(status_code=429)
                return Response(status_code=401, headers={"www-authenticate": 'Basic realm="fleetune"'})
        elif not is_loopback(re.sub(r":\d*$", "", request.headers.get("host", "").lower())):
            return Response("this page is shown on this machine alone", 400)  # another site's name for it
        response = await call_next(request)
        response.headers["cache-control"] = "no-store"
        return response

    async def _made_wait(self) -> bool:
        """Wait a second, one after another; False at once where `QUEUE` wait already."""
        if self._waiting >= QUEUE:
            return False
        self._waiting += 1
        try:
            async with self._wrong:
                await asyncio.sleep(WRONG)
        finally:
            self._waiting -= 1
        return True

    def _answer(self, request: Request) -> Response:
        """Answer a request, in a thread of its own."""
        path = request.scope["path"]  # an URL is made of what the Host says
        with self._lock:
            until, response = self._made.get(path, (0.0, Response()))
            began = time.monotonic()
            if began >= until:
                response = self._make(path)
                now = time.monotonic()
                self._made[path] = now + max(FRESH, REST * (now - began)), response
        return Response(response.body, response.status_code, dict(response.headers))

    def _make(self, path: str) -> Response:
        if self.run is None:
            return Response("The run is being prepared: data and model are loaded.", 503)
        try:
            return ANSWERS[path](status.look(self.run))
        except FleetuneError as error:
            return Response(error.message, 503)


def _gives(authorization: str, password: str) -> bool:
    """Tell whether a head of HTTP Basic has this password."""
    kind, _, stated = authorization.partition(" ")
    try:
        given = base64.b64decode(stated, validate=True).partition(b":")[2]
    except ValueError:
        return False
    return kind.lower() == "basic" and hmac.compare_digest(given, password.encode())


def _shown(now: FleetShown) -> Response:
    """Return the page: devices, and the sections of the report."""
    run, loss = Path(now.run), "" if now.loss is None else f" · loss {now.loss:.3f}"
    file = run / rundir.METRICS
    sections = {} if file.exists() and file.stat().st_size > LARGEST else single.sections(runlog.read(run))
    for private in ("samples", "sharing"):
        sections.pop(private, None)
    body = sections.pop("head", "") + devices(now) + "".join(sections.values())
    over = now.status == "done"  # a page that is loaded no more stays when the server goes
    title = f"{'finished' if over else f'round {now.round} of {now.rounds}'}{loss} · {run.name}"
    return HTMLResponse(page.document(title, body), headers={} if over else {"refresh": "5"})


def devices(now: FleetShown) -> str:
    """Return the section on the devices: how many do what, and a table of them.

    With more than `MOST_DEVICES`, devices that are away or whose last reply did not count come first.
    """
    bad = sorted(now.devices, key=lambda d: (d.does != "away", d.status in ("ok", None), d.client))
    shown = sorted(bad[:MOST_DEVICES], key=lambda d: d.client)
    rows = [
        [c if h in WORDS else page.TableCell(c) for h, c in zip(status.HEAD, status.cells(d), strict=True)]
        for d in shown
    ]
    table = page.table("Devices, with their last reply", status.HEAD, rows)
    more = len(now.devices) - len(shown)
    words = f"<p>{more} more devices are not shown.</p>" if more else ""
    return page.section("devices", "Devices", page.fact_list(status.facts(now)) + table + words)


def _status(now: FleetShown) -> Response:
    return Response(json.dumps(as_dict(now)), media_type="application/json")


def _metrics(now: FleetShown) -> Response:

    class Now(Collector):
        """The registry asks it once."""

        def collect(self) -> Iterator[Metric]:
            return _families(now)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Now())
    return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")


def _families(now: FleetShown) -> Iterator[Metric]:
    """Yield what Prometheus reads.  Counters are of finished rounds; no device has a series of its own."""
    yield InfoMetricFamily("fleetune_run", "The run.", {"run": Path(now.run).name})
    for name, what, value in (
        ("fleetune_round", "Round in progress, 0 before the first.", now.round),
        ("fleetune_rounds", "Rounds to run.", now.rounds),
        ("fleetune_round_seconds", "Time of the last finished round.", now.round_seconds),
        ("fleetune_validation_loss", "Latest loss on the held-out rows, nats.", now.loss),
        ("fleetune_server_memory_bytes", "Resident memory of the server.", now.rss),
        ("fleetune_server_heard_timestamp_seconds", "Time of the server's last word.", now.t),
    ):
        if value is not None:
            yield GaugeMetricFamily(name, what, value)
    states = GaugeMetricFamily("fleetune_devices", "Devices by what they do.", labels=["state"])
    for state in dict.fromkeys((*status.STATES, *now.states)):
        states.add_metric([state], now.states.get(state, 0))
    replies = CounterMetricFamily("fleetune_replies", "Replies of finished rounds.", labels=["status"])
    for what, count in now.replies.items():
        replies.add_metric([what], count)
    traffic = CounterMetricFamily("fleetune_traffic_bytes", "Bytes of finished rounds.", labels=["direction"])
    for direction, count in (("up", now.bytes_up), ("down", now.bytes_down)):
        traffic.add_metric([direction], count)
    yield from (states, replies, traffic)


ANSWERS: Final[dict[str, Callable[[FleetShown], Response]]] = {
    "/": _shown,
    "/status": _status,
    "/metrics": _metrics,
}
