"""The ledger: its file to the byte, damage, and what every operation does to the weights it rebuilds."""

import hashlib
import json
import os
import stat
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as safetensors_load
from safetensors.numpy import save as safetensors_save

from fleetune.errors import LedgerError, UsageError, VersionError
from fleetune.models import digest, uniform
from fleetune.seeds import ledger as ledgers
from fleetune.seeds import noise
from fleetune.seeds.ledger import Change, Ledger, LedgerHead, load, require_base
from fleetune.seeds.weights import kernels, layout
from law_definition import direction

K = 16
TENSORS = (("a.weight", (70, 61), "float32"), ("b", (9,), "float32"))


def head(**changes: Any) -> LedgerHead:
    known: dict[str, Any] = {"base": "ab" * 32, "tokenizer": "cd" * 32, "tensors": TENSORS}
    known |= {"law": "hashed", "K": K, "run_key": 0x0123456789ABCDEF, "eps": 1e-3, "lr": "constant"}
    known |= {
        "grid": float(np.float32(1e-4)),
        "method": "fedkseed",
        "hyper": {"K": 16, "lr": 3e-7, "clip": 0.0},
    }
    return LedgerHead(**{**known, "aggregation": "mean weighted by rows", **changes})


def some(**changes: Any) -> Ledger:
    """Three rounds over two epochs of the pool, with repeated directions."""
    ledger = Ledger(head(**changes))
    ledger = ledger.append(np.array([0, 5, 15, 5]), np.array([7, -300, 2**20, 0]), 1)
    ledger = ledger.append(np.array([5, 3]), np.array([100, -1]), 2)
    ledger = ledger.append(np.array([1 << 32 | 5, 1 << 32 | 9, 15]), np.array([11, -12, 2**20]), 3)
    return ledger.with_check(1, "11" * 32).with_check(2, "22" * 32).with_check(3, "33" * 32)


def base() -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(uniform(f"ledger/{n}", shape, 1.0)) for n, shape, _ in TENSORS}


def formula(ledger: Ledger) -> dict[str, torch.Tensor]:
    """round(w0 + grid * sum c z) with the sum entry by entry, and each float operation by itself."""
    rebuilt, start, h = {}, 0, ledger.head
    for name, tensor in sorted(base().items()):
        acc = np.zeros(tensor.numel(), np.int64)
        for id, c in zip(ledger.ids.tolist(), ledger.coefficients.tolist(), strict=True):
            acc += c * direction(h.law, id, start, tensor.numel(), h.K, h.run_key)
        moved = tensor.numpy().reshape(-1) + np.float32(h.grid) * acc.astype(np.float32)
        assert moved.dtype == np.float32
        rebuilt[name] = torch.from_numpy(moved).view(tensor.shape)
        start += -(-tensor.numel() // 4096) * 4096
    return rebuilt


def rebuild(ledger: Ledger, backend: str = "numba", threads: int = 1) -> str:
    found, h = [], ledger.head
    for slot in layout(base().items()):
        out = slot.tensor.reshape(-1).clone()
        kernels(torch.device("cpu"), backend).sweep(
            out, out, slot.start, h.run_key, ledger.passes(), h.grid, threads=threads
        )
        found.append((slot.name, out.view(slot.tensor.shape)))
    return digest(found)


FILE_SHA = "ca73ac0efc0b79e6abd62216d8e97d00d3722d53531ea911e2c7d4a9d54e6e1e"
FINGERPRINT = "32046e527ec0e13aeea6d0da9139e2e64e2679b690f4a53fff5ba54b92476eb9"


def test_the_file_is_these_bytes():
    data = some().to_bytes()
    assert hashlib.sha256(data).hexdigest() == FILE_SHA
    assert some().fingerprint() == FINGERPRINT
    assert int.from_bytes(data[:8], "little") % 8 == 0
    text = head().to_json()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert LedgerHead.from_json(text) == head()
    arrays = safetensors_load(data)
    assert arrays["id"].tolist() == [0, 5, 15, 5, 3, 4294967301, 4294967305, 15]
    assert arrays["coefficient"].tolist() == [7, -300, 1048576, 100, -1, 11, -12, 1048576]
    assert arrays["round"].tolist() == [1, 1, 1, 2, 2, 3, 3, 3]


COEFFICIENT = st.integers(-(2**31) + 1, 2**31 - 1).filter(bool)
entries = st.lists(st.tuples(st.integers(0, 2**64 - 1), COEFFICIENT, st.integers(0, 2**32 - 1)), max_size=20)


@given(
    rows=entries,
    key=st.integers(0, 2**64 - 1),
    law=st.sampled_from(noise.LAWS),
    grid=st.floats(0, 1000, width=32, exclude_min=True),
    hyper=st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5), st.booleans())),
    names=st.lists(st.text(max_size=9), max_size=3),
)
@settings(max_examples=60)
def test_a_saved_ledger_comes_back(tmp_path_factory, rows, key, law, grid, hyper, names):
    tensors = tuple((n, (i, 2), "bfloat16") for i, n in enumerate(names))
    ledger = Ledger(head(run_key=key, law=law, grid=grid, hyper=hyper, tensors=tensors))
    outside = 0xFFFFFFF0 if law == noise.POOL else 0  # of a pool of 16
    rows = [(id & ~outside, c, r) for id, c, r in rows]
    for id, c, r in rows:
        ledger = ledger.append(np.array([id], np.uint64), np.array([c]), r)
    path: Path = tmp_path_factory.getbasetemp() / "ledger.safetensors"
    ledger.save(path)
    again = load(path)
    assert again.head == ledger.head
    assert again.fingerprint() == ledger.fingerprint()
    assert again.to_bytes() == ledger.to_bytes() == path.read_bytes()
    for name in ("ids", "coefficients", "rounds"):
        left, right = getattr(again, name), getattr(ledger, name)
        assert (left.dtype, left.tolist()) == (right.dtype, right.tolist())
    assert again.ids.tolist() == [id for id, _, _ in rows]


def test_a_file_is_its_owners_alone(tmp_path):
    before = os.umask(0)
    try:
        some().save(tmp_path / "l.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "l.safetensors").stat().st_mode) == 0o600


def test_the_fingerprint_sees_everything():
    ledger, seen = some(), {some().fingerprint()}
    others = [replace(ledger, head=replace(ledger.head, **{n: v})) for n, v in OTHER_HEADS.items()]
    others += [
        replace(ledger, ids=ledger.ids + np.uint64(1)),
        replace(ledger, coefficients=-ledger.coefficients),
        replace(ledger, rounds=ledger.rounds + np.uint32(1)),
        ledger.append(np.array([1]), np.array([1]), 4),
    ]
    for other in others:
        assert other.fingerprint() not in seen
        seen.add(other.fingerprint())


OTHER_HEADS: dict[str, Any] = dict.fromkeys(("base", "tokenizer"), "00" * 32)
OTHER_HEADS |= {"tensors": TENSORS[:1], "run_key": 1, "law": "rademacher", "K": 8, "grid": 0.5}
OTHER_HEADS |= {"law_version": 2, "format": 2, "eps": 0.5, "hyper": {}, "checks": {}}
OTHER_HEADS |= dict.fromkeys(("lr", "method", "aggregation", "privacy", "previous"), "x")


def opened(path: Path, data: bytes) -> Ledger | None:
    """What a file of these bytes loads as; None where it is refused; anything else is a failed test."""
    path.unlink(missing_ok=True)  # a file that is written over is flushed by some file systems: slow
    path.write_bytes(data)
    try:
        return load(path)
    except (LedgerError, VersionError):
        return None


def test_any_flipped_or_lost_byte_is_noticed(tmp_path):
    data, want = some().to_bytes(), some()
    end = 8 + int.from_bytes(data[:8], "little")
    padding = len(data[8:end].rstrip(b" ")) + 8
    for i in range(len(data)):
        flip = 1 << i % 8 if i % 5 else 0x1E  # 0x1E: "0" to "."
        found = opened(tmp_path / "l", data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
        if found is not None:
            assert found.fingerprint() == want.fingerprint()
            assert padding <= i < end  # blank space to blank space
            assert chr(data[i] ^ flip).isspace()
        if i % 7 == 0:
            assert opened(tmp_path / "l", data[:i]) is None
            assert opened(tmp_path / "l", data[:i] + data[i + 1 :]) is None or padding <= i < end


def file_with(text: str, **arrays: np.ndarray) -> bytes:
    known = {"id": np.zeros(2, "u8"), "coefficient": np.ones(2, "i4"), "round": np.zeros(2, "u4")}
    metadata = {"format": "fleetune-ledger", "head": text, "fingerprint": "0" * 64}
    return safetensors_save({**known, **arrays}, metadata)


def changed(**changes: Any) -> str:
    """The head's JSON with other values, in canonical form."""
    return json.dumps({**json.loads(head().to_json()), **changes}, sort_keys=True, separators=(",", ":"))


BAD_HEADS = {
    "empty": "",
    "a list": "[]",
    "deep": "[" * 100_000,
    "not JSON": "{",
    "spaces": json.dumps(json.loads(head().to_json()), sort_keys=True),
    "no hex": changed(run_key="xyz"),
    "a key that is a number": changed(run_key=1),
    "a negative key": changed(run_key="-000000000000001"),
    "no base": json.dumps({"K": 16}),
    "an unknown field": changed(extra=1),
    **{f"K is {K}": changed(K=K) for K in (16.0, 12, 0, True, 2**25)},  # beyond the tables
    **{f"grid is {grid}": changed(grid=grid) for grid in (0.0, 1e30, float("nan"), None)},
    "grid is a huge number": changed(grid=10**400),
    "another law": changed(law="cauchy"),
    **{f"{name} is a number": changed(**{name: 1}) for name in ("base", "tensors")},
    **{f"eps is {eps!r:.9}": changed(eps=eps) for eps in ("1", 10**400)},
    **{f"hyper is {hyper!r:.9}": changed(hyper=hyper) for hyper in ([], {"lr": 10**400}, {"x": {"a": {}}})},
    "a check of round 02": changed(checks={"02": ""}),
    "a check of 5,000 digits": changed(checks={"1" * 5000: ""}),
    "a check beyond 32 bits": changed(checks={"4294967296": ""}),
    "a check of a number": changed(checks={"1": 1}),
    "a tensor of two parts": changed(tensors=[["a", [1]]]),
    "trains is not one of three": changed(hyper={"train": "codes\n"}),
    "a name that is a number": changed(tensors=[[1, [2], "x"]]),
}


@pytest.mark.parametrize("name", list(BAD_HEADS))
def test_a_head_that_no_one_wrote_is_refused(tmp_path, name):
    (tmp_path / "l").write_bytes(file_with(BAD_HEADS[name]))
    with pytest.raises(LedgerError, match="head is damaged"):
        load(tmp_path / "l")


def test_other_versions_and_directions_outside_the_pool_are_refused(tmp_path):
    for version in ({"format": 2}, {"law_version": 2}, {"format": 0}):
        (tmp_path / "l").write_bytes(file_with(changed(**version)))
        with pytest.raises(VersionError, match="the ledger"):
            load(tmp_path / "l")
    Ledger(head(K=16)).append(np.array([16]), np.array([1]), 1).save(tmp_path / "l")
    with pytest.raises(LedgerError, match="outside its pool"):
        load(tmp_path / "l")


def test_files_that_are_no_ledgers_are_refused(tmp_path):
    with pytest.raises(LedgerError, match="no ledger at"):
        load(tmp_path)
    good, arrays = head().to_json(), {"id": np.zeros(2, "u8"), "coefficient": np.ones(2, "i4")}
    unsigned = arrays | {"round": np.zeros(2, "u4")}
    damaged = [
        *(file_with(good, id=ids) for ids in (np.zeros(2, "i8"), np.zeros(3, "u8"))),
        *(file_with(good, round=rounds) for rounds in (np.zeros(2, "u8"), np.zeros((2, 1), "u4"))),
        file_with(good, coefficient=np.ones(2, "f4")),
        file_with(good, extra=np.zeros(1, "u4")),
        file_with(good),  # another fingerprint
        safetensors_save(unsigned, {"format": "fleetune-ledger", "head": good}),  # none
        safetensors_save({"w": np.zeros(3, np.float32)}),
        some().to_bytes().replace(b'"I32"', b'"F32"'),
        *(b"", b"{}", b"PK\3\4" * 50, b"\xff" * 64),
    ]
    for content in damaged:
        assert opened(tmp_path / "l", content) is None


REPLAY = {
    "hashed": "7f27e1884d620d3e74694047149ccadcba96557ca0d7c9a6fd2458e0be11c8b4",
    "rademacher": "47cff9bc53919d8b8818ee50fe9c4b1c661b10b6830990672c3d219b49fe547c",
}


@pytest.mark.parametrize("law", REPLAY)
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("threads", [1, 2])
def test_replay_is_the_formula(law, backend, threads):
    ledger = some(law=law, K=K if law == noise.POOL else 1)
    want = digest(sorted(formula(ledger).items()))
    assert want == REPLAY[law]
    assert rebuild(ledger, backend, threads) == want


@given(
    law=st.sampled_from(list(REPLAY)),
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, K - 1), st.integers(-(2**31) + 1, 2**31 - 1)), max_size=12
    ),
)
@settings(max_examples=25)
def test_replay_is_the_formula_for_any_entries(law, rows):
    # Coefficients up to the end of their 32 bits: the sums need 64.
    ledger = Ledger(head(law=law, K=K if law == noise.POOL else 1, grid=float(np.float32(1e-11))))
    for epoch, k, c in rows:
        ledger = ledger.append(np.array([epoch << 32 | k]), np.array([c]), 1)
    assert rebuild(ledger) == digest(sorted(formula(ledger).items()))


@given(data=st.data(), law=st.sampled_from(list(REPLAY)))
@settings(max_examples=25)
def test_order_splitting_merging_and_compacting_do_not_change_the_weights(data, law):
    ledger = some(law=law, K=K if law == noise.POOL else 1)
    want = rebuild(ledger)
    order = np.array(data.draw(st.permutations(range(len(ledger)))))
    shuffled = Ledger(ledger.head, ledger.ids[order], ledger.coefficients[order], ledger.rounds[order])
    assert rebuild(shuffled) == want
    cut = data.draw(st.integers(0, len(ledger)))
    columns = (shuffled.ids, shuffled.coefficients, shuffled.rounds)
    parts = [Ledger(ledger.head, *(c[s] for c in columns)) for s in (slice(cut), slice(cut, None))]
    assert rebuild(parts[0].merge(parts[1])) == want
    assert rebuild(parts[1].merge(parts[0])) == want
    assert rebuild(shuffled.compact()) == want
    assert rebuild(parts[1].compact().merge(parts[0].compact())) == want
    halves = [c // 2 for c in ledger.coefficients.tolist()]
    split = ledger
    for id, c, half in zip(ledger.ids.tolist(), ledger.coefficients.tolist(), halves, strict=True):
        split = split.append(np.array([id, id]), np.array([half, c - half]), 9)
    assert rebuild(split) == rebuild(Ledger(ledger.head).append(ledger.ids, 2 * ledger.coefficients, 1))


def rows(ledger: Ledger) -> list[tuple[int, int, int]]:
    return list(zip(ledger.ids.tolist(), ledger.coefficients.tolist(), ledger.rounds.tolist(), strict=True))


def test_append_leaves_zeros_out_and_the_old_ledger_alone():
    old = Ledger(head())
    new = old.append(np.array([1, 2, 3]), np.array([5, 0, -5]), 4)
    assert len(old) == 0
    assert rows(new) == [(1, 5, 4), (3, -5, 4)]
    assert rows(new.append(np.array([1]), np.array([0]), 5)) == rows(new)
    assert (new.ids.dtype, new.coefficients.dtype, new.rounds.dtype) == ("uint64", "int32", "uint32")
    big = old.append(np.array([2**64 - 1], np.uint64), np.array([-1]), 2**32 - 1)
    assert rows(big) == [(2**64 - 1, -1, 2**32 - 1)]


@pytest.mark.parametrize("value", [2**31, -(2**31), 2**40, -(2**62), 2**63 - 1, -(2**63)])
def test_a_coefficient_beyond_32_bits_is_refused(value):
    with pytest.raises(LedgerError, match="does not fit 32 bits") as caught:
        Ledger(head()).append(np.array([1, 2]), np.array([1, value]), 1)
    assert "clip" in (caught.value.hint or "")
    assert rows(Ledger(head()).append(np.array([1]), np.array([2**31 - 1]), 1)) == [(1, 2**31 - 1, 1)]


def test_sums_beyond_32_bits_are_kept_by_every_operation():
    ledger = Ledger(head(law="rademacher", K=1))
    for r in (1, 2, 3):
        ledger = ledger.append(np.array([6, 2]), np.array([2**31 - 1, -5]), r)
    lowest = replace(ledger, coefficients=np.where(ledger.coefficients < 0, -(2**31), 7).astype(np.int32))
    for one in (ledger, lowest):
        sums, nothing = one.passes(), Ledger(one.head, one.ids[:0], one.coefficients[:0], one.rounds[:0])
        assert sums.tables.dtype == np.int64
        for same in (one.compact(), one.compact().compact(), one.merge(nothing)):
            assert same.passes().ids.tolist() == sums.ids.tolist()
            assert same.passes().tables.tolist() == sums.tables.tolist()
            assert len(same) <= len(one) + 1
        assert rebuild(one.compact()) == rebuild(one) == digest(sorted(formula(one).items()))
        assert one.diff(one.compact())[-1].what != "cosine of the two fine-tunes" or one is lowest
    assert rows(ledger.compact()) == [(2, -15, 3), *[(6, 2**31 - 1, 3)] * 3]
    with pytest.raises(LedgerError, match="no negative in 32 bits") as caught:
        lowest.scale(-1)
    assert "compact" in (caught.value.hint or "")
    assert lowest.compact().scale(-1).passes().tables.tolist() == (-lowest.passes().tables).tolist()


@pytest.mark.parametrize("law", ["hashed", "rademacher"])
def test_passes_are_counted_without_their_tables(law, monkeypatch):
    ledger = Ledger(head(law=law, K=16))
    for ids in ([3, 2**32 + 5, 2**33], [3, 2**33 + 1], [7]):
        ledger = ledger.append(np.array(ids), np.array([1, -2, 4][: len(ids)]), 1)
    ledger = ledger.append(np.array([2**32 + 5]), np.array([2]), 2)  # the sum of an epoch is nothing
    wanted = len(ledger.passes().ids)
    monkeypatch.setattr(Ledger, "passes", None)
    assert ledger.count_passes() == wanted
    assert Ledger(head()).count_passes() == 0


@pytest.mark.parametrize(
    ("law", "K", "count", "said"),
    [
        ("hashed", 1 << 24, 5, "5 epochs of K = 16777216"),
        ("rademacher", 1, 1025, "its directions take 1,025 passes"),
        ("hashed", 2, 1025, "its directions take 1,025 passes"),
    ],
)
def test_more_work_than_any_run_asks_for_is_refused_when_read(law, K, count, said, tmp_path, monkeypatch):
    assert noise.PASSES == 1 << 20
    monkeypatch.setattr(noise, "PASSES", 1024)
    ids = np.arange(count, dtype=np.uint64) << np.uint64(32)
    ledger = Ledger(head(law=law, K=K)).append(ids, np.ones(count, np.int64), 1)
    ledger.save(tmp_path / "l")
    with pytest.raises(UsageError, match=said):
        ledger.passes()
    with pytest.raises(LedgerError, match=f"l asks for more than a run makes: {said}"):
        load(tmp_path / "l")
    most = Ledger(ledger.head, ledger.ids[1:], ledger.coefficients[1:], ledger.rounds[1:])
    most.save(tmp_path / "l")
    assert load(tmp_path / "l").count_passes() == count - 1


def test_a_table_takes_no_memory_beside_it():
    """A few bytes of a ledger ask for a table of K numbers."""
    K = 1 << 20
    ledger = Ledger(head(law="hashed", K=K)).append(np.arange(3), np.array([1, -2, 5]), 1)
    tracemalloc.start()
    try:
        tables = ledger.passes().tables
        assert tracemalloc.get_traced_memory()[1] < 2.1 * tables.nbytes
    finally:
        tracemalloc.stop()
    wanted = sum(c * noise.hadamard_column(K, k).astype(np.int64) for k, c in ((0, 1), (1, -2), (2, 5)))
    assert np.array_equal(tables[0], wanted)


def test_the_last_check_is_that_of_all_rounds():
    ledger = Ledger(head(checks={})).append(np.array([1]), np.array([1]), 3)
    assert ledger.final_check() is None
    assert ledger.with_check(2, "aa").final_check() is None
    # nothing moved after round 3
    assert ledger.with_check(2, "aa").with_check(10, "bb").final_check() == "bb"
    assert ledger.with_check(3, "cc").compact().final_check() == "cc"
    assert ledger.with_check(3, "cc").drop(3).final_check() is None


def test_truncate_and_drop():
    ledger = some()
    two = ledger.truncate(2)
    assert rows(two) == [r for r in rows(ledger) if r[2] <= 2]
    assert two.head.checks == {"1": "11" * 32, "2": "22" * 32}
    assert two.head.previous == ledger.fingerprint()
    assert replace(two.head, previous="", checks={}) == replace(ledger.head, checks={})
    assert rows(ledger.truncate(0)) == []
    assert rows(ledger.truncate(3)) == rows(ledger)
    assert ledger.truncate(3).head.checks == ledger.head.checks
    left = ledger.drop(2)
    assert rows(left) == [r for r in rows(ledger) if r[2] != 2]
    assert left.head.checks == {"1": "11" * 32}
    assert left.head.previous == ledger.fingerprint()


def test_a_round_without_entries_is_one_of_the_ledgers():
    ledger = Ledger(head()).append(np.array([1]), np.array([1]), 2).with_check(5, "55" * 32)
    assert ledger.last_round() == 5
    for r in (1, 3, 5):  # nobody replied
        assert rows(ledger.drop(r)) == rows(ledger)
    assert rows(ledger.truncate(1)) == rows(ledger.truncate(0)) == []
    assert rows(ledger.truncate(4)) == rows(ledger.truncate(5)) == rows(ledger)


@pytest.mark.parametrize(
    ("operation", "round"), [("truncate", -1), ("truncate", 4), ("drop", -1), ("drop", 0), ("drop", 4)]
)
def test_a_round_that_a_ledger_does_not_have_is_refused(operation, round):
    with pytest.raises(UsageError, match=f"none {round}"):
        getattr(some(), operation)(round)
    with pytest.raises(UsageError):
        getattr(Ledger(head()), operation)(1)


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0, 0.3])
def test_scale(factor):
    ledger = some()
    scaled = ledger.scale(factor)
    sign = 1 if factor > 0 else -1
    assert rows(scaled) == [(id, sign * c, r) for id, c, r in rows(ledger)]
    assert scaled.head.grid == float(np.float32(ledger.head.grid * abs(factor)))
    assert scaled.head.checks == {}
    assert scaled.head.previous == ledger.fingerprint()
    whole, part, start = formula(ledger), formula(scaled), base()
    for name in start:
        want = start[name].double() + factor * (whole[name].double() - start[name].double())
        torch.testing.assert_close(part[name].double(), want, rtol=1e-5, atol=1e-5)


def test_scaling_beyond_any_grid_is_refused():
    for factor in (0.0, float("inf"), float("nan"), 1e-300, -1e300, 1e9):
        with pytest.raises(LedgerError, match="cannot scale by"):
            some().scale(factor)


def test_compact_sums_each_direction_and_keeps_the_last_check():
    ledger = some()
    small = ledger.compact()
    sums = [(0, 7), (3, -1), (5, -200), (15, 2**21), (1 << 32 | 5, 11), (1 << 32 | 9, -12)]
    assert rows(small) == [(id, c, 3) for id, c in sums]
    assert small.head.checks == {"3": "33" * 32}
    assert small.head.previous == ledger.fingerprint()
    gone = Ledger(head()).append(np.array([5]), np.array([9]), 1).append(np.array([5]), np.array([-9]), 2)
    assert rows(gone.compact()) == []


def test_merge_adds_and_keeps_the_rounds_in_order():
    left = some()
    right = Ledger(head(method="mezo")).append(np.array([1, 5]), np.array([4, 6]), 2)
    both = left.merge(right)
    assert sorted(rows(both)) == sorted(rows(left) + rows(right))
    assert both.rounds.tolist() == sorted(both.rounds.tolist())
    assert both.head.checks == {}
    parents = "".join(sorted([left.fingerprint(), right.fingerprint()]))
    assert both.head.previous == hashlib.sha256(parents.encode()).hexdigest()
    assert both.head.previous == right.merge(left).head.previous
    assert both.head.method == "fedkseed"


MUST_AGREE = ("base", "tokenizer", "tensors", "run_key", "law", "law_version", "K", "grid")


@pytest.mark.parametrize("field", MUST_AGREE)
def test_merge_refuses_another_base_key_or_law(field):
    assert ledgers.MUST_AGREE == MUST_AGREE
    other = some(**{field: OTHER_HEADS[field]})
    with pytest.raises(LedgerError, match=f"cannot be merged: {field} is .* and ") as caught:
        some().merge(other)
    assert "same base model, run key, law" in (caught.value.hint or "")


def test_diff():
    ledger = some()
    assert ledger.diff(some()) == []
    assert ledger.diff(some(eps=0.5)) == [Change("eps", "0.001", "0.5")]
    longer = ledger.append(np.array([2]), np.array([2**20]), 4)
    found = {c.what: c for c in ledger.diff(longer)}
    assert found.keys() == {"round 4", "cosine of the two fine-tunes"}
    assert found["round 4"][1:] == ("0 entries", "1 entries")
    a = np.array([7, -1, -200, 2**21, 11, -12, 0.0])
    b = np.array([7, -1, -200, 2**21, 11, -12, 2**20])
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert found["cosine of the two fine-tunes"].left == f"{cosine:.6f}"
    assert [c.what for c in ledger.diff(some(base="00" * 32))] == ["base"]
    other = Ledger(head(), ledger.ids, -ledger.coefficients, ledger.rounds)
    every = {"checks", "round 1", "round 2", "round 3", "cosine of the two fine-tunes"}
    assert {c.what for c in ledger.diff(other)} == every


OUTERS = (("a", (13, 5), "float32"), ("b", (9,), "float32"), ("c", (2, 4, 3), "float32"))  # 13, 0, 8 rows
SIGNED = [  # p, place, coefficient, bytes of signs, round
    (0, 0, 7, b"\xa5\x18", 1),
    (0, 2, -300, b"\x0f", 1),
    (2, 2, 5, b"\x81", 2),
    (0, 0, 2**30, b"\xff\xf8", 2),
    (1, 0, -1, b"\x00\x00", 4),
]
Signed = list[tuple[int, int, int, bytes, int]]


def outer(entries: Signed, **changes: Any) -> Ledger:
    ledger = Ledger(head(law="outer", K=1, tensors=OUTERS, **changes))
    for p, place, c, signs, round in entries:
        bits = np.frombuffer(signs, np.uint8)
        ledger = ledger.append(np.array([p << 32 | place], np.uint64), np.array([c]), round, bits)
    return ledger


def signed(ledger: Ledger) -> Signed:
    found, at = [], 0
    for id, c, round in rows(ledger):
        p, place = divmod(id, 1 << 32)
        size = (2, 0, 1)[place]
        found.append((p, place, c, ledger.signs[at : at + size].tobytes(), round))
        at += size
    assert at == len(ledger.signs)
    return found


signs_of = st.tuples(
    st.integers(0, 3), st.integers(0, 2), COEFFICIENT, st.binary(min_size=2, max_size=2), st.integers(1, 4)
).map(lambda entry: (*entry[:3], entry[3][: (2, 0, 1)[entry[1]]], entry[4]))


@given(left=st.lists(signs_of, max_size=8), right=st.lists(signs_of, max_size=5), r=st.integers(1, 4))
@settings(max_examples=15)
def test_every_operation_keeps_each_entrys_signs(left, right, r, tmp_path_factory):
    one, other = outer(left).with_check(4, "44" * 32), outer(right)
    assert signed(one) == left
    path = tmp_path_factory.getbasetemp() / "outer.safetensors"
    one.save(path)
    assert signed(load(path)) == left
    assert load(path).to_bytes() == one.to_bytes() == path.read_bytes()
    assert load(path).fingerprint() == one.fingerprint()
    assert signed(one.truncate(r)) == [e for e in left if e[4] <= r]
    assert signed(one.drop(r)) == [e for e in left if e[4] != r]
    assert signed(one.since(r)) == [e for e in left if e[4] >= r]
    assert signed(one.scale(-2.0)) == [(p, m, -c, bits, n) for p, m, c, bits, n in left]
    assert signed(one.merge(other)) == sorted([*left, *right], key=lambda e: e[4])
    assert signed(one.compact()) == left
    assert one.diff(outer(left).with_check(4, "44" * 32)) == []


def test_signs_go_with_the_entries_whose_coefficient_is_not_0():
    ids = np.array([0, 2, 2, 1 << 32], np.uint64)
    bits = np.arange(1, 7, dtype=np.uint8)
    found = Ledger(head(law="outer", K=1, tensors=OUTERS)).append(ids, np.array([0, 5, 0, 6]), 1, bits)
    assert signed(found) == [(0, 2, 5, b"\x03", 1), (1, 0, 6, b"\x05\x06", 1)]


def test_diff_sees_one_sign():
    turned = [(*e[:3], b"\x0e" if e[3] == b"\x0f" else e[3], e[4]) for e in SIGNED]
    found = {c.what: c for c in outer(SIGNED).diff(outer(turned))}
    assert found.keys() == {"round 1", "cosine of the two fine-tunes"}
    tables = [outer(entries).passes().tables.reshape(-1).astype(float) for entries in (SIGNED, turned)]
    cosine = tables[0] @ tables[1] / np.linalg.norm(tables[0]) / np.linalg.norm(tables[1])
    assert found["cosine of the two fine-tunes"].left == f"{cosine:.6f}"
    negated = outer(SIGNED).diff(outer([(p, m, -c, bits, r) for p, m, c, bits, r in SIGNED]))
    assert negated[-1] == ("cosine of the two fine-tunes", "-1.000000", "1.000000 = same direction")


def test_diff_takes_the_memory_and_the_time_of_the_entries_alone(monkeypatch):
    tensors = (("a", (1 << 40, 2), "float32"), *((f"b{i}", (1, 1), "float32") for i in range(400)))
    ids, ones, asked = np.arange(1, 401, dtype=np.uint64), np.ones(400, np.int32), []
    one = Ledger(head(law="outer", K=1, tensors=tensors), ids, ones, ids.astype("u4"), ones.astype("u1"))
    monkeypatch.setattr(noise, "rows_of", lambda shapes, rows=noise.rows_of: asked.append(1) or rows(shapes))
    found = one.diff(replace(one, signs=np.where(ids > 100, 255, 0).astype("u1")))
    assert (len(found), found[-1].left) == (401, "-0.500000")
    assert len(asked) < 20  # each takes the time of all tensors


def test_its_passes_are_its_directions():
    ledger = outer(SIGNED)
    assert ledger.passes().ids.tolist() == [0, 1, 2]
    assert ledger.count_passes() == 3
    assert ledger.passes().tables[2].tolist() == [0] * 13 + [-5, 5, 5, 5, 5, 5, 5, -5]


def test_any_flipped_bit_of_the_signs_is_noticed(tmp_path):
    data = outer(SIGNED).to_bytes()
    place = 8 + int.from_bytes(data[:8], "little") + 16 * len(SIGNED)
    assert len(data) - place == len(outer(SIGNED).signs) == 8
    for i in range(8 * (len(data) - place)):
        spoilt = bytearray(data)
        spoilt[place + i // 8] ^= 1 << i % 8
        assert opened(tmp_path / "l", bytes(spoilt)) is None


def of_outer(tensors: Any = OUTERS, law: str = "outer", **arrays: np.ndarray) -> bytes:
    text = json.dumps({**json.loads(head(law="outer", K=1).to_json()), "tensors": tensors, "law": law})
    text = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    found = {"id": np.array([2, 0], "u8"), "coefficient": np.ones(2, "i4"), "round": np.ones(2, "u4")}
    found |= {"signs": np.zeros(3, "u1")} | arrays
    found = {name: array for name, array in found.items() if array.size or name != "signs"}
    h = hashlib.sha256(text.encode())
    for name in ("id", "coefficient", "round", "signs"):
        h.update(found[name].tobytes() if name in found else b"")
    return safetensors_save(found, {"format": "fleetune-ledger", "head": text, "fingerprint": h.hexdigest()})


NONE = np.zeros(0, "u1")


@pytest.mark.parametrize(
    ("said", "data"),
    [
        ("signs for other entries", of_outer(signs=np.zeros(2, "u1"))),
        ("signs for other entries", of_outer(signs=np.zeros(4, "u1"))),
        ("signs for other entries", of_outer(tensors=[["a", [13, 5], "float32"]] * 3)),
        ("outside its pool of 3", of_outer(id=np.array([3, 0], "u8"))),
        ("outside its pool of 3", of_outer(id=np.array([2, 0xFFFFFFFF], "u8"))),
        ("its arrays are", of_outer(signs=NONE)),
        ("its arrays are", of_outer(signs=np.zeros(3, "i1"))),
        ("its arrays are", of_outer(signs=np.zeros((3, 1), "u1"))),
        ("its arrays are", of_outer(law="rademacher")),
        ("head is damaged", of_outer(tensors=[["a", [1 << 70, 5], "float32"]] * 3)),
        ("head is damaged", of_outer(tensors=[["a", [1 << 40, 1 << 40, 5], "float32"]] * 3)),
        ("head is damaged", of_outer(tensors=[["a", [-13, 5], "float32"]] * 3)),
    ],
)
def test_signs_that_cannot_be_those_of_the_entries_are_refused(said, data, tmp_path):
    (tmp_path / "l").write_bytes(of_outer())
    assert len(load(tmp_path / "l")) == 2
    (tmp_path / "l").write_bytes(data)
    with pytest.raises(LedgerError, match=said):
        load(tmp_path / "l")


OTHER_TENSORS = {"tensors": (TENSORS[0], ("b", (9,), "bfloat16"))}, r"tensors.* b \[9\] bfloat16"
OTHER_BASES = [({name: "00" * 32}, f"{name} digest") for name in ("base", "tokenizer")]


@pytest.mark.parametrize(
    ("changed", "reason"), [*OTHER_BASES, ({"tensors": TENSORS[:1]}, "tensors"), OTHER_TENSORS]
)
def test_another_base_is_refused(changed, reason):
    require_base(head(), "ab" * 32, "cd" * 32, iter(TENSORS))
    other = {"base": "ab" * 32, "tokenizer": "cd" * 32, "tensors": TENSORS} | changed
    with pytest.raises(LedgerError, match=reason):
        require_base(head(), *other.values())
