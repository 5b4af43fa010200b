"""Encode a method's state (a NamedTuple) as a checkpoint, and decode it.

A field is a number, a text, an array, a dict of arrays, or a Ledger; its kind is read off the state that `init` gives.  A
checkpoint also holds what it stands on (`StandsOn`) and how the validation stood (`Course`).  With `keep = "best"` the state of
the best round lies beside the checkpoints, in best-NNNNNN.ckpt, written before the checkpoint that names it; those that no kept
checkpoint needs are removed.

A run with differential privacy counts its releases in a file that is written before each (`Releases`).  A resumed run may release
a round again, with new noise: both count, so the file is never cut back.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgpack
import numpy as np

from fleetune.common.display import counted, quoted
from fleetune.common.files import PRIVATE, read_bytes, read_text, regular, write_atomic
from fleetune.errors import MessageError, StorageError
from fleetune.runs import rundir
from fleetune.seeds.ledger import Ledger, LedgerHead
from fleetune.tuning.exchange import messages
from fleetune.tuning.exchange.messages import Message, Payload, Scalar

ON: Final = "stands_on"  # the scalar with what it stands on, as JSON
KEPT: Final = "kept"  # arrays: client, round and CRC-32 of memories
ENTRIES: Final = {"id": "ids", "c": "coefficients", "round": "rounds", "signs": "signs"}  # arrays of a ledger
COURSE: Final = "course"  # the scalar with how the validation stood, as JSON
RELEASES: Final = "releases"  # in the run's folder: the count, and the CRC-32 of its digits


@dataclass
class Totals:
    """Running sums over the rounds."""

    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0  # of the rounds
    wall: float = 0.0  # of the sittings before this one, evaluations included


@dataclass(frozen=True)
class StandsOn:
    """What a run's outcome stands on beside the state."""

    recipe: Mapping[str, Any]  # its options by name, without the paths of model and data
    base: str  # digest of the base model
    rows: str  # digest of the clients' rows, as they are split and encoded
    held_out: str  # digest of the rows that the run is measured on
    rows_text: str  # digest of the clients' rows before they are encoded
    held_out_text: str  # digest of all held-out rows before they are encoded

    def differences(self, now: StandsOn) -> list[str]:
        """List what is otherwise now, in words for the user."""
        texts = [
            f"{name} = {now.recipe.get(name)!r}, and was {value!r}"
            for name, value in self.recipe.items()
            if now.recipe.get(name) != value
        ]
        texts += [
            f"{name} = {value!r}, and was not set"
            for name, value in now.recipe.items()
            if name not in self.recipe and name.startswith("set.")
        ]
        whats = (
            ("base", "the base model has"),
            ("rows", "the clients' rows have"),
            ("held_out", "the held-out rows have"),
        )
        for name, what in whats:
            own, other = getattr(self, name), getattr(now, name)
            texts += [] if own == other else [f"{what} the digest {other[:16]}.., and had {own[:16]}.."]
        return texts


# client -> (round, CRC-32) of what it stored last
Kept = Mapping[int, tuple[int, int]]


def encode(
    round: int,
    state: Any,
    totals: Totals,
    on: StandsOn | None = None,
    metrics: int = 0,
    kept: Kept = MappingProxyType({}),
    course: Course | None = None,
) -> bytes:
    """Encode everything that a resumed run needs after `round`, as the bytes of one message.

    `on`, the bytes of `metrics`.jsonl and the clients' memories are what it stands on; `course` is how the validation stood.
    """
    payload = pack(state, totals)
    arrays, scalars = dict(payload.arrays), dict(payload.scalars)
    if course is not None:
        scalars[COURSE] = course.to_json()
    if on is not None:
        scalars[ON] = _on_text(on, metrics)
        pairs = sorted(kept.items())
        for name, column in (("client", [c for c, _ in pairs]), ("round", [r for _, (r, _) in pairs])):
            arrays[f"{KEPT}/{name}"] = np.array(column, np.int64)
        arrays[f"{KEPT}/crc"] = np.array([crc for _, (_, crc) in pairs], np.int64)
    return messages.encode(Message(round, b"", Payload(arrays, scalars)))


def course_in(payload: Payload) -> Course:
    """Return how the validation stood; the start of a course where it says nothing."""
    text = payload.scalars.get(COURSE)
    return Course() if text is None else Course.from_json(str(text))


def stands_on(payload: Payload) -> tuple[StandsOn, int] | None:
    """Return what a checkpoint says that it stands on, with the bytes of metrics.jsonl; None where it says nothing.

    MessageError when that is damaged.
    """
    text = payload.scalars.get(ON)
    return None if text is None else _stated(str(text))


def stated_in(file: Path) -> StandsOn | None:
    """Return what the checkpoint in a file stands on, without reading its arrays.

    None where it says nothing, and where it cannot be read.
    """
    try:
        with open(file, "rb", opener=regular) as opened:
            opened.seek(messages.HEAD)
            unpacker = msgpack.Unpacker(opened, read_size=1 << 16)
            unpacker.read_array_header()
            unpacker.skip()  # round
            unpacker.skip()  # base
            scalars = unpacker.unpack()
        return _stated(scalars[ON])[0]
    except (OSError, ValueError, KeyError, TypeError, MessageError, msgpack.UnpackException):
        return None


def _stated(text: str) -> tuple[StandsOn, int]:
    try:
        found = json.loads(text)
        metrics = int(found.pop("metrics"))
        return StandsOn(**found), metrics
    except (ValueError, KeyError, TypeError) as error:
        raise MessageError(f"what the checkpoint stands on is damaged ({error})") from error


def with_rounds(data: bytes, rounds: int) -> bytes:
    """Return a checkpoint whose recipe has so many rounds; as it is where it states none.  MessageError when it is damaged."""
    message = messages.decode(data, any_size=True)
    scalars = dict(message.payload.scalars)
    if ON not in scalars:
        return data
    on, metrics = _stated(str(scalars[ON]))
    on = replace(on, recipe={**on.recipe, "rounds": rounds})
    scalars[ON] = _on_text(on, metrics)
    return messages.encode(replace(message, payload=Payload(message.payload.arrays, scalars)))


def _on_text(on: StandsOn, metrics: int) -> str:
    return json.dumps({**asdict(on), "metrics": metrics}, ensure_ascii=False)


def kept_in(payload: Payload) -> Kept:
    """Return the clients' memories that a checkpoint stands on; {} where it names none."""
    if f"{KEPT}/client" not in payload.arrays:
        return {}
    columns = [payload.array(f"{KEPT}/{name}").tolist() for name in ("client", "round", "crc")]
    return {client: (round, crc) for client, round, crc in zip(*columns, strict=True)}


def decode(data: bytes) -> Payload:
    """Decode a checkpoint's payload; MessageError when it is damaged."""
    return messages.decode(data, any_size=True).payload


def pack(state: Any, totals: Totals) -> Payload:
    """Return everything that a resumed run needs, as one payload."""
    arrays: dict[str, np.ndarray] = {}
    scalars: dict[str, Scalar] = {
        "totals": json.dumps([totals.bytes_up, totals.bytes_down, totals.seconds, totals.wall])
    }
    for name, value in state._asdict().items():
        _put(f"state/{name}", value, arrays, scalars)
    return Payload(arrays, scalars)


def unpack(payload: Payload, like: Any) -> tuple[Any, Totals]:
    """Return (state, totals) from a checkpoint; `like` is a state of the same method (from `init`).

    MessageError when a field is missing.
    """
    values = {name: _get(f"state/{name}", kind, payload) for name, kind in like._asdict().items()}
    return type(like)(**values), Totals(*json.loads(_get("totals", "", payload)))


def saved(run: rundir.RunDir, round: int) -> Payload | None:
    """Return the checkpoint of a round; None when there is none (any more), or none that can be read."""
    path = dict(rundir.checkpoints(run.path)).get(round)
    try:
        return None if path is None else decode(read_bytes(path))
    except (MessageError, OSError):
        return None


def _put(path: str, value: Any, arrays: dict[str, np.ndarray], scalars: dict[str, Scalar]) -> None:
    if isinstance(value, Ledger):
        scalars[path] = value.head.to_json()
        arrays.update({f"{path}/{name}": getattr(value, field) for name, field in ENTRIES.items()})
    elif isinstance(value, dict):
        arrays.update({f"{path}/{name}": array for name, array in value.items()})
    elif isinstance(value, np.ndarray):
        arrays[path] = value
    else:
        scalars[path] = value


def _get(path: str, like: Any, payload: Payload) -> Any:
    try:
        if isinstance(like, Ledger):
            head = LedgerHead.from_json(str(payload.scalars[path]))
            return Ledger(head, *(payload.arrays[f"{path}/{name}"].copy() for name in ENTRIES))
        if isinstance(like, dict):
            prefix = path + "/"
            return {n[len(prefix) :]: a.copy() for n, a in payload.arrays.items() if n.startswith(prefix)}
        if isinstance(like, np.ndarray):
            return payload.arrays[path].copy()
        return payload.scalars[path]
    except KeyError as missing:
        raise MessageError(f"the checkpoint lacks {missing}") from missing


# The best round -----------------------------------------------------------------------------------------


class Course(NamedTuple):
    """How the validation stands: the best round, its score, and the evaluated rounds since."""

    best: int | None = None  # None before the first score
    score: float = math.inf
    stale: int = 0

    def after(self, round: int, score: float | None) -> Course:
        """Return how it stands after a round was evaluated; one without a finite score counts as no better."""
        if score is not None and math.isfinite(score) and (self.best is None or score < self.score):
            return Course(round, score, 0)
        return self._replace(stale=self.stale + 1)

    def to_json(self) -> str:
        """Return it as a checkpoint holds it."""
        return json.dumps([self.best, self.score if self.best is not None else None, self.stale])

    @classmethod
    def from_json(cls, text: str) -> Course:
        """Read it from a checkpoint."""
        best, score, stale = json.loads(text)
        return cls(stale=stale) if best is None else cls(best, score, stale)


def best_files(run: Path) -> list[tuple[int, Path]]:
    """List the kept states of best rounds, oldest first."""
    found = [
        (re.fullmatch(r"best-(\d+)\.ckpt", p.name), p) for p in (run / "checkpoints").glob("best-*.ckpt")
    ]
    return sorted((int(m[1]), p) for m, p in found if m)


def keep_best(run: rundir.RunDir, round: int, data: bytes) -> None:
    """Write the state of a best round."""
    write_atomic(_best_file(run.path, round), data, mode=PRIVATE)


def read_best(run: Path, round: int) -> Payload:
    """Read the checkpoint of a best round; MessageError when it is damaged or gone."""
    try:
        return decode(read_bytes(_best_file(run, round)))
    except OSError as error:
        raise MessageError(
            f"the state of the best round, {round}, cannot be read: {error.strerror}"
        ) from error


def best_state(run: Path, round: int, like: Any) -> Any:
    """Return the state of a best round, as `unpack` does; MessageError when it is damaged or gone."""
    return unpack(read_best(run, round), like)[0]


def forget_bests(run: rundir.RunDir) -> None:
    """Remove the states of best rounds that no checkpoint needs any more."""
    oldest = min((number for number, _ in rundir.checkpoints(run.path)), default=0)
    needed = max((number for number, _ in best_files(run.path) if number <= oldest), default=0)
    for number, path in best_files(run.path):
        if number < needed:
            path.unlink(missing_ok=True)


def cut_bests(run: rundir.RunDir, round: int) -> None:
    """Remove those of rounds after `round`, which a kill left."""
    for number, path in best_files(run.path):
        if number > round:
            path.unlink(missing_ok=True)


def _best_file(run: Path, round: int) -> Path:
    return run / "checkpoints" / f"best-{round:06d}.ckpt"


def released(run: Path) -> int:
    """Return how many releases a run has made; StorageError where its file does not say so, or fewer than it has rounds."""
    file, count, why = run / RELEASES, 0, "is gone"
    try:
        text = read_text(file)
        count = int(text.partition(" ")[0])
        why = f"says {count}" if text == _count_text(count) else "is damaged"
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        why = "is damaged"
    rounds = max((round for round, _ in rundir.checkpoints(run)), default=0)
    rounds = max([rounds, *(int(e["round"]) for e in rundir.events(run) if e["event"] == "round")])
    if why == "is damaged" or count < rounds:
        raise StorageError(
            f"{file} {why}, and the run has released {counted(rounds, 'round')} or more: what it has spent of its privacy "
            "is not known",
            hint=f"bring that file back as it was, or begin a new run: fleetune tune -c {quoted(run / 'run.toml')}",
        )
    return count


class Releases:
    """The releases of an open run: how many there were, and how many its budget allows."""

    def __init__(
        self, run: rundir.RunDir, epsilon: Callable[[int], float], within: Callable[[int, int], int]
    ) -> None:
        """`epsilon(n)` is spent by n releases; `within(rounds, n)` is how many of so many rounds may follow them."""
        self.count = released(run.path)
        self._run, self._epsilon, self._within = run, epsilon, within

    @property
    def epsilon(self) -> float:
        """Return what is spent."""
        return self._epsilon(self.count)

    def left(self, rounds: int) -> int:
        """Return how many of so many rounds the budget allows from now on."""
        return self._within(rounds, self.count)

    def check_left(self, rounds: int) -> None:
        """StorageError where no round is left to a run that has none: its result would be the start."""
        if not self.left(rounds):
            raise StorageError(
                f"no checkpoint of a round is left in {self._run.path}, and the privacy budget is spent",
                hint="put a good copy of a checkpoint back, or begin a new run: "
                f"fleetune tune -c {quoted(self._run.path / 'run.toml')}",
            )

    def add(self) -> None:
        """Count a release that is about to be made."""
        self._run.write(RELEASES, _count_text(self.count + 1), private=True)
        self.count += 1


def _count_text(count: int) -> str:
    return f"{count} {zlib.crc32(str(count).encode()):08x}\n"
