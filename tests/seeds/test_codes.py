# SPDX-License-Identifier: Apache-2.0
"""The codes of a quantised base as what is trained: points, probes, slopes and files against plain references."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from deploy_harness import BLOCKS, gguf_of, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fleetune import models
from fleetune.common.ggml import BLOCK, BYTES, HALVES
from fleetune.data import Batch
from fleetune.errors import UsageError
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.codebooks import CODEBOOKS
from fleetune.models.mapped.lazy import in_blocks
from fleetune.models.mapped.stored import Stored
from fleetune.models.model import Model, named_tensors
from fleetune.seeds import code_grid, code_view, kernels_numba, kernels_torch, noise, scale_grid
from fleetune.seeds.code_view import CodeView
from fleetune.seeds.noise import EMPTY, passes, probe
from fleetune.seeds.project import Projection
from fleetune.seeds.tape import Tape
from fleetune.seeds.trained import moved_tensors
from fleetune.seeds.view import View

pytestmark = pytest.mark.usefixtures("own_cache")
KEY, GRID = 11, 1e-5
LOWEST = {"Q4_0": -8, "Q4_1": 0, "Q5_0": -16, "Q5_1": 0, "Q8_0": -128}
HIGHEST = {"Q4_0": 7, "Q4_1": 15, "Q5_0": 15, "Q5_1": 31, "Q8_0": 127}


@pytest.fixture(scope="module", params=BLOCKS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a GGUF file of each kind of blocks."""
    return gguf_of(tmp_path_factory.mktemp("gguf"), request.param)


def mapped(file: Path, dtype: str = "fp32") -> Model:
    model = models.load(str(file), device="cpu", base="mapped", dtype=dtype)
    model.trains = "codes"
    return model


def view_of(model: Model, law: str = "hashed", **how: Any) -> CodeView:
    return CodeView(named_tensors(model.net), model.net, run_key=KEY, law=law, grid=GRID, **how)


def some(law: str, count: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    ids = np.arange(count, dtype=np.uint64) * (1 if law == "hashed" else 7)
    return ids, rng.integers(-300, 300, count)


def sums(law: str, K: int, start: int, count: int) -> np.ndarray:
    return scale_grid.summed(passes(law, K, *some(law)), law, KEY, start, count)


def blocks_of(stored: Stored) -> np.ndarray:
    """The blocks of a matrix, rows as in the model: uint8 [n, bytes]."""
    raw = np.array(stored.file.bytes(stored.offset, stored.size)).reshape(stored.shape[0], -1)
    rows = raw if stored.order is None else raw[stored.order]
    return rows.reshape(-1, BYTES[stored.kind]).copy()


def dequantised(blocks: np.ndarray, kind: str) -> np.ndarray:
    """What the package gguf makes of blocks: float32 [n, 32]."""
    found: np.ndarray = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(-1, BLOCK)
    return found


def with_scales(blocks: np.ndarray, kind: str, d: float, m: float = 0.0) -> np.ndarray:
    """The same codes with one scale."""
    halves, new = HALVES[kind], blocks.copy()
    new[:, : 2 * halves] = np.array([d, m][:halves], "<f2").view(np.uint8)
    return new


def exact(blocks: np.ndarray, kind: str, D: np.ndarray, start: int) -> np.ndarray:
    """The weights of blocks after moves D [n, 32] by the text of the grid, a weight at a time in float64 and whole numbers."""
    q = dequantised(with_scales(blocks, kind, 1.0), kind).astype(np.float64)
    d = blocks[:, :2].copy().view("<f2").astype(np.float64)
    u = offsets(start, D.size).reshape(D.shape)
    moved = q + D / np.where(d == 0, np.inf, d)
    if kind != "IQ4_NL":
        new = np.clip(np.floor(moved + u), LOWEST[kind], HIGHEST[kind])
    else:
        values, new = CODEBOOKS["iq4_nl"], np.empty_like(moved)
        for at, v in np.ndenumerate(moved):
            below = max([k for k in range(15) if values[k] <= v], default=0)
            place = (v - values[below]) / (values[below + 1] - values[below])
            new[at] = values[below + (1 if place + u[at] >= 1 else 0)]
    numbers = np.float32(d) * np.float32(new)
    if HALVES[kind] == 2:
        numbers = numbers + blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    return numbers


def offsets(start: int, count: int) -> np.ndarray:
    """u by the text: of row r (256 weights) of direction 2^64 - 2, weight e has the low or high half of word e mod 128."""
    found = np.empty(count)
    rows: dict[int, np.ndarray] = {}
    for i in range(count):
        row, e = divmod(start + i, 256)
        if row not in rows:
            rows[row] = noise.words(KEY, 2**64 - 2, np.array([32 * row], np.uint64))[0]
        word = int(rows[row][e % 128])
        found[i] = ((word >> 16 if e >= 128 else word & 0xFFFF) + 0.5) / 65536
    return found


# Points ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("law", ["hashed", "rademacher"])
def test_a_point_is_that_of_the_reference_for_every_matrix(law: str, backend: str, file: Path) -> None:
    """The view, the numpy reference and plain float64 by the text agree to the bit; only codes have changed."""
    model = mapped(file)
    view, K = view_of(model, law, backend=backend), 64 if law == "hashed" else 1
    view.place(passes(law, K, *some(law)))
    changed = 0
    for slot in view.slots:
        stored: Stored = slot.tensor.stored  # type: ignore[attr-defined]
        blocks, kind = blocks_of(stored), stored.kind
        D = (sums(law, K, slot.start, 32 * len(blocks)).astype(np.float32) * np.float32(GRID)).reshape(-1, 32)
        new = blocks.copy()
        new[:, 2 * HALVES[kind] :] = code_grid.moved(
            blocks, kind, slot.start, KEY, passes(law, K, *some(law)), law, GRID
        )
        want = dequantised(new, kind)
        assert np.array_equal(view.whole(slot).numpy().reshape(-1, 32), want)
        assert np.array_equal(view.packed(slot).reshape(len(blocks), -1), new[:, 2 * HALVES[kind] :])
        changed += int((new != blocks).sum())
        part = slice(0, 40)
        np.testing.assert_array_equal(
            exact(blocks[part], kind, D[part].astype(np.float64), slot.start), want[part]
        )
        view.probe(probe(law, K, 9), 0.02)
        id, _ = probe(law, K, 9)
        one = scale_grid.summed(
            passes(law, K, [(id << 32) | 9 if law == "hashed" else id], [1]), law, KEY, slot.start, D.size
        ).reshape(D.shape)
        probed = exact(
            blocks[part], kind, np.float64(D + np.float32(0.02) * one.astype(np.float32))[part], slot.start
        )
        np.testing.assert_array_equal(view.whole(slot).numpy().reshape(-1, 32)[part], probed)
        view.probe(None)
    assert changed > 1000


def test_codes_that_are_moved_few_at_a_time_are_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(mapped(file))
    view.place(passes("hashed", 64, *some("hashed")))
    view.probe(probe("hashed", 64, 3), 0.02)
    whole = [view.whole(slot) for slot in view.slots]
    for count in (BLOCK, 3 * BLOCK):
        monkeypatch.setattr(code_view, "TOGETHER", count)
        for slot, want in zip(view.slots[:2], whole, strict=False):
            assert torch.equal(view.whole(slot), want)
            assert np.array_equal(view.packed(slot), np.concatenate(
                [view.packed_rows(slot, row, row + 1) for row in range(len(want))]
            ))  # fmt: skip


def test_at_the_base_the_digest_is_the_bases_own_and_nothing_is_kept(file: Path) -> None:
    model = mapped(file)
    view = view_of(model)
    assert models.digest(view.pieces()) == model.digest
    many = np.arange(40, dtype=np.uint64) << np.uint64(
        32
    )  # of 40 epochs, whose sums weights in memory would cache
    view.place(passes("hashed", 64, many, np.full(40, 77)))
    assert models.digest(view.pieces()) != model.digest
    assert not view.folded.sums
    view.place(None)
    assert models.digest(view.pieces()) == model.digest


def batch(rows: int = 2, length: int = 9) -> Batch:
    ids = torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.ones_like(ids), ids)


def test_slopes_of_back_propagation_pass_the_rounding_over(file: Path) -> None:
    """dL/dD = dL/dw at the point: against the gradient of a dense float64 net with the view's weights."""
    model = mapped(file)
    view, K = view_of(model), 64
    view.place(passes("hashed", K, *some("hashed")))
    projection = Projection(view, K, 0)
    with Tape(view, projection.add), torch.enable_grad():
        loss_tensor(model, batch()).backward()  # type: ignore[no-untyped-call]
    found = projection.take()
    dense = models.load(str(file), device="cpu")
    weights = dict(named_tensors(dense.net))
    with torch.no_grad():
        for slot in view.slots:
            weights[slot.name].copy_(view.whole(slot))
    dense.net.double().requires_grad_(True)
    loss_tensor(dense, batch()).backward()  # type: ignore[no-untyped-call]
    weights, want = dict(named_tensors(dense.net)), np.zeros(K)
    for slot in view.slots:
        flat = weights[slot.name].grad.numpy().reshape(-1)  # type: ignore[union-attr]
        for k in range(K):
            z = scale_grid.summed(passes("hashed", K, [k], [1]), "hashed", KEY, slot.start, len(flat))
            want[k] += (z * flat).sum()
    np.testing.assert_allclose(found, want, rtol=2e-3, atol=2e-5 * np.abs(want).max())


def test_codes_of_blocks_move_and_a_base_without_any_is_refused(file: Path) -> None:
    model = mapped(file)
    named = named_tensors(model.net)
    assert moved_tensors(model) == tuple(
        (f"{n}.codes", tuple(t.shape), "float32") for n, t in named if in_blocks(t)
    )
    view = view_of(model)
    assert [s.start for s in view.slots] == [
        s.start for s in View.layout([(n, t) for n, t in named if in_blocks(t)])
    ]
    plain = tiny()
    plain.trains = "codes"
    with pytest.raises(UsageError, match="no codes that could be trained"):
        moved_tensors(plain)
    with pytest.raises(UsageError, match="direction of codes is not written out"):
        view.storing()


# The grid -------------------------------------------------------------------------------------------


def drawn(kind: str, n: int, seed: int) -> np.ndarray:
    """Any codes, with scales of both signs."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n, BYTES[kind]), dtype=np.uint8)
    d = rng.uniform(0.01, 0.1, (n, HALVES[kind])) * rng.choice([-1.0, 1.0], (n, HALVES[kind]))
    blocks[:, : 2 * HALVES[kind]] = d.astype("<f2").view(np.uint8)
    return blocks


@pytest.mark.parametrize("kind", HALVES)
def test_packing_is_the_inverse_of_unpacking_as_the_package_reads_it(kind: str) -> None:
    blocks = drawn(kind, 500, 1)
    codes = code_grid.unpacked(blocks, kind)
    assert np.array_equal(codes, dequantised(with_scales(blocks, kind, 1.0), kind))
    assert np.array_equal(code_grid.packed(codes, kind), blocks[:, 2 * HALVES[kind] :])


@pytest.mark.parametrize("kind", HALVES)
def test_a_block_without_a_scale_stays_and_without_passes_all_do(kind: str) -> None:
    blocks, rest = drawn(kind, 400, 2), slice(2 * HALVES[kind], None)
    far = passes("rademacher", 1, [5], [1000])
    assert np.array_equal(code_grid.moved(blocks, kind, 0, KEY, EMPTY, "hashed", 1.0), blocks[:, rest])
    for d in (0.0, -0.0, math.inf, math.nan):
        still = with_scales(blocks, kind, d)
        assert np.array_equal(code_grid.moved(still, kind, 0, KEY, far, "rademacher", 1.0), blocks[:, rest])
        found = torch.full((400, 32), 1000.0)
        codes, scales = code_grid.unpacked(still, kind), still[:, :2].copy().view("<f2").astype(np.float32)
        code_view.step(
            found, torch.from_numpy(codes), torch.from_numpy(scales), torch.full_like(found, 0.99), kind
        )
        assert np.array_equal(found.numpy(), codes)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("share", [0.003, -0.03, 0.4, -1.7])
def test_a_move_is_right_in_the_mean_in_both_signs_of_the_scale(kind: str, share: float) -> None:
    """131,072 equal codes in the middle, moved by a share of the scale: the mean weight moves by just that."""
    n, rest = 4096, slice(2 * HALVES[kind], None)
    middle = np.full((n, 32), {"Q4_1": 8, "Q5_1": 16, "IQ4_NL": 1}.get(kind, 0), np.float32)
    blocks = np.empty((n, BYTES[kind]), np.uint8)
    blocks[:, rest] = code_grid.packed(middle, kind)
    one = passes("rademacher", 1, [5], [1])
    signs = scale_grid.summed(one, "rademacher", KEY, 0, 32 * n).reshape(n, 32)
    for d in (0.125, -0.125):
        before = with_scales(blocks, kind, d)
        after = before.copy()
        grid = 0.125 * share * (12 if kind == "IQ4_NL" else 1)  # of the gap to the next value of the codebook
        after[:, rest] = code_grid.moved(before, kind, 0, KEY, one, "rademacher", grid)
        moved = (dequantised(after, kind).astype(np.float64) - dequantised(before, kind)) * signs
        spread = 0.125 * 12 * (2 if kind == "IQ4_NL" else 1 / 12)
        assert abs(moved.mean() - grid) < 5 * spread / math.sqrt(moved.size)
        assert len(np.unique(moved)) > 1, "it is rounded to both sides"


@given(st.integers(0, 1 << 40), st.integers(1, 1500), st.integers(0, (1 << 64) - 1))
def test_kernels_make_the_offsets_of_the_reference(start: int, count: int, key: int) -> None:
    want = code_grid.offsets(key, start, count)
    for kernels in (kernels_numba, kernels_torch):
        found = torch.empty(count)
        kernels.offsets(found, start, key, code_grid.OFFSETS)
        assert np.array_equal(found.numpy(), want)


def test_offsets_are_even_and_strictly_between_0_and_1() -> None:
    assert np.array_equal(code_grid.offsets(KEY, 1000, 600), offsets(1000, 600))
    u = code_grid.offsets(KEY, 0, 1 << 20).astype(np.float64)
    assert (u.min(), u.max()) == (0.5 / 65536, 65535.5 / 65536)
    assert np.array_equal(u * 131072 % 2, np.ones_like(u))
    counts = np.bincount((u * 16).astype(int), minlength=16)
    assert np.abs(counts - 65536).max() < 5 * math.sqrt(65536)
    for kernels in (kernels_numba, kernels_torch):
        with pytest.raises(ValueError, match="offsets are float32"):
            kernels.offsets(torch.empty(3, dtype=torch.bfloat16), 0, KEY, 1)


@pytest.mark.parametrize("kind", HALVES)
def test_a_far_move_ends_at_the_lowest_and_highest_code(kind: str) -> None:
    blocks = drawn(kind, 300, 4)
    new = blocks.copy()
    new[:, 2 * HALVES[kind] :] = code_grid.moved(
        blocks, kind, 0, KEY, passes("rademacher", 1, [5], [10**9]), "rademacher", 1000.0
    )
    ends = CODEBOOKS["iq4_nl"][0], CODEBOOKS["iq4_nl"][-1]
    if kind != "IQ4_NL":
        ends = LOWEST[kind], HIGHEST[kind]
    assert set(np.unique(code_grid.unpacked(new, kind)).tolist()) == set(ends)


def test_the_ledger_alone_decides(file: Path) -> None:
    """In many small steps or in one, by whatever way: the point is that of the sum."""
    view = view_of(mapped(file))
    slot = view.slots[0]
    view.place(passes("hashed", 64, np.arange(4, dtype=np.uint64), np.array([100, -40, 7, 0])))
    one: Tensor = view.whole(slot)
    ids = np.array([0, 1, 2, 3, 0, 1, 3], np.uint64)
    view.place(passes("hashed", 64, ids, np.array([60, -90, 7, 500, 40, 50, -500])))
    assert torch.equal(view.whole(slot), one)
