"""Say how a real fleet's run stands, from its folder alone, so that nothing of this slows a round.

fleet.json       the server's last word: its process, the round, what each device does (written about once a second)
fleet.stop       the session of a server that is to stop (`ask_to_stop`); the server looks as often as it writes
metrics.jsonl    what became of every reply and round
"""

import math
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fleetune.common.display import human_bytes, human_time, quoted, show
from fleetune.common.events import DeviceShown, FleetShown
from fleetune.common.files import PRIVATE, read_json, read_text, write_atomic
from fleetune.errors import StorageError, UsageError
from fleetune.fleet.table import LATE
from fleetune.runs import compression_folder, rundir
from fleetune.tuning.recipe import recipe as recipes

FILE: Final = rundir.FLEET
STOP: Final = "fleet.stop"
# What a server's word has, what a device does, and what became of a reply
FIELDS: Final = frozenset({"t", "session", "pid", "machine", "rss", "address", "round", "rounds", "devices"})
STATES: Final = ("at work", "ready", "declined", "joining", "refused", "away", "has not joined")
SILENT: Final = 10.0  # seconds without a word, after which a server whose page outlives its run is gone
STATUSES: Final = ("ok", "refused", "late", "dropped", "failed", "declined")


def word_of(run: Path) -> Mapping[str, Any]:
    """Return the last word of a run's server; UsageError where there is none, StorageError where it is damaged."""
    if not (run / FILE).is_file():
        raise UsageError(f"{run} is not the run of a real fleet, or its server has not begun")
    found = read_json(run / FILE, "the server writes it again every second")
    if missing := FIELDS - found.keys():
        raise StorageError(f"{run / FILE} lacks {', '.join(sorted(missing))}")
    return found


def standing(run: Path) -> str:
    """Return the status of a run, or of a compression that devices calibrate."""
    if compression_folder.is_one(run):
        stopped = "running" if rundir.held(run) else "interrupted"
        return "done" if compression_folder.is_complete(run) else stopped
    return rundir.status_of(run) or "unknown"


def ask_to_stop(run: Path) -> None:
    """Ask the server of a run to stop, or one whose page outlives it; UsageError where there is none.

    The request names the session in the server's last word, so no other process obeys it, now or later.
    """
    if not rundir.held(run) and not lingers(run):
        now, hint = standing(run), f"fleetune fleet status {quoted(run)}"
        raise UsageError(f"no server has {run}, which is {now}: nothing to stop", hint=hint)
    write_atomic(run / STOP, str(word_of(run)["session"]), mode=PRIVATE)


def lingers(run: Path) -> bool:
    """Tell whether a server shows the page of a finished run."""
    word = word_of(run) if (run / FILE).is_file() else {}
    return bool(word.get("lingers") and time.time() - word["t"] < SILENT)


def take_stop(run: Path, session: str) -> bool:
    """Tell whether the server of this session was asked to stop; the request is then removed."""
    try:
        asked = read_text(run / STOP, errors="replace") == session
    except OSError:
        return False
    if asked:
        (run / STOP).unlink(missing_ok=True)
    return asked


class Record:
    """What metrics.jsonl says of a run so far."""

    def __init__(self, run: Path, *, sealed: bool = False) -> None:
        """Of a `sealed` run a reply says no more than that it is done: a device's bytes are its part of the round's sum."""
        self.sealed = sealed
        self._round: dict[int, Mapping[str, Any]] = {}  # client -> its reply, of the round in progress
        self.last: dict[int, Mapping[str, Any]] = {}  # client -> its last reply
        self.lost: Counter[int] = Counter()  # client -> replies that did not count
        self.replies: Counter[str] = Counter(dict.fromkeys(STATUSES, 0))
        self.bytes_up = self.bytes_down = 0
        self.seconds: float | None = None
        self.loss: float | None = None
        for event in rundir.events(run):
            self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "client":
                event = {**event, "bytes_up": 0, "bytes_down": 0} if self.sealed else event
                self.last[event["client"]] = event
                self._round[event["client"]] = event  # a later line of a client counts
            case "round":
                self.replies.update(reply["status"] for reply in self._round.values())
                for client, reply in self._round.items():
                    self.lost[client] += reply["status"] != "ok"
                if self.sealed:
                    summed = [c for c, reply in self._round.items() if reply["status"] == "ok"]
                    cost = {name: event[name] // max(1, len(summed)) for name in ("bytes_up", "bytes_down")}
                    self.last |= {c: {**self.last[c], **cost} for c in summed}
                self._round = {}
                self.bytes_up += event["bytes_up"]
                self.bytes_down += event["bytes_down"]
                self.seconds = event["seconds"]
            case "eval":
                self.loss = event.get("loss")


def look(run: Path) -> FleetShown:
    """Return how a run stands.

    UsageError where it is no real fleet's run, StorageError where its files are damaged.
    """
    word = word_of(run)
    served = rundir.held(run)
    try:
        tunes = not compression_folder.is_one(run)
        record = Record(run, sealed=tunes and recipes.read(run / "run.toml").get("privacy") == "sealed")
        devices = [_device(told, record, served=served) for told in word["devices"]]
        return FleetShown(
            run=str(run),
            status=standing(run),
            served=served,
            t=word["t"],
            heard=round(max(0.0, time.time() - word["t"]), 1),
            address=word["address"],
            machine=word["machine"],
            pid=word["pid"],
            rss=word["rss"],
            round=word["round"],
            rounds=word["rounds"],
            waits=word.get("waits", "") if served else "",
            states=dict(Counter(d.does.partition(":")[0] for d in devices)) if served else {},
            replies=dict(record.replies),
            bytes_up=record.bytes_up,
            bytes_down=record.bytes_down,
            round_seconds=record.seconds,
            loss=record.loss,
            devices=devices,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{run}: {FILE} or metrics.jsonl has another form than ours ({error!r})"
        ) from error


def resume(run: Path) -> str:
    """Return the command that goes on with what a server has left, with the flags by which its devices found it."""
    word, done = word_of(run), standing(run) == "done"
    flags = word.get("flags", "")
    if done and not word.get("measures", True):  # no device holds rows out
        return f"fleetune eval {quoted(run)}"
    if compression_folder.is_one(run):
        return f"fleetune compress --resume {quoted(run)}{flags}"
    return f"fleetune fleet {'eval' if done else 'serve --resume'} {quoted(run)}{flags}"


def _device(told: Mapping[str, Any], record: Record, *, served: bool) -> DeviceShown:
    client, does = told["client"], told["does"] if served or told["does"] == LATE else ""
    if (last := record.last.get(client)) is None:
        return DeviceShown(client=client, name=told["name"], does=does)
    return DeviceShown(
        client=client,
        name=told["name"],
        does=does,
        round=last["round"],
        status=last["status"],
        reason=last["reason"],
        loss=_finite(last["loss"]),
        bytes_up=last["bytes_up"],
        bytes_down=last["bytes_down"],
        seconds=last["seconds"],
        lost=record.lost[client],
    )


def _finite(value: object) -> float | None:
    """A number that a device states; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


# In words --------------------------------------------------------------------------------------------

HEAD: Final = (
    "device",
    "client",
    "does",
    "round",
    "last reply",
    "loss",
    "sent",
    "received",
    "time",
    "not counted",
)


def cells(device: DeviceShown) -> list[str]:
    """Return a device's line of the table under `HEAD`."""
    reply = device.status or ""
    return [
        device.name,
        str(device.client),
        device.does,
        "" if device.round is None else str(device.round),
        f"{reply}: {device.reason}" if device.reason else reply,
        "" if device.loss is None else show("loss", device.loss),
        human_bytes(device.bytes_up) if device.bytes_up else "",
        human_bytes(device.bytes_down) if device.bytes_down else "",
        human_time(device.seconds) if device.seconds else "",
        str(device.lost or ""),
    ]


def facts(now: FleetShown) -> list[tuple[str, str]]:
    """Return how the run stands, as names and values."""
    took = f" · the last took {human_time(now.round_seconds)}" if now.round_seconds is not None else ""
    loss = f" · validation loss {show('loss', now.loss)}" if now.loss is not None else ""
    compressing = compression_folder.is_one(Path(now.run))
    traffic = f"{human_bytes(now.bytes_up)} up · {human_bytes(now.bytes_down)} down"
    found = [
        ("block", f"{min(now.round + 1, now.rounds)} of {now.rounds}")
        if compressing
        else ("round", f"{now.round} of {now.rounds}{took}{loss}"),
        ("devices", _counts(now.states)),
        ("waits", now.waits),
        ("replies", _counts(now.replies)),
        ("bytes", "" if compressing else traffic),  # of a compression its own result says that
        ("server", f"{now.address} · process {now.pid} on {now.machine} · memory {human_bytes(now.rss)}"),
    ]
    return [(name, value) for name, value in found if value]


def _counts(counts: Mapping[str, int]) -> str:
    return " · ".join(f"{count:,} {what}" for what, count in counts.items() if count)
