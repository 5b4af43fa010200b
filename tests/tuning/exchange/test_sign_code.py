"""The code of signs: its planes by their definition, number by number, and tensors as one vector and back."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from fleetune.tuning.exchange.sign_code import Layout, Signs, add, encode

shapes = st.lists(array_shapes(max_dims=4, max_side=6), min_size=1, max_size=4)


@given(shapes, st.integers(0, 99))
def test_tensors_go_into_one_vector_and_back(sides, seed):
    rng = np.random.default_rng(seed)
    tensors = {f"t{9 - i}": rng.normal(size=side).astype(np.float32) for i, side in enumerate(sides)}
    layout = Layout.of(tensors)
    vector = layout.flat(tensors)
    back = layout.tensors(vector)
    assert list(back) == sorted(tensors)
    assert all(np.array_equal(back[n], t) for n, t in tensors.items())
    assert layout.sizes.sum() == len(vector) == sum(t.size for t in tensors.values())


def test_a_group_is_a_row_of_a_and_a_column_of_b():
    a, b = np.arange(10, dtype=np.float32).reshape(2, 5), -np.arange(6, dtype=np.float32).reshape(3, 2)
    layout = Layout.of({"b": b, "a": a, "bias": np.ones(4)})
    assert layout.groups.tolist() == [[2, 5], [2, 3], [1, 4]]
    parts = np.split(layout.flat({"a": a, "b": b, "bias": np.ones(4)}), np.cumsum(layout.sizes)[:-1])
    for part, wanted in zip(parts, [a[0], a[1], b[:, 0], b[:, 1], np.ones(4)], strict=True):
        np.testing.assert_array_equal(part, wanted)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 99))
def test_each_plane_is_the_mean_size_and_the_signs_of_what_is_left(each, planes, seed):
    sizes, x = np.array(each), np.random.default_rng(seed).normal(size=sum(each))
    signs = encode(x, sizes, planes)
    assert (signs.bits.dtype, signs.scales.dtype) == (np.uint8, np.float32)
    assert signs.bits.shape == (planes, -(-len(x) // 8))
    left, total = x.copy(), np.zeros(len(x), np.float32)
    for plane in range(planes):
        at = 0
        for group, size in enumerate(each):
            scale = signs.scales[plane, group]
            np.testing.assert_allclose(scale, np.abs(left[at : at + size]).mean(), rtol=1e-6)
            for i in range(at, at + size):
                bit = signs.bits[plane, i // 8] >> (7 - i % 8) & 1
                assert bit == (left[i] < 0)
                left[i] -= -scale if bit else scale
                total[i] += -scale if bit else scale
            at += size
    np.testing.assert_array_equal(add(np.zeros(len(x)), signs, sizes), total)


def test_planes_that_come_apart_add_up_to_the_same_bits():
    rng = np.random.default_rng(0)
    start, sizes = rng.normal(size=300).astype(np.float32), np.array([100, 200])
    signs = encode(rng.normal(size=300), sizes, 3)
    apart = start
    for i in range(3):
        apart = add(apart, Signs(signs.bits[i : i + 1], signs.scales[i : i + 1]), sizes)
    np.testing.assert_array_equal(apart, add(start, signs, sizes))
    assert start.dtype == np.float32
    np.testing.assert_array_equal(add(start, Signs(signs.bits[:0], signs.scales[:0]), sizes), start)
