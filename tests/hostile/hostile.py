"""What the hostile corpus is made with: the mutations of a file, a limit of time, and the one question it asks.

Nothing is stored: every hostile file is made from an honest one by a rule, so the corpus is the same everywhere.
"""

import faulthandler
import json
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fault_report import Injected
from fleetune.errors import FleetuneError, MessageError

SECONDS = 10  # of processor time that a hostile file may cost; six times that by the clock
DEEP = 100_000  # brackets; a parser that recurses fails at a few thousand
GONE = None
Damaged = Iterable[tuple[str, Callable[[], object]]]
OTHER_JSON: Mapping[str, bytes] = {
    **{text: text.encode() for text in ("[]", "null", "5", '"x"', "{}", "NaN")},
    "deep list": b"[" * DEEP,
    "deep object": b'{"a":' * DEEP,
    "deep whole": b"[" * DEEP + b"]" * DEEP,
    "list of lists": b"[[1]]",
    "huge number": b"9" * 5000,
    "twice": b"{} {}",
}
ODD_VALUES = (None, True, 0, -1, 2**31 - 1, 2**70, 1e30, float("nan"), float("inf"), "x", "", [], [[1]], {})
OTHER_VALUES: Mapping[str, Any] = {repr(value): value for value in ODD_VALUES}


def mutants(data: bytes, *, is_json: bool = False, seed: str = "") -> dict[str, bytes | None]:
    """Return what becomes of a file: cut, with a bit flipped, empty, noise, gone, and other JSON."""
    rng = random.Random(f"{seed}/{len(data)}")
    found: dict[str, bytes | None] = {
        "cut in half": data[: len(data) // 2],
        "without its last byte": data[:-1],
        "its first 9 bytes": data[:9],
        "empty": b"",
        "noise": rng.randbytes(300),
        "as long, noise": rng.randbytes(len(data)),
        "zeros": bytes(len(data)),
        "with more at its end": data + b"\0" * 64,
        "gone": GONE,
    }
    for i in range(6):
        flipped = bytearray(data)
        flipped[rng.randrange(min(len(data), 64 if i % 2 else len(data)))] ^= 1 << rng.randrange(8)
        found[f"bit {i} flipped"] = bytes(flipped)
    return {**found, **OTHER_JSON} if is_json else found


def values(data: bytes, *, keys: Callable[[str], bool] = lambda key: True) -> dict[str, bytes]:
    """Return a JSON object with each of its keys taken away, and with each of the other values for it."""
    whole = json.loads(data)
    found = {}
    for key in filter(keys, whole):
        found[f"{key} gone"] = json.dumps({k: v for k, v in whole.items() if k != key}).encode()
        for name, value in OTHER_VALUES.items():
            found[f"{key} = {name}"] = json.dumps({**whole, key: value}).encode()
    return found


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Change a message's body in one to four places."""
    body = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, len(body)))
        match rng.randrange(4):
            case 0:
                body[at : at + 1] = rng.randbytes(1)
            case 1:
                del body[at : at + rng.randint(1, 9)]
            case 2:
                body[at : at + rng.randint(0, 4)] = rng.randbytes(rng.randint(1, 9))
            case 3:  # the heads of lists, maps, texts and numbers
                body[at : at + 1] = rng.choice(b"\xc1\xdc\xdd\xdf\xc6\xc9\xd9\x94\xcf\xcb").to_bytes()
    return bytes(body)


def put(path: Path, data: bytes | None) -> None:
    """Write a file anew, or take it away."""
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)


class NoEnd(BaseException):
    """The work did not end within its time."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise NoEnd after so many seconds of processor time, so that a busy machine changes nothing.

    What waits, or is in code that no signal reaches, ends the whole test run after six times as many by the clock.
    """

    def late(signum: int, frame: Any) -> None:
        raise NoEnd(f"no end within {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    faulthandler.dump_traceback_later(6 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def refusal(work: Callable[[], object], seconds: float = SECONDS) -> str | None:
    """Do the work; return our own error's text, or None when it was accepted.  Anything else is raised."""
    try:
        with within(seconds):
            work()
    except FleetuneError as found:
        error = found
    else:
        return None
    assert len(error.message) < 2_000, f"a reason of {len(error.message)} characters"
    assert error.hint or isinstance(error, MessageError), f"no word of what to do: {error}"
    return error.message


def survived(kind: str, damaged: Damaged, use: Callable[[], object], injected: Injected) -> dict[str, int]:
    """Make each damaged file and use it: refused and accepted are counted; any other error, or no end, is a fault."""
    counts, faults = {"refused": 0, "accepted": 0}, []
    for what, make in damaged:
        make()
        try:
            counts["refused" if refusal(use) else "accepted"] += 1
        except (Exception, NoEnd) as error:
            faults.append(f"{what}: {type(error).__name__}: {str(error)[:150]}")
    done = sum(counts.values())
    injected(kind, done + len(faults), survived=done)
    assert not faults, f"{len(faults)} of {done + len(faults)}:\n" + "\n".join(faults)
    return counts
