"""Gather the replies of a round: check each, leave out those that go too far, and hand the rest to the method.

A reply that goes much further (`Method.distance`) than the median of its round is refused (`allowed`; Sun et al. 2019, arXiv
1911.07963, cut such an update down to the bound instead); docs/safety.md has the rules.  Claimed rows excuse a longer way: under
every rule but the plain mean, at most `EXCUSED` times; under `mean:TIMES`, rows times `reach`, the distance of the same reply
from a client with the median rows, stay within the bound too.  Few numbers vary by chance, so a reply of few may go further; how
few is what was agreed, not what came.  Replies lie on disk until the last has come, and are handed over in the clients' order.
With `keep_replies` each is stored for good, in a message of its own, behind the length of that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

from fleetune.common.events import ClientReply
from fleetune.common.files import PRIVATE, regular, write_atomic
from fleetune.common.memory import rss
from fleetune.errors import FAULTS, FleetError, MessageError, StorageError, cut_reason, fault
from fleetune.runs.rundir import RunDir, replies_file
from fleetune.tuning.exchange import messages
from fleetune.tuning.exchange.aggregation import FEWEST, IN_MEMORY, MEAN, Rule, Spool, usual
from fleetune.tuning.exchange.messages import NotFiniteError, Payload, ReplySpec, check, decode
from fleetune.tuning.methods import Method, Reply
from fleetune.tuning.rounds.fleets import Answer

log = logging.getLogger(__name__)

# docs/safety.md has what honest replies reach
FURTHEST: Final = 4.0  # times the median distance of a round's replies, for replies of many numbers
APART: Final = 4.0  # times as far: honest replies of one kind, by the median of all kinds
EXCUSED: Final = 2.0  # times as far, by rows that a client says it has: random steps do so where they are four times as many
STEPS: Final = "; with many more rows, it takes more steps: --set steps=N gives all clients as many"
LENGTH: Final = 8  # bytes of a stored reply's length
FEW: Final = 8  # numbers in a reply with which it may go twice as far: few slopes vary by chance


class Kept(NamedTuple):
    """A reply that has passed its check: whose, where its bytes lie, and how far it goes."""

    answer: Answer  # without its data
    offset: int
    size: int
    kind: frozenset[str]  # names of its arrays
    bound: float  # how many times as far as the median it may go
    distance: float
    n: int  # rows that it counts; 0 where the method sends none
    reach: float  # the distance of the same reply from a client with the median rows


class Round(NamedTuple):
    """What the replies of a round are checked against."""

    number: int
    base: bytes  # first 8 bytes of the base digest
    rows: Sequence[int]  # of every client
    state: Any
    kind: Callable[[int], int] = lambda client: 0  # of a client that was asked
    usual: int = 0  # median rows of the clients that were asked


class Replies:
    """The replies of one round, one at a time; every client's outcome is recorded by `emit`."""

    def __init__(
        self,
        method: Method,
        round: Round,
        run: RunDir,
        emit: Callable[[ClientReply], None],
        rule: Rule = MEAN,
        max_rows: int = 0,
        private: bool = False,
    ) -> None:
        """With `private`, nothing that tells of a client's rows is recorded."""
        self.method, self.round, self.emit, self.private = method, round, emit, private
        self.kinds = method.kinds(round.state)
        self.kept: list[Kept] = []
        self.asked = self.failed = self.not_finite = 0  # failed: refused ones included
        self.bytes_up = self.bytes_down = 0
        self.reason = ""  # of the first that failed
        self._spool = Spool(run.path, IN_MEMORY)
        self._folder = run.path
        self.rule = replace(rule, spool=self._spool)
        self.doubted = rule.name != "mean" or rule.times < math.inf  # rows are what devices say
        self.most = min(max_rows or math.inf, rule.times * round.usual if rule.times < math.inf else math.inf)
        self._in_hand: Kept | None = None

    def __enter__(self) -> Replies:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._spool.close()

    @property
    def accepted(self) -> int:
        """Number of replies that count."""
        return len(self.kept)

    @property
    def mostly_not_finite(self) -> bool:
        """Whether the replies of most that were asked, and of two at least, are refused for not being finite."""
        return self.not_finite > max(1, self.asked / 2)

    def lost(self, why: str) -> None:
        """Count a round whose replies could not be added up as one in which all failed."""
        self.kept.clear()
        self.failed, self.reason = max(1, self.asked), self.reason or why
        self.asked = self.failed

    # As they come ---------------------------------------------------------------------------------------

    def gather(self, answers: Iterator[Answer]) -> None:
        """Take every answer of the round; afterwards `kept` holds those that count."""
        for answer in answers:
            self.asked += 1
            self.bytes_down += answer.sent
            self.bytes_up += len(answer.data or b"")
            self._take(answer)
        # else no client may decide whether another counts: the clip is the bound
        if self.rule.privacy is None:
            self._compare()
        self.kept.sort(key=lambda kept: kept.answer.client)

    def _compare(self) -> None:
        """Refuse replies that go too far beside the others, and let rows weigh less."""
        for kept, reason in too_far(self.kept, FEWEST - self.doubted):
            self._refuse(kept, reason)
        for kept, rows in lighter(self.kept) if self.rule.times < math.inf else ():
            if rows:
                self.kept[self.kept.index(kept)] = kept._replace(n=rows)
            else:
                self._refuse(kept, "it goes so far that not one of its rows may count")

    def _take(self, answer: Answer) -> None:
        payload, status, reason = None, answer.status, cut_reason(answer.reason)
        if answer.data is not None:
            try:
                payload = self._checked(answer, answer.data)
            except MessageError as error:
                self.not_finite += isinstance(error, NotFiniteError)
                status, reason = "refused", str(error)
        if status in ("refused", "failed"):
            self._count_failure(answer, status, reason)
        self._record(answer, payload, status, reason)

    def _checked(self, answer: Answer, data: bytes) -> Payload:
        asked = self.round
        sent, spec = self.kinds[asked.kind(answer.client)]
        payload = check(decode(data), spec, round=asked.number, base=asked.base)
        n = _rows_of(payload, asked.rows[answer.client], self.most, self.private)

        def distance_with(rows: int) -> float:
            if not spec.arrays:  # it says that it is done, no more
                return 0.0
            return self.method.distance(asked.state, sent, _reply(answer.client, answer.key, payload, rows))

        try:
            rows = payload.int("n") if n else 0
            distance = distance_with(rows)
            reach = distance_with(asked.usual) if n and self.doubted else distance
        except (MessageError, MemoryError):
            raise
        except FAULTS as error:
            log.info("the reply of client %d cannot be measured", answer.client, exc_info=True)
            raise MessageError(f"it cannot be measured ({fault(error)})") from error
        self.kept.append(
            Kept(
                answer._replace(data=None),
                self._spool.store(data),
                len(data),
                frozenset(payload.arrays),
                allowed(agreed(spec)),
                max(distance, reach / EXCUSED),
                n,
                reach,
            )
        )
        return payload

    # Added up -------------------------------------------------------------------------------------------

    def aggregate(self) -> Any:
        """Return the method's new state; a reply on which it fails is refused.

        FleetError when it fails on no reply in particular.
        """
        while True:
            try:
                return self.method.aggregate(self.round.state, self._each(), self.rule)
            except (StorageError, MemoryError):
                raise
            except FAULTS as error:
                if self._in_hand is None:
                    raise FleetError(
                        f"the replies of round {self.round.number} cannot be added up ({fault(error)})",
                        hint="the model of the round before is kept; see log.txt in the run folder",
                    ) from error
                log.info("the reply of client %d cannot be used", self._in_hand.answer.client, exc_info=True)
                reason = cut_reason(f"it cannot be used ({fault(error)})")
                self._refuse(self._in_hand, reason)

    def _each(self) -> Iterator[Reply]:
        for kept in tuple(self.kept):
            self._in_hand = kept
            payload = decode(self._spool.read(kept.offset, kept.size)).payload
            yield _reply(kept.answer.client, kept.answer.key, payload, kept.n)
        self._in_hand = None

    def keep(self, good: bool) -> None:
        """Store what the round counts, before its checkpoint: nothing unless it is `good`."""
        file = replies_file(self._folder, self.round.number)
        write_atomic(file, map(self._stored, self.kept if good else ()), mode=PRIVATE)

    def _stored(self, kept: Kept) -> bytes:
        data, answer = self._spool.read(kept.offset, kept.size), kept.answer
        told = Payload({}, {"client": answer.client, "key": answer.key, "n": kept.n, "reply": data})
        data = messages.encode(messages.Message(self.round.number, self.round.base, told))
        return len(data).to_bytes(LENGTH, "little") + data

    # One reply ------------------------------------------------------------------------------------------

    def _refuse(self, kept: Kept, reason: str) -> None:
        """Leave out a reply that had been taken; its client's event is written again."""
        self.kept.remove(kept)
        self._count_failure(kept.answer, "refused", reason)
        self._record(kept.answer, None, "refused", reason, size=kept.size)

    def _count_failure(self, answer: Answer, status: str, reason: str) -> None:
        log.warning("round %d: client %d %s: %s", self.round.number, answer.client, status, reason)
        self.failed += 1
        self.reason = self.reason or reason

    def _record(
        self, answer: Answer, payload: Payload | None, status: str, reason: str, size: int = 0
    ) -> None:
        scalars = payload.scalars if payload and not self.private else {}
        self.emit(
            ClientReply(
                round=self.round.number,
                client=answer.client,
                n=scalars.get("n"),
                loss=scalars.get("loss"),
                bytes_up=size or len(answer.data or b""),
                bytes_down=answer.sent,
                seconds=round(answer.seconds, 3),
                rss=rss(),
                status=status,
                reason=reason,
                steps=None if self.private else answer.steps,
                tokens=None if self.private else answer.tokens,
            )
        )


def stored(run: Path, round: int) -> Iterator[Reply]:
    """Yield the replies that a round has counted, as its method got them; MessageError or OSError where they are not whole."""
    with open(replies_file(run, round), "rb", opener=regular) as file:
        while length := file.read(LENGTH):
            message = decode(file.read(int.from_bytes(length, "little")), any_size=True)
            told = message.payload
            if message.round != round or not isinstance(data := told.scalars.get("reply"), bytes):
                raise MessageError(f"what is stored is no reply of round {round}")
            yield _reply(told.int("client"), told.int("key"), decode(data).payload, told.int("n"))


def _reply(client: int, key: int, payload: Payload, n: int) -> Reply:
    """Return a reply as its method gets it; `n` are the rows that it counts, 0 where it has none."""
    if not n:
        return Reply(client, key, payload)
    counting = Payload(payload.arrays, {**payload.scalars, "n": n})
    return Reply(client, key, counting, payload.int("n"))


def _rows_of(payload: Payload, rows: int, most: float, private: bool) -> int:
    """Return how many rows a reply counts, 0 where none are sent; MessageError for more than the client is known to have."""
    claimed = payload.scalars.get("n")
    if not isinstance(claimed, int):
        return 0
    if claimed > rows:
        raise MessageError(
            "reply claims more rows than the client has"
            if private
            else f"reply claims {claimed} rows, the client has {rows}"
        )
    return int(min(claimed, most))


def lighter(kept: Sequence[Kept]) -> list[tuple[Kept, int]]:
    """Return the replies whose rows times reach are more than `bound` times the medians of their kind, and how many are not."""
    found = []
    for same in by_kind(kept):
        middle = usual_distance([k.reach for k in same], FEWEST - 1) * usual([k.n for k in same])
        found += [(k, int(k.bound * middle / k.reach)) for k in same if k.n * k.reach > k.bound * middle]
    return found


def too_far(kept: Sequence[Kept], fewest: int = FEWEST) -> list[tuple[Kept, str]]:
    """Return the replies that go too far, each with the reason: more than `bound` times the median of their kind.

    The median is the lower one, of those that move anything: silence is usual where a step rounds to nothing.  A kind of fewer
    than `fewest` that do has none.  Where two are enough, no median is more than `APART` times that of all kinds; and of two,
    one is refused that goes too far by `reach` as well: the other may look short by its claim, or it has many more rows.
    """
    found = []
    for same in by_kind(kept):
        ways = [attrgetter("distance")]
        if sum(k.distance > 0 for k in same) < FEWEST:
            ways.append(attrgetter("reach"))
        middles = [usual_distance([far(k) for k in same], fewest) for far in ways]
        if fewest < FEWEST:
            everyone = [APART * usual_distance([far(k) for k in kept], fewest) for far in ways]
            middles = list(map(min, middles, everyone))
        for k in same:
            times = min(far(k) / middle for far, middle in zip(ways, middles, strict=True))
            if not times <= k.bound:
                reason = f"it goes {times:.3g} times as far as the median of the round, {k.bound:.3g} at most"
                found.append((k, reason + STEPS if k.reach > k.distance else reason))
    return found


def by_kind(kept: Sequence[Kept]) -> list[list[Kept]]:
    """Return the replies of each kind."""
    return [[k for k in kept if k.kind == kind] for kind in dict.fromkeys(k.kind for k in kept)]


def agreed(spec: ReplySpec) -> int:
    """Return how many numbers a reply of this form has at most."""
    return sum(math.prod(map(abs, shape)) for _, shape in spec.arrays.values())


def allowed(numbers: int) -> float:
    """Return how many times as far as the median an honest reply of so many numbers may go."""
    return FURTHEST * (1 + FEW / max(1, numbers))


def usual_distance(distances: Sequence[float], fewest: int = FEWEST) -> float:
    """Return the lower median of the distances that are not 0; infinity where fewer than `fewest` are."""
    return usual(distances) if sum(d > 0 for d in distances) >= fewest else math.inf
