"""The scales of a quantised base as what is trained: points, slopes and gradients against plain references."""

import math
from functools import partial
from pathlib import Path

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
from fleetune.models.lazy import in_blocks
from fleetune.models.net.model import Model, named_tensors
from fleetune.models.stored import Stored, dequantise
from fleetune.seeds import descent, noise
from fleetune.seeds.descent import Projection
from fleetune.seeds.noise import EMPTY, passes, probe
from fleetune.seeds.scale_view import ScaleView, moved_tensors
from fleetune.seeds.view import Tape

pytestmark = pytest.mark.usefixtures("own_cache")
KEY, GRID = 11, 1e-5


@pytest.fixture(scope="module", params=["Q4_0", "Q5_1", "Q8_0", "IQ4_NL"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert request.param in BLOCKS
    return gguf_of(tmp_path_factory.mktemp("gguf"), request.param)


def mapped(file: Path, dtype: str = "fp32") -> Model:
    model = models.load(str(file), device="cpu", base="mapped", dtype=dtype)
    model.trains = "scales"
    return model


def view_of(model: Model, law: str = "hashed") -> ScaleView:
    return ScaleView(named_tensors(model.net), model.net, run_key=KEY, law=law, grid=GRID)


def some(law: str, count: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    ids = np.arange(count, dtype=np.uint64) * (1 if law == "hashed" else 7)
    return ids, rng.integers(-2000, 2000, count)


def reference(stored: Stored, start: int, law: str, K: int, eps: float = 0.0, k: int = 0) -> Tensor:
    """The weights of a matrix at the point, from the bytes of its file, in numpy and float32 as the text of the grid says."""
    halves, size = HALVES[stored.kind], BYTES[stored.kind]
    raw = np.array(stored.file.bytes(stored.offset, stored.size)).reshape(stored.shape[0], -1)
    rows = raw if stored.order is None else raw[stored.order]
    blocks = rows.reshape(-1, size).copy()
    bits = blocks[:, : 2 * halves].copy().view("<u2").reshape(-1)
    if eps:  # a probe: float32 after the passes' own sum
        ids, c = some(law)
        total = noise.summed(passes(law, K, ids, c), KEY, start, len(bits)).astype(np.float32)
        p = total * np.float32(GRID) + (bits & 0x7FFF).astype(np.float32) / np.float32(1024)
        id, _ = probe(law, K, k)
        z = passes(law, K, [(id << 32) | k if law == "hashed" else id], [1])
        one = noise.summed(z, KEY, start, len(bits))
        p = p + one.astype(np.float32) * np.float32(eps)
        u = (noise.rounding(KEY, start, len(bits)).astype(np.float32) + np.float32(0.5)) / np.float32(256)
        whole = np.clip(np.floor(p * np.float32(1024) + u), 0, 0x7BFF).astype(np.uint16)
        new = np.where(bits & 0x7FFF, whole | (bits & 0x8000), bits)
    else:
        new = noise.moved_scales(bits, start, KEY, passes(law, K, *some(law)), GRID)
    blocks[:, : 2 * halves] = new.astype("<u2").view(np.uint8).reshape(-1, 2 * halves)
    out = torch.empty(math.prod(stored.shape))
    dequantise(out, torch.from_numpy(blocks.reshape(-1)), stored.kind)
    return out.view(stored.shape)


@pytest.mark.parametrize("law", ["hashed", "rademacher"])
def test_a_point_is_that_of_the_reference_for_every_matrix(law, file):
    model = mapped(file)
    view = view_of(model, law)
    K = 64 if law == "hashed" else 1
    view.place(passes(law, K, *some(law)))
    weights = dict(named_tensors(model.net))
    moved = 0
    for slot in view.slots:
        want = reference(weights[slot.name].stored, slot.start, law, K)
        whole = view.whole(slot)
        assert torch.equal(whole, want)
        for first, last in ((5, 70), (63, 64), (1, whole.numel())):  # wherever a piece begins
            assert torch.equal(view.piece(slot, first, last), whole.view(-1)[first:last])
        moved += int((want != weights[slot.name].values()).sum())
        view.probe(probe(law, K, 9), 0.02)
        probed = reference(weights[slot.name].stored, slot.start, law, K, 0.02, 9)
        assert torch.equal(view.whole(slot), probed)
        assert not torch.equal(probed, want)
        view.probe(None)
    assert moved > 1000


def test_at_the_base_the_digest_is_the_bases_own(file):
    model = mapped(file)
    view = view_of(model)
    assert models.digest(view.pieces()) == model.digest
    view.place(passes("hashed", 64, *some("hashed")))
    assert models.digest(view.pieces()) != model.digest
    view.place(None)
    assert models.digest(view.pieces()) == model.digest


def batch(rows: int = 2, length: int = 9) -> Batch:
    ids = torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.ones_like(ids), ids)


def test_both_signs_in_one_forward_are_two_forwards(file):
    model = mapped(file, "bf16")
    view = view_of(model)
    view.place(passes("hashed", 64, *some("hashed")))
    with torch.inference_mode():
        loss = partial(descent.batch_loss, model, batch())
        two = descent.two_point(view, probe("hashed", 64, 3), 0.02, loss)
        assert descent._in_one_forward(model, view, probe("hashed", 64, 3), batch(), 0.02) == two
    assert two[0] != two[1]


def test_slopes_of_back_propagation_are_those_of_the_scales(file):
    """Against the gradient of a dense float64 net, pulled back by hand: dL/dp = dd/dp sum of q dL/dw."""
    model = mapped(file)
    view = view_of(model)
    K = 64
    projection = Projection(view, K, 0)
    with Tape(view, projection.add), torch.enable_grad():
        loss_tensor(model, batch()).backward()  # type: ignore[no-untyped-call]
    found = projection.take()
    dense = models.load(str(file), device="cpu")
    dense.net.double().requires_grad_(True)
    loss_tensor(dense, batch()).backward()  # type: ignore[no-untyped-call]
    weights, want = dict(named_tensors(dense.net)), np.zeros(K)
    lazy = dict(named_tensors(model.net))
    for slot in view.slots:
        stored: Stored = lazy[slot.name].stored
        bits, codes = plain(stored)
        g = weights[slot.name].grad.reshape(len(codes), BLOCK)  # type: ignore[union-attr]
        by_scale = torch.stack([(g * codes).sum(1), *([g.sum(1)] * (bits.shape[1] - 1))], 1)
        exponent = np.maximum(bits >> 10 & 31, 1).astype(np.float64)
        slope = np.where(bits & 0x8000, -1.0, 1.0) * 2.0 ** (exponent - 15)
        flat = (by_scale.numpy() * slope).reshape(-1)
        for k in range(K):
            z = noise.summed(passes("hashed", K, [k], [1]), KEY, slot.start, len(flat))
            want[k] += (z * flat).sum()
    np.testing.assert_allclose(found, want, rtol=2e-3, atol=2e-5 * np.abs(want).max())


def plain(stored: Stored) -> tuple[np.ndarray, Tensor]:
    """The scales' bits [blocks, 1 or 2] and the codes float64 [blocks, 32] of a matrix, rows as in the model."""
    size, halves = BYTES[stored.kind], HALVES[stored.kind]
    raw = np.array(stored.file.bytes(stored.offset, stored.size)).reshape(stored.shape[0], -1)
    blocks = (raw if stored.order is None else raw[stored.order]).reshape(-1, size)
    bits = blocks[:, : 2 * halves].copy().view("<u2").astype(np.int64)
    ones = blocks.copy()
    ones[:, : 2 * halves] = np.array([0x3C00, 0][:halves], "<u2").view(np.uint8)  # d = 1, m = 0
    codes = gguf.quants.dequantize(ones, gguf.GGMLQuantizationType[stored.kind])
    return bits, torch.from_numpy(codes.astype(np.float64))


def test_only_blocks_are_moved_and_a_base_without_any_is_refused(file):
    model = mapped(file)
    names = [name for name, _, _ in moved_tensors(model)]
    assert names == [f"{n}.scales" for n, t in named_tensors(model.net) if in_blocks(t)]
    assert not any("norm" in name for name in names)
    plain_one = tiny()
    plain_one.trains = "scales"
    with pytest.raises(UsageError, match="no scales"):
        moved_tensors(plain_one)


def test_without_passes_nothing_moves():
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = every[(every & 0x7C00) != 0x7C00]
    assert np.array_equal(noise.moved_scales(finite, 0, KEY, EMPTY, 1.0), finite)


@given(st.integers(0, 1 << 40), st.integers(1, 2000), st.integers(0, (1 << 64) - 1))
def test_the_offsets_of_a_part_are_those_of_the_whole(start, count, key):
    begin = start - start % 4096
    whole = noise.rounding(key, begin, start - begin + count)
    assert np.array_equal(noise.rounding(key, start, count), whole[start - begin :])


@given(st.floats(-3, 3), st.integers(0, 1000))
def test_a_move_is_right_in_the_mean_and_keeps_sign_zero_and_range(steps, seed):
    """4,096 equal scales, moved by `steps` of fp16's: each by the whole number below or above, in the right shares."""
    bits = np.full(4096, 0x2400 | (seed & 1) << 15, np.uint16)
    one = passes("rademacher", 1, [seed], [1])
    signs = noise.summed(one, KEY, 0, 4096)
    got = noise.moved_scales(bits, 0, KEY, one, steps / 1024).astype(np.int64) - bits
    assert set(np.unique(np.abs(got - steps * signs) < 1.01)) == {True}
    assert abs((got - steps * signs).mean()) < 5 * 0.5 / 64
    assert np.array_equal(noise.moved_scales(bits & 0x8000, 0, KEY, one, steps / 1024), bits & 0x8000)
    ends = noise.moved_scales(bits, 0, KEY, passes("rademacher", 1, [seed], [10**6]), 1.0)
    assert set((ends & 0x7FFF).tolist()) == {0, 0x7BFF}
    assert set((ends >> 15).tolist()) == {seed & 1}
