# SPDX-License-Identifier: Apache-2.0
"""Aggregation rules against numpy's own median and the papers' formulas, and in the methods, runs and ledgers."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fleetune
from fleetune import errors, models
from fleetune.models import tiny_llama
from fleetune.seeds import ledger as ledgers
from fleetune.tuning import methods
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.exchange.aggregation import MEAN, REDUCE, Rule, Spool, parse, trimmed
from fleetune.tuning.exchange.messages import LogCode, Message, Payload, encode
from fleetune.tuning.methods import fedit
from fleetune.tuning.rounds import checkpoint
from fleetune.tuning.rounds.fleets import Answer
from fleetune.tuning.rounds.replies import Replies, Round

RULES = [*REDUCE, "trimmed-mean:0.3"]


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spool]:
    opened = Spool(tmp_path_factory.mktemp("spool"), 1 << 10)
    yield opened
    opened.close()


def combined(rule: str, spool: Spool, values: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """float64[d]: what a rule makes of values[m, d], handed over in two tensors."""
    half = values.shape[1] // 2
    begun = {} if start is None else {"a": start[:half], "b": start[half:].reshape(1, -1)}
    taken = replace(parse(rule), spool=spool).combining(begun)
    for i, row in enumerate(values):
        taken.add(1.0 + i, {"a": row[:half], "b": row[half:].reshape(1, -1)})
    found = taken.tensors()
    assert taken.total == len(values)
    return np.concatenate([found["a"], found["b"].ravel()])


def drawn(seed: int, m: int, d: int) -> np.ndarray:
    """Numbers of many sizes, some of them equal, some 0."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(m, d)) * 10.0 ** rng.integers(-6, 7, (m, d))
    return np.where(rng.random((m, d)) < 0.2, 0.0, np.where(rng.random((m, d)) < 0.2, 1.5, values))


SEEDS = {"seed": st.integers(0, 999), "m": st.integers(1, 12), "d": st.integers(2, 30)}


# The rules --------------------------------------------------------------------------------------------


@given(**SEEDS)
@settings(max_examples=20)
def test_the_median_is_numpys(spool: Spool, seed: int, m: int, d: int) -> None:
    values = drawn(seed, m, d)
    assert np.array_equal(combined("median", spool, values), np.median(values, axis=0))


@given(**SEEDS, share=st.sampled_from(["0.1", "0.2", "0.25", "0.45"]))
@settings(max_examples=20)
def test_the_trimmed_mean_is_the_formula(spool: Spool, seed: int, m: int, d: int, share: str) -> None:
    """ceil(share m) numbers go at either end; of so few that none would be left, all but one or two."""
    values = drawn(seed, m, d)
    cut = min(-int(-Fraction(share) * m // 1), (m - 1) // 2)
    assert cut >= 1 or m < 3
    want = [float(np.sort(column)[cut : m - cut].mean()) for column in values.T]
    np.testing.assert_allclose(combined(f"trimmed-mean:{share}", spool, values), want, rtol=1e-12, atol=1e-12)


@given(**SEEDS)
@settings(max_examples=20)
def test_clipping_is_the_formula(spool: Spool, seed: int, m: int, d: int) -> None:
    """start + mean of (x - start) min(1, median norm / norm)."""
    values, start = drawn(seed, m, d), drawn(seed + 1, 1, d)[0]
    norms = np.linalg.norm(values - start, axis=1)
    most = np.sort(norms[norms > 0])[(np.count_nonzero(norms) - 1) // 2] if norms.any() else 0.0
    want = start + np.mean(
        [(x - start) * min(1.0, most / (n or 1.0)) for x, n in zip(values, norms, strict=True)], axis=0
    )
    close = 1e-12 * max(most, np.abs(start).max())
    np.testing.assert_allclose(combined("norm-clip", spool, values, start), want, rtol=0, atol=close)


@given(**SEEDS)
@settings(max_examples=20)
def test_the_vote_is_the_sign_of_most_times_the_usual_size(spool: Spool, seed: int, m: int, d: int) -> None:
    values = drawn(seed, m, d)
    sizes = np.sqrt(np.square(values).mean(axis=1))
    usual = np.sort(sizes[sizes > 0])[(np.count_nonzero(sizes) - 1) // 2] if sizes.any() else 0.0
    most = np.sign((values > 0).sum(axis=0) - (values < 0).sum(axis=0))
    np.testing.assert_allclose(combined("sign-vote", spool, values), usual * most, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@given(**SEEDS, order=st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_the_order_of_the_replies_changes_no_bit(
    rule: str, spool: Spool, seed: int, m: int, d: int, order: Any
) -> None:
    values, start = drawn(seed, m, d), drawn(seed + 1, 1, d)[0]
    values[np.random.default_rng(seed).random((m, d)) < 0.1] = -0.0
    shuffled = values[order.sample(range(m), m)]
    assert combined(rule, spool, values, start).tobytes() == combined(rule, spool, shuffled, start).tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_so_many_columns_at_a_time_change_no_bit(
    rule: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = drawn(3, 9, 41)
    whole = combined(rule, spool, values)
    monkeypatch.setattr(aggregation, "NUMBERS", 9 * 7)
    assert combined(rule, spool, values).tobytes() == whole.tobytes()


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
@given(lie=st.sampled_from([-1e9, -1.0, 0.0, 1e9]), seed=st.integers(0, 99), m=st.integers(3, 12))
@settings(max_examples=15)
def test_one_liar_cannot_leave_the_range_of_the_others(
    rule: str, spool: Spool, lie: float, seed: int, m: int
) -> None:
    honest = np.random.default_rng(seed).normal(size=(m - 1, 6))
    found = combined(rule, spool, np.vstack([np.full((1, 6), lie), honest]))
    assert (found >= honest.min(axis=0)).all()
    assert (found <= honest.max(axis=0)).all()


def test_a_number_that_a_client_could_not_have_is_left_out() -> None:
    """Three of four clients have the first number, one the second, nobody the third."""
    none = np.nan
    values = np.array([[1.0, none, none], [5.0, none, none], [2.0, 8.0, none], [none, none, none]])
    assert trimmed(values, Fraction(1, 2)).tolist() == [0.75 * 2, 0.25 * 8, 0.0]
    assert trimmed(values, Fraction(0)).tolist() == np.nansum(values / 4, axis=0).tolist()
    assert aggregation.vote(values, 4.0).tolist() == [3.0, 1.0, 0.0]
    assert aggregation.size_of(values[2]) == np.sqrt(34)
    assert aggregation.size_of(values[3]) == 0.0


def test_numbers_are_kept_as_they_came(spool: Spool) -> None:
    """Integers of 32 bits and float64 lose nothing on the disk; float32 and float16 take 4 bytes."""
    for dtype, value in (
        ("int32", 2**31 - 1),
        ("float64", 1 + 2**-50),
        ("float32", 1 + 2**-20),
        ("float16", 1.5),
    ):
        taken = Rule("median", spool=spool).combining()
        for _ in range(3):
            taken.add(1.0, {"x": np.full(2, value, dtype)})
        assert taken.tensors()["x"].tolist() == [value, value]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("krum", "none of mean, median, trimmed-mean, norm-clip, sign-vote"),
        ("", "none of mean"),
        ("median:0.2", "trimmed-mean a share"),
        ("mean:0.5", "only mean takes a number, from 1 on"),
        ("mean:inf", "from 1 on"),
        ("trimmed-mean:0.5", "between 0 and 0.5"),
        ("trimmed-mean:", "between 0 and 0.5"),
        ("trimmed-mean:1/0", "between 0 and 0.5"),
        ("trimmed-mean:nan", "between"),
        ("trimmed-mean:inf", "between"),
        ("trimmed-mean:1e-99999", "between"),
        ("trimmed-mean:-0.2", "between"),
    ],
)
def test_what_is_no_rule_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_a_rule_has_its_text() -> None:
    assert [parse(text).text for text in (*RULES, "mean")] == [*RULES, "mean"]
    assert parse("trimmed-mean:0.2") == parse("trimmed-mean")


# In the methods ---------------------------------------------------------------------------------------

CLIENTS = 5
ROWS = [1, 2, 3, 4, 90]
CASES: dict[str, dict[str, Any]] = {
    "fedit": {"r": 2, "steps": 2},
    "fedit fp16": {"r": 2, "steps": 2, "wire": "fp16", "server": "adam"},
    "fedit scaffold": {"r": 2, "steps": 2, "scaffold": True},
    "fedpetuning": {"module": "bitfit", "steps": 2},
    "fedpeptao": {"tokens": 1, "steps": 2, "layers_rule": "half"},
    "fedpeptao all": {"tokens": 1, "steps": 2, "layers_rule": "all"},
    "fedkseed": {"K": 8, "tau": 20},
    "fedkseed sums": {"K": 8, "tau": 20, "wire": "sums", "pro": True},
    "fedkseed bp": {"K": 8, "tau": 20, "backprop": 1.0},
    "mezo": {"K": 32, "tau": 20},
    "zosgd": {"K": 32, "tau": 20},
    "onebyte": {"K": 32, "directions": 8},
    "onebyte sign": {"K": 32, "directions": 8, "wire": "sign"},
    "fwdllm": {"r": 2, "alpha": 4, "P": 8, "variance_gate": False, "decay": 0, "discriminative": False},
}
BASE = bytes(8)


class Folder(NamedTuple):
    path: Path


@pytest.fixture(scope="module")
def begun() -> dict[str, tuple[Any, Any]]:
    """(method, its first state) by case."""
    found = {}
    for case, values in CASES.items():
        method = methods.make(case.split()[0], values)
        found[case] = method, method.init(tiny_llama(), 7)
    return found


def replies_of(method: Any, state: Any) -> list[Payload]:
    """A reply of a usual size from each client."""
    found = []
    for client in range(CLIENTS):
        kinds = method.kinds(state)
        sent, spec = kinds[client % len(kinds)]
        rng = np.random.default_rng(client)
        arrays: dict[str, np.ndarray] = {}
        for name, (kind, shape) in spec.arrays.items():
            step = rng.normal(size=[abs(n) for n in shape if n is not None])
            if np.dtype(kind).kind == "f":
                arrays[name] = (sent.arrays.get(name, np.zeros(step.shape)) + 1e-3 * step).astype(kind)
            elif kind == "uint8":
                arrays[name] = LogCode.encode(300 * step, np.full(step.shape, 0.5))
            else:
                arrays[name] = (300 * step).astype(kind)
        scalars: dict[str, Any] = {"n": ROWS[client], "loss": 1.0, "steps": 20, "kept": 0.5}
        if "sums" in arrays:
            from fleetune.tuning.methods._zeroth import draw

            k = draw(client, 20, method.probabilities(state), method.K)
            arrays = dict(
                method.codec.reply(k, rng.integers(-500, 500, 20), method.K, {"n": 1, "loss": 1.0}).arrays
            )
        found.append(Payload(arrays, {name: scalars[name] for name in spec.scalars}))
    return found


def after(
    method: Any, state: Any, payloads: Sequence[Payload], rule: Rule, order: Sequence[int], folder: Path
) -> Any:
    """The state after a round in which the replies come in an order."""
    answers = [Answer(c, c, encode(Message(1, BASE, payloads[c])), "ok", "", 0.0, 0) for c in order]
    with Replies(method, Round(1, BASE, ROWS, state), Folder(folder), lambda e: None, rule) as taken:  # type: ignore[arg-type]
        taken.gather(iter(answers))
        return taken.aggregate()


def bits(state: Any) -> bytes:
    return checkpoint.encode(1, state, checkpoint.Totals())


@pytest.mark.parametrize("rule", REDUCE)
@pytest.mark.parametrize("case", CASES)
def test_every_method_takes_a_rule_or_says_why_not(case: str, rule: str, begun: Any, tmp_path: Path) -> None:
    """Neither the order of the replies nor the rows that a client states make a difference."""
    method, state = begun[case]
    parsed = parse(rule)
    if why := method.rule_problem(parsed, CLIENTS):
        assert "; use aggregation=" in why
        return
    payloads = replies_of(method, state)
    there = after(method, state, payloads, parsed, range(CLIENTS), tmp_path)
    assert bits(there) == bits(after(method, state, payloads, parsed, [3, 1, 4, 0, 2], tmp_path))
    assert bits(there) != bits(state)
    light = [Payload(p.arrays, {**p.scalars, "n": 1}) for p in payloads]
    same = after(method, state, light, parsed, range(CLIENTS), tmp_path)
    if "scaffold" not in case and "fedpeptao" not in case:  # whose number of steps goes by rows
        assert bits(there) == bits(same)
    if hasattr(there, "ledger"):
        assert there.ledger.coefficients.dtype == np.int32
        assert there.ledger.coefficients.any()


def test_the_seam_by_hand(begun: Any, tmp_path: Path) -> None:
    """MeZO's integers and FedIT's tensors are numpy's medians, whatever rows weigh."""
    for case, name in (("mezo", "c"), ("fedit", "")):
        method, state = begun[case]
        payloads = replies_of(method, state)
        new = after(method, state, payloads, parse("median"), range(CLIENTS), tmp_path)
        if name:
            want = np.rint(np.median([p.array(name) for p in payloads], axis=0))
            assert new.ledger.coefficients.tolist() == want.tolist()
        for tensor in state.tensors if not name else ():
            want = np.median([p.array(tensor) for p in payloads], axis=0)
            assert new.tensors[tensor].tobytes() == want.astype(np.float32).tobytes()


def test_fedkseed_combines_among_those_who_drew_the_direction(begun: Any, tmp_path: Path) -> None:
    from fleetune.tuning.methods._zeroth import draw
    from fleetune.tuning.methods.fedkseed import summed

    method, state = begun["fedkseed"]
    method = replace(method, tau=8)
    payloads = replies_of(method, state)
    table = np.full((CLIENTS, method.K), np.nan)
    for c, p in enumerate(payloads):
        k = draw(c, 8, None, method.K)
        table[c, k] = summed(k, LogCode.decode(p.array("codes")), method.K)[k]
    assert np.isnan(table).any()
    new = after(method, state, payloads, parse("median"), range(CLIENTS), tmp_path)
    have = (~np.isnan(table)).sum(axis=0)
    want = np.rint(
        [
            np.median(col[~np.isnan(col)]) * (n / CLIENTS) if n else 0
            for col, n in zip(table.T, have, strict=True)
        ]
    )
    sums = np.zeros(method.K)
    np.add.at(sums, (new.ledger.ids & np.uint64(0xFFFFFFFF)).astype(int), new.ledger.coefficients)
    assert sums.tolist() == want.tolist()


def test_scaffolds_mean_moves_by_the_combined_change(begun: Any, tmp_path: Path) -> None:
    """One device that lies about w moves c no further than the others do."""
    method, state = begun["fedit scaffold"]
    payloads = replies_of(method, state)
    lie = {
        n: a + (a - state.tensors[n]) for n, a in payloads[4].arrays.items()
    }  # within the bound of the door
    lying = [*payloads[:4], Payload(lie, payloads[4].scalars)]
    moved = {}
    for rule in (MEAN, parse("median")):
        honest = after(method, state, payloads, rule, range(CLIENTS), tmp_path)
        told = after(method, state, lying, rule, range(CLIENTS), tmp_path)
        assert told.seen.tolist() == honest.seen.tolist() == list(range(CLIENTS))
        moved[rule.name] = methods.norm(told.c[n] - honest.c[n] for n in told.c)
    assert moved["median"] < 0.7 * moved["mean"]


def test_memory_does_not_grow_with_the_clients(
    begun: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a megabyte a reply: 40 of them take no more memory than 4."""
    monkeypatch.setattr(aggregation, "NUMBERS", 1 << 14)

    def peak(clients: int) -> int:
        spool = Spool(tmp_path, 1 << 12)
        taken = Rule("trimmed-mean", spool=spool).combining()
        tracemalloc.start()
        for c in range(clients):
            taken.add(1.0, {"w": np.full(1 << 17, c, np.float32)})
        taken.tensors()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        spool.close()
        return most

    assert peak(40) < peak(4) + (1 << 18)


REFUSED = [
    ("fedit", {"average": "product"}, "median", 10, "use average=separate"),
    ("fedpetuning", {}, "sign-vote", 10, "signs do not say how far"),
    ("fedpeptao", {}, "sign-vote", 10, "signs do not say how far"),
    ("fedkseed", {"backprop": 0.5}, "norm-clip", 10, "set backprop to 0 or 1"),
    ("fedkseed", {}, "median", 8, "a direction of 1024 is drawn by 1.4 of 8 clients in a round"),
    ("onebyte", {}, "trimmed-mean", 10, "or wire=sign, where all try the same"),
    ("onebyte", {"wire": "sign"}, "median", 10, "use aggregation=sign-vote"),
    ("fwdllm", {}, "median", 10, "use aggregation=norm-clip"),
    ("mezo", {}, "median", 2, "2 clients are asked in a round"),
]


@pytest.mark.parametrize(("name", "values", "rule", "asked", "says"), REFUSED)
def test_what_does_not_go_together_is_refused(
    name: str, values: dict[str, Any], rule: str, asked: int, says: str
) -> None:
    method = methods.make(name, values)
    assert says in method.rule_problem(parse(rule), asked)
    assert method.rule_problem(MEAN, asked) == ""


def test_a_method_of_ones_own_keeps_its_rule() -> None:
    class Own(fedit.Method):
        """A method that takes no rule."""

        cannot_combine = methods.Method.cannot_combine

    assert "leave aggregation out" in Own().rule_problem(parse("median"), 9)


# In a run ---------------------------------------------------------------------------------------------


class Stop(fleetune.Silent):
    """Stop after the first round; keep the header."""

    shown: dict[str, str]

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self.shown = dict(rows)

    def event(self, event: Any) -> None:
        if event.event == "round":
            raise errors.Interrupted("stopped")


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    models.save(model.net, model.tokenizer, tmp_path / "tiny")
    rows = [{"instruction": f"say {n}", "output": f"{n} {n}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


MORE: dict[str, Any] = {"clients": 4, "rounds": 2, "held_out": 4, "max_length": 64, "samples": 0}


def test_a_resumed_run_has_the_same_bits_and_its_ledger_replays(at: Path) -> None:
    """The rule stands in run.toml and in the ledger's head; the ledger rebuilds the digest that it states."""
    tuned = {
        "method": "mezo",
        "settings": {"lr": 1e-3, "tau": 3, "batch_size": 2},
        "aggregation": "trimmed-mean",
        **MORE,
    }
    whole = fleetune.tune("tiny", "rows.jsonl", **tuned)
    stopped = Stop()
    with pytest.raises(errors.Interrupted):
        fleetune.tune("tiny", "rows.jsonl", listener=stopped, **tuned)
    assert stopped.shown["fleet"].endswith("2 rounds · trimmed-mean")
    assert fleetune.resume_run("latest").digest == whole.digest
    assert 'aggregation = "trimmed-mean"' in (whole.folder / "run.toml").read_text()
    ledger = ledgers.load(whole.folder / "ledger.safetensors")
    assert ledger.head.aggregation == "trimmed-mean"
    assert ledger.head.checks["2"] == whole.digest
    from fleetune.cli.main import main

    assert main(["ledger", "verify", str(whole.folder)]) == 0
    mean = fleetune.tune("tiny", "rows.jsonl", **{**tuned, "aggregation": "mean"})
    assert mean.digest != whole.digest


def test_a_rule_is_refused_before_the_model_is_loaded(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: Any, **more: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fleetune.models.load", loaded)
    with pytest.raises(errors.RecipeError, match="'median' does not fit method = 'fwdllm': every device"):
        fleetune.tune("tiny", "rows.jsonl", method="fwdllm", aggregation="median", **MORE)
    with pytest.raises(errors.RecipeError, match="2 clients are asked in a round"):
        fleetune.tune(
            "tiny",
            "rows.jsonl",
            method="mezo",
            aggregation="median",
            **{**MORE, "clients": 4},
            participation=0.5,
        )
    with pytest.raises(errors.RecipeError, match="'krum' is none of mean"):
        fleetune.tune("tiny", "rows.jsonl", method="mezo", aggregation="krum", **MORE)
