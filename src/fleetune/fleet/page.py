# SPDX-License-Identifier: Apache-2.0
"""Show a running fleet in a browser: the run's report with its devices on top, made anew while the page is open.

    GET /          the page; it holds nothing of the run, and asks for the rest
    GET /parts     the sections of the report and the table of devices: {name: HTML}
    GET /status    the event of `fleet status --json`
    GET /metrics   the same numbers for Prometheus (`prometheus.py`)

There is nothing that could be changed from here.  All is read from the run's folder.  Reading and drawing take at most a
share of `1 / REST` of one core from the rounds, however many ask.  Samples are left out, since they hold rows of clients:
report.html, which has them, is for its owner alone.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Final, Generic, TypeVar

from fleetune import report
from fleetune.common.display import show
from fleetune.common.events import DeviceShown, FleetShown, as_dict
from fleetune.deploy.serving.front import Exchange, content_policy, listening, token_for
from fleetune.deploy.serving.request_checks import Refusal
from fleetune.errors import FleetuneError, UsageError
from fleetune.fleet import PAGE_PORT, prometheus, status
from fleetune.report import page
from fleetune.report.page import TableCell
from fleetune.runs import metrics

JSON: Final = "application/json"
T = TypeVar("T")

FRESH: Final = 1.0  # seconds for which an answer is given again
REST: Final = 20.0  # and at least so many times the seconds that it took to make
MOST_DEVICES: Final = 200  # in the table of the page
LEFT: Final = ("device", "does", "last reply")  # columns of text
LARGEST: Final = 16 << 20  # bytes of a metrics.jsonl that the report is made of while the fleet runs


@dataclasses.dataclass(frozen=True)
class PagePlace:
    """Where the page is shown, and the token that a reader must present (None: the environment's, or one made here)."""

    host: str = "127.0.0.1"
    port: int = PAGE_PORT
    token: str | None = None

    @classmethod
    def of(cls, text: str, token: str | None) -> PagePlace:
        """Read PORT, HOST:PORT, or "" for the defaults; UsageError for anything else."""
        host, colon, port = text.rpartition(":")
        if (text and not (port.isascii() and port.isdigit())) or (colon and not host):
            raise UsageError(
                f"--page {text} is not a port",
                hint=f"--page, --page {PAGE_PORT}, or --page 0.0.0.0:{PAGE_PORT}",
            )
        return cls(host.strip("[]") or cls.host, int(port or cls.port), token)


@contextmanager
def opened(place: PagePlace, note: Callable[[str], None]) -> Iterator[LivePage]:
    """Show a page while the block runs, and say where; UsageError where it cannot listen there."""
    token, made = token_for(place.host, place.token)
    live = LivePage(f"{place.host}:{place.port}")
    with listening(place.host, place.port, token, live) as front:
        note(f"page: {front.url}/{f'#{token}' if made else ''}")
        if not front.loopback:
            note("others can reach the page, unencrypted, with its token: put a proxy with TLS before it")
        yield live


class _Cached(Generic[T]):
    """The last answer of a slow function, which is given again while it is fresh."""

    def __init__(self, make: Callable[[], T]) -> None:
        self.make, self._until = make, 0.0
        self._answer: T | None = None

    def __call__(self) -> T:
        began = time.monotonic()
        if self._answer is None or began >= self._until:
            self._answer = self.make()
            now = time.monotonic()
            self._until = now + max(FRESH, REST * (now - began))
        return self._answer


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A run that is shown: how it stands, and its report."""

    status: Callable[[], FleetShown]
    report: Callable[[], dict[str, str]]


class LivePage:
    """A `Site` that shows a run from `show` on."""

    methods: tuple[str, ...] = ("GET",)

    def __init__(self, at: str = "") -> None:
        """`at` is the HOST:PORT that was asked for."""
        self.at = at
        text = resources.files("fleetune.fleet").joinpath("page.html").read_text(encoding="utf-8")
        text = text.replace("/* style of the report */", page.style())
        self.page, self.policy = text.encode(), content_policy(text)
        self._shown: _Shown | None = None
        self._lock = threading.Lock()

    def show(self, run: Path) -> None:
        """Show the run in this folder from now on."""
        record = status.Record(run)
        self._shown = _Shown(_Cached(lambda: status.look(run, record)), _Cached(lambda: _report(run)))

    def answer(self, exchange: Exchange, path: str) -> None:
        """Answer with the page, or with what it asks for."""
        if path == "/":
            exchange.reply(200, "text/html; charset=utf-8", self.page)
            return
        exchange.check_token()
        if path not in ANSWERS:
            raise Refusal(404, "not_found", f"there is nothing at {path}")
        if self._shown is None:
            raise Refusal(503, "loading", "The run is being prepared: data and model are loaded.")
        try:
            with self._lock:
                kind, body = ANSWERS[path](self._shown)
        except FleetuneError as error:
            raise Refusal(503, "not_ready", error.message) from error
        exchange.reply(200, kind, body)


def _parts(run: _Shown) -> tuple[str, bytes]:
    """Return the page's sections, by name and in order."""
    now, found = run.status(), run.report()
    parts = {"title": _title(now), "head": found["head"], "devices": devices(now), **found}
    return JSON, json.dumps(parts).encode()


ANSWERS: Final[Mapping[str, Callable[[_Shown], tuple[str, bytes]]]] = {
    "/parts": _parts,
    "/status": lambda run: (JSON, json.dumps(as_dict(run.status())).encode()),
    "/metrics": lambda run: (prometheus.TYPE, prometheus.text(run.status())),
}


def _report(run: Path) -> dict[str, str]:
    """Return the sections of the report that the page shows."""
    file = run / metrics.FILE
    if file.exists() and file.stat().st_size > LARGEST:
        return {
            "head": "<p>The run is too large to be drawn while it goes on: see its report.html at the end.</p>"
        }
    found = report.sections(report.read(run))
    del found["samples"], found["sharing"]
    return found


def _title(now: FleetShown) -> str:
    loss = f" · loss {show('loss', now.loss)}" if now.loss is not None else ""
    return f"round {now.round} of {now.rounds}{loss} · {Path(now.run).name}"


def devices(now: FleetShown) -> str:
    """Return the section on the devices: how many do what, and a table of them.

    Of more than `MOST_DEVICES` those come first that are away, or whose last reply did not count.
    """
    shown = now.devices
    if len(shown) > MOST_DEVICES:
        ordered = sorted(shown, key=lambda d: (d.does != "away", d.status in ("ok", None), d.client))
        shown = sorted(ordered[:MOST_DEVICES], key=lambda d: d.client)
    table = page.table("Devices, with their last reply", status.HEAD, [_row(d) for d in shown], "cards")
    more = len(now.devices) - len(shown)
    words = f"<p>{more} more devices are not shown.</p>" if more else ""
    return page.section("devices", "Devices", page.fact_list(status.facts(now)) + table + words)


def _row(device: DeviceShown) -> list[str | TableCell]:
    bad = {
        "does": device.does == "away", "last reply": device.status not in ("ok", None), "not counted": device.lost > 0
    }  # fmt: skip
    name, *cells = status.cells(device)
    kinds = [
        " ".join(["r"] * (head not in LEFT) + ["bad"] * bad.get(head, False)) for head in status.HEAD[1:]
    ]
    return [name, *(TableCell(text, kind) for text, kind in zip(cells, kinds, strict=True))]
