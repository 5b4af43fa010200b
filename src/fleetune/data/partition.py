"""Partition rows over clients as federated papers do, and hold rows out for evaluation.

    iid                       rows at random, sizes equal to within one
    dirichlet:ALPHA:COLUMN    for each value v of COLUMN, the shares of the clients in v's rows are drawn as
                              p_v ~ Dir(ALPHA * 1_K), and a client that already holds N/K rows gets no more
                              (Hsu et al. 2019, arXiv 1909.06335; Li et al. 2021, arXiv 2102.02079; FedIT's Shepherd)
    column:COLUMN             one client per value of COLUMN: clients that exist in the data

Random words are Philox's, the same on every platform.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from fleetune.common.display import counted
from fleetune.data import columns as named
from fleetune.data.forms import CLIENT, Example
from fleetune.data.read_rows import BAD_SHARE, is_folder, read
from fleetune.errors import DataError, RecipeError, closest

Indices = npt.NDArray[np.int64]
Strata = list[tuple[str, Indices]]

KINDS = ("iid", "dirichlet", "column")
AUTO = "auto"  # column:client where the data name clients, else iid
FORMS = "iid, dirichlet:ALPHA:COLUMN or column:COLUMN"
EVEN = 1e9  # an alpha above this is as even as this one, and could overflow
DRAWS = 10  # Dirichlet draws before rows are moved to clients that got too few
# Streams of one seed: far above the pass numbers that `Batches` uses, and apart from each other.
HOLD_OUT, IID, DIRICHLET, TOP_UP = ((1 << 32) + i for i in (0, 1, 3, 4))


class PartitionSpec(NamedTuple):
    """A parsed partition: `alpha` only for dirichlet."""

    kind: str
    column: str = ""
    alpha: float = 0.0


def _philox(key: int, stream: int) -> np.random.Philox:
    return np.random.Philox(key=key % 2**64, counter=np.array([0, 0, 0, stream], dtype=np.uint64))


def keyed_order(key: int, stream: int, n: int) -> Indices:
    """Return a random permutation of range(n), int64, fixed by `key` (taken mod 2^64) and `stream`.

    It sorts n raw Philox words, which no platform or numpy version changes (Generator.permutation may).
    """
    return np.argsort(_philox(key, stream).random_raw(n), kind="stable").astype(np.int64)


def check_partition_spec(spec: str) -> None:
    """Check a partition's spelling without any data; RecipeError says what is wrong with it."""
    if spec != AUTO:
        _parse(spec)


def partition(
    examples: Sequence[Example], spec: str, clients: int | None, seed: int, min_rows: int = 1
) -> list[Indices]:
    """Split the rows of `examples` over clients as `spec` says (see the module docstring): sorted int64 indices of each.

    Every row goes to exactly one of `clients` clients, and each gets at least `min_rows`: Dirichlet shares
    are drawn again up to 10 times, then rows move from the client with most rows to those with too few.
    With column:COLUMN the clients are the column's values in sorted order, without those that have fewer
    than `min_rows` rows, and only the `clients` largest if `clients` is given: the other rows are unused.

    RecipeError for a spec or number that cannot be, DataError when the rows do not allow it: an unknown
    column, or too few rows for so many clients.  Deterministic in (examples' columns, spec, clients, seed).
    """
    rule = _parse(spec)
    if min_rows < 1:
        raise RecipeError([f"min_rows must be at least 1, got {min_rows}"])
    if clients is not None and clients < 1:
        raise RecipeError([f"clients must be at least 1, got {clients}"])
    if rule.kind == "column":
        return _natural(_strata(examples, rule.column), rule.column, clients, min_rows)
    if clients is None:
        raise RecipeError(
            [f"partition {spec!r} needs a number of clients"],
            hint="set it with --clients N, or use column:COLUMN for the clients that are in the data",
        )
    n = len(examples)
    if clients * min_rows > n:
        raise DataError(
            f"no rows for a client: {counted(n, 'training row')} cannot give {counted(clients, 'client')} at least "
            f"{min_rows} each",
            hint=f"use at most {counted(n // min_rows, 'client')} (--clients {n // min_rows}), or give more data",
        )
    owner = np.empty(n, dtype=np.int64)
    if rule.kind == "iid":
        owner[keyed_order(seed, IID, n)] = np.arange(n) % clients
    else:
        owner = _dirichlet(_strata(examples, rule.column), clients, rule.alpha, seed, min_rows)
    return _lists(_top_up(owner, clients, min_rows, seed), clients)


def hold_out(
    examples: Sequence[Example], fraction_or_count: float, seed: int, column: str | None = None
) -> tuple[Indices, Indices]:
    """Set rows aside for evaluation: (training rows, held-out rows), two sorted int64 index arrays.

    `fraction_or_count` is a share below 1, of which at least one row comes, or a whole number of rows (0
    for none).  With `column`, each of its values gives its share to within one row (largest remainder),
    and keeps a row for training as long as others can give instead.  RecipeError for a number that cannot
    be, DataError for an unknown column or too few rows.  Deterministic in `seed`.
    """
    n = len(examples)
    if why := held_out_problem(fraction_or_count):
        raise RecipeError([f"held_out = {fraction_or_count}: {why}"])
    share = 0 < fraction_or_count < 1
    count = max(1, round(fraction_or_count * n)) if share else int(fraction_or_count)
    if count >= n:
        raise DataError(
            f"cannot hold out {count} of {counted(n, 'row')}: none would be left for training",
            hint="give more data, or the rows to measure on in a file of their own: --eval-data FILE"
            if n == 1
            else f"hold out fewer rows (--held-out {n - 1} at most), or give more data",
        )
    strata = _strata(examples, column) if column is not None else [("", np.arange(n, dtype=np.int64))]
    quotas = _quotas([len(rows) for _, rows in strata], count)
    rank = np.empty(n, dtype=np.int64)
    rank[keyed_order(seed, HOLD_OUT, n)] = np.arange(n)
    aside = np.zeros(n, dtype=bool)
    for (_, rows), quota in zip(strata, quotas, strict=True):
        aside[rows[np.argsort(rank[rows])[:quota]]] = True
    return np.flatnonzero(~aside), np.flatnonzero(aside)


def held_out_problem(number: float) -> str:
    """Say why `held_out` cannot be this number; "" for a share below 1 and for a whole number of rows."""
    fits = number >= 0 and (number < 1 or float(number).is_integer())
    return "" if fits else "must be a whole number of rows, such as 100, or a share below 1, such as 0.1"


def _parse(spec: str) -> PartitionSpec:
    """Parse a partition's spelling; RecipeError when it is none."""
    kind, _, rest = spec.partition(":")
    if kind not in KINDS:
        near = closest(kind, KINDS)
        raise RecipeError(
            [f"partition {spec!r}: no kind {kind!r}" + (f"; did you mean {near!r}?" if near else "")],
            hint=f"write one of {FORMS}",
        )
    if (kind == "iid" and not rest) or (kind == "column" and rest):
        return PartitionSpec(kind, rest)
    alpha, _, column = rest.partition(":")
    if kind == "dirichlet" and alpha and column:
        return PartitionSpec(kind, column, _alpha(spec, alpha))
    raise RecipeError([f"partition {spec!r} is not complete"], hint=f"write one of {FORMS}")


def column_of(spec: str) -> str | None:
    """Return the column that a partition divides by, None for one without."""
    return _parse(spec).column or None


def _alpha(spec: str, written: str) -> float:
    try:
        alpha = float(written)
    except ValueError:
        alpha = math.nan
    if not (math.isfinite(alpha) and alpha > 0):
        raise RecipeError(
            [f"partition {spec!r}: alpha must be a number greater than 0, got {written!r}"],
            hint="0.1 is strongly skewed, 0.5 is usual, 100 is nearly even: dirichlet:0.5:category",
        )
    return min(alpha, EVEN)


def _strata(examples: Sequence[Example], column: str) -> Strata:
    """Return the values of `column` in sorted order, each with its rows; DataError if any row lacks it, or has it empty."""
    missing = [i for i, example in enumerate(examples) if not example.meta.get(column, "").strip()]
    if not missing:
        values = np.array([example.meta[column] for example in examples], dtype=object)
        names, codes = np.unique(values, return_inverse=True) if len(values) else (values, np.zeros(0, int))
        return [(str(name), np.flatnonzero(codes == code)) for code, name in enumerate(names)]
    columns = sorted(set().union(*(example.meta for example in examples)))
    if column in columns:
        raise DataError(
            f"column {column!r} is missing in {len(missing)} of {len(examples)} rows, first in "
            + (examples[missing[0]].where or f"row {missing[0] + 1}"),
            hint=f"fill in {column!r} in every row, or delete those rows",
        )
    near = closest(column, columns)
    raise DataError(
        f"no column {column!r} in the data" + (f"; did you mean {near!r}?" if near else ""),
        hint=f"columns beside texts: {', '.join(columns)}" if columns else "there are no columns: use iid",
    )


def _quotas(sizes: Sequence[int], count: int) -> list[int]:
    """Share `count` over strata in proportion to `sizes`, by largest remainder, in exact integers.

    Each stratum keeps a row as long as there are others to take it from.
    """
    total = sum(sizes)
    caps = [size - 1 for size in sizes]
    if sum(caps) < count:
        caps = list(sizes)
    quotas = [min(count * size // total, cap) for size, cap in zip(sizes, caps, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda v: (-(count * sizes[v] % total), v))
    while sum(quotas) < count:
        for v in by_remainder:
            if quotas[v] < caps[v] and sum(quotas) < count:
                quotas[v] += 1
    return quotas


def _natural(strata: Strata, column: str, clients: int | None, min_rows: int) -> list[Indices]:
    """Return the column's values as clients: those with `min_rows` rows, the `clients` largest of them."""
    able = [rows for _, rows in strata if len(rows) >= min_rows]
    wanted = len(able) if clients is None else clients
    if wanted > len(able) or not able:
        raise DataError(
            f"no rows for a client: column {column!r} has {len(able)} values with at least {min_rows} rows"
            + ("" if clients is None else f", {clients} clients were asked for"),
            hint="ask for fewer clients, or split by another column or with iid",
        )
    largest = sorted(range(len(able)), key=lambda v: (-len(able[v]), v))[:wanted]
    return [able[v] for v in sorted(largest)]


def _dirichlet(strata: Strata, clients: int, alpha: float, seed: int, min_rows: int) -> Indices:
    """Return the owner of each row by label skew: the first draw that gives all `min_rows`, else the best one."""
    rng = np.random.Generator(_philox(seed, DIRICHLET))
    best, least = np.empty(0, dtype=np.int64), math.inf
    for _ in range(DRAWS):
        owner = _dirichlet_draw(strata, clients, alpha, rng)
        sizes = np.bincount(owner, minlength=clients)
        short = int(np.maximum(min_rows - sizes, 0).sum())
        if short < least:
            best, least = owner, short
        if short == 0:
            break
    return best


def _dirichlet_draw(strata: Strata, clients: int, alpha: float, rng: np.random.Generator) -> Indices:
    """Draw once: for each value of the column, p ~ Dir(alpha) over the clients with fewer than N/K rows.

    (Zeroing the others in a draw over all clients and rescaling it, as the papers' code does, is the same
    law, but leaves nothing to rescale when alpha is small.)  A client gets p times the value's rows,
    rounded by systematic sampling: one uniform offset per value, so that rounding favours no client.
    """
    n = sum(len(rows) for _, rows in strata)
    owner = np.empty(n, dtype=np.int64)
    sizes = np.zeros(clients, dtype=np.int64)
    for _, rows in strata:
        able = np.flatnonzero(sizes < n / clients)
        p = rng.dirichlet(np.full(len(able), alpha))
        ends = np.floor(np.cumsum(p) * len(rows) + rng.random()).astype(np.int64)
        ends = np.minimum(ends, len(rows))
        ends[np.flatnonzero(p)[-1] :] = len(rows)  # a sum of p just below 1 must not lose the last row
        counts = np.diff(ends, prepend=0)
        shuffled = rows[np.argsort(rng.bit_generator.random_raw(len(rows)), kind="stable")]
        owner[shuffled] = np.repeat(able, counts)
        sizes[able] += counts
    return owner


def _top_up(owner: Indices, clients: int, min_rows: int, seed: int) -> Indices:
    """Move random rows from the client with most rows to the clients with fewer than `min_rows`."""
    sizes = np.bincount(owner, minlength=clients)
    if sizes.min() >= min_rows:
        return owner
    rows_of: list[list[int]] = [[] for _ in range(clients)]
    for row in keyed_order(seed, TOP_UP, len(owner)).tolist():
        rows_of[owner[row]].append(row)
    for poor in np.flatnonzero(sizes < min_rows).tolist():
        while sizes[poor] < min_rows:
            rich = int(sizes.argmax())
            owner[rows_of[rich].pop()] = poor
            sizes[rich] -= 1
            sizes[poor] += 1
    return owner


def _lists(owner: Indices, clients: int) -> list[Indices]:
    by_owner = np.argsort(owner, kind="stable")
    sizes = np.bincount(owner, minlength=clients)
    return np.split(by_owner, np.cumsum(sizes)[:-1])


CLIENT_COLUMNS: Final = ("client", "user", "device", "site", "author", "speaker")  # also with "id"
FEW_CLIENTS: Final = 8  # most methods' usual number, which stands however few the rows are
ROWS_EACH: Final = 8  # rows of a client at least where a method's usual clients are more than that


@dataclass(frozen=True)
class Split:
    """The rows of a run: who holds what, and what nobody trains on."""

    examples: Sequence[Example]
    clients: Sequence[np.ndarray]  # indices of examples
    held: np.ndarray
    column: str | None
    partition: str = "iid"  # as it was done: never `auto`
    notes: tuple[str, ...] = ()  # what of the rows was left out

    def trained_too(self) -> list[int]:
        """Return which held-out rows equal one that a client trains on."""
        training = {self.examples[i].content for part in self.clients for i in part.tolist()}
        return [i for i in self.held.tolist() if self.examples[i].content in training]

    def about_held(self) -> list[str]:
        """Say which held-out rows are trained on too; [] where none is."""
        if not (found := self.trained_too()):
            return []
        shown = ", ".join(self.examples[i].where for i in found[:5]) + (", .." if len(found) > 5 else "")
        are = "row is" if len(self.held) == 1 else "rows are"
        return [
            f"{len(found):,} of {len(self.held):,} held-out {are} trained on too ({shown}): the held-out loss flatters"
        ]


@dataclass(frozen=True)
class RowsSpec:
    """Where rows come from and how they are divided, as the recipe's options of these names say."""

    data: str
    columns: str = ""
    strict: bool = False
    dedupe: bool = False
    train_turns: str = "last"
    eval_data: str = ""
    limit: int = 0
    partition: str = AUTO
    held_out: float = 0.1
    clients: int = 0
    seed: int = 42

    @property
    def rule(self) -> str:
        """The partition; `auto` is column:client where the data name clients, as a folder of files does, else iid."""
        if self.partition != AUTO:
            return self.partition
        return f"column:{CLIENT}" if is_folder(self.data) or CLIENT in named.parse(self.columns) else "iid"


def split(rows: RowsSpec, usual_clients: int, *, fewer: bool = False, offline: bool = False) -> Split:
    """Read the data, hold rows out, and give every other row to a client; `usual_clients` where no number is asked for.

    With `fewer`, these are as many as there are rows where the rows are too few.
    DataError when the data do not allow it.
    """
    notes: list[str] = []
    rows_in = partial(read, offline=offline, columns=rows.columns, strict=rows.strict, note=notes.append)
    examples = rows_in(rows.data, limit=rows.limit or None)
    rule = rows.rule
    column = column_of(rule)
    examples = _having(examples, column, rows.strict, notes) if column else examples
    if rows.eval_data:
        train = np.arange(len(examples))
        examples += rows_in(rows.eval_data)
        held = np.arange(len(train), len(examples))
    else:
        train, held = hold_out(examples, rows.held_out, rows.seed, column)
    if rows.dedupe or not rows.eval_data:
        examples, train, held = _apart(examples, train, held, notes, dedupe=rows.dedupe)
    if not len(held) or not len(train):
        raise DataError(
            f"the rows are too few: {len(examples)} in all, {len(train)} to train on and {len(held)} held out",
            hint="use more rows, or another --held-out",
        )
    usual_clients = min(usual_clients, len(train)) if fewer else usual_clients
    if (most := max(FEW_CLIENTS, len(train) // ROWS_EACH)) < usual_clients and not rows.clients:
        if not rule.startswith("column:"):
            notes.append(
                f"{counted(len(train), 'row')} are few for the method's usual {usual_clients} clients: {most} take part "
                "(--clients)"
            )
        usual_clients = most
    if rule == "iid" and (name := _like_clients(examples)):
        notes.append(
            f"the column {name!r} looks like clients, and is not used: --partition column:{name} follows it"
        )
    clients = rows.clients or (None if rule.startswith("column:") else usual_clients)
    parts = [train[part] for part in partition([examples[i] for i in train], rule, clients, rows.seed)]
    if unused := len(train) - sum(map(len, parts)):
        notes.append(f"left out: {counted(unused, 'row')} beyond the {clients} largest values of {column!r}")
    if rows.train_turns == "all":
        examples, parts = _every_turn(examples, parts)
    return Split(examples, parts, held, column, rule, tuple(dict.fromkeys(notes)))


def _having(examples: list[Example], column: str, strict: bool, notes: list[str]) -> list[Example]:
    """Leave out rows without a value of the column where they are few, and note two values that look like one."""
    found = [example for example in examples if example.meta.get(column, "").strip()]
    lacking, seen = len(examples) - len(found), dict[str, str]()
    if lacking > BAD_SHARE * len(examples) * (not strict):
        return examples  # and they are refused
    if lacking:
        notes.append(f"left out: {counted(lacking, 'row')} without a value of {column!r}")
    for value in sorted({example.meta[column] for example in found}):
        if (other := seen.setdefault("".join(value.casefold().split()), value)) != value:
            notes.append(f"{other!r} and {value!r} of {column!r} are two: write them alike if they are one")
            break
    return found


def _apart(
    examples: list[Example], train: Indices, held: Indices, notes: list[str], *, dedupe: bool
) -> tuple[list[Example], Indices, Indices]:
    """Leave out the training rows that equal a held-out one, with `dedupe` also those that equal an earlier one.

    Where no training row would be left, all stay.
    """
    known = {examples[i].content for i in held.tolist()}
    again: list[int] = []
    for i in train.tolist():
        if (content := examples[i].content) in known:
            again.append(i)
        elif dedupe:
            known.add(content)
    if not again or len(again) == len(train):
        return examples, train, held
    others = "held-out" + " or an earlier" * dedupe
    notes.append(f"left out: {counted(len(again), 'training row')} equal to a {others} one")
    stay = np.ones(len(examples), dtype=bool)
    stay[again] = False
    place = np.cumsum(stay) - 1
    kept = [example for example, stays in zip(examples, stay, strict=True) if stays]
    return kept, place[train[stay[train]]], place[held]


def _every_turn(examples: Sequence[Example], parts: Sequence[Indices]) -> tuple[list[Example], list[Indices]]:
    """Give each client its conversations' earlier answers as rows of their own."""
    found, more = list(examples), []
    for part in parts:
        begin = len(found)
        found += [turn for i in part.tolist() for turn in examples[i].earlier()]
        more.append(np.concatenate([part, np.arange(begin, len(found))]))
    return found, more


def _like_clients(examples: Sequence[Example]) -> str:
    """Return the column with such a name and several values, but fewer than there are rows; "" for none."""
    for name in examples[0].meta:
        values = {example.meta.get(name, "") for example in examples}
        named = name.lower().removesuffix("id").rstrip("_- ") in CLIENT_COLUMNS
        if named and 1 < len(values) < len(examples):
            return name
    return ""
