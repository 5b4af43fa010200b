"""The view of outer products: every piece of every tensor by its definition in whole numbers, on any number of threads."""

import hashlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fleetune.models.net.model import named_tensors
from fleetune.seeds import noise
from fleetune.seeds.noise import Passes
from fleetune.seeds.scale_view import OuterView
from law_definition import slow_sign

KEY, GRID = 0xFEEDFACE12345678, float(np.float32(3e-6))
SHAPES = {"a": (5, 7), "b": (9,), "c": (3, 4, 6), "d": (2, 130)}
ROWS, STARTS = {"a": (0, 5), "c": (5, 17), "d": (17, 19)}, {"a": 0, "b": 4096, "c": 8192, "d": 12288}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def net(dtype: str) -> nn.Module:
    made, draw = nn.Module(), np.random.default_rng(3)
    for name, shape in SHAPES.items():
        values = torch.from_numpy(draw.normal(size=shape).astype(np.float32)).to(DTYPES[dtype])
        made.register_parameter(name, nn.Parameter(values, requires_grad=False))
    return made


def view(dtype: str) -> OuterView:
    made = net(dtype)
    return OuterView(named_tensors(made), made, run_key=KEY, law=noise.OUTER, grid=GRID)


def to_bf16(x: np.float32) -> int:
    """The bits of a number rounded to nearest, ties to even."""
    bits = int(np.asarray(x).view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


sign = cache(slow_sign)


def bits_by_hand(name: str, dtype: str, first: int, last: int, tables: dict[int, list[int]]) -> list[int]:
    """The bits of elements first..last: to_dtype(float32(w0) + grid * float32(sum_p table_p s_p'))."""
    w0, width, found = net(dtype).get_parameter(name).float().numpy().reshape(-1), SHAPES[name][-1], []
    for i in range(first, last):
        row, column = divmod(i, width)
        here = tables.items() if name in ROWS else ()
        acc = sum(t[ROWS[name][0] + row] * sign(KEY, p, STARTS[name] + column) for p, t in here)
        w = np.float32(w0[i]) + np.float32(np.float32(GRID) * np.float32(acc))
        found.append(to_bf16(w) if dtype == "bf16" else int(np.asarray(w).view(np.uint32)))
    return found


def bits_of(piece: torch.Tensor) -> list[int]:
    wide = {torch.float32: (torch.int32, 0xFFFFFFFF), torch.bfloat16: (torch.int16, 0xFFFF)}
    kind, mask = wide[piece.dtype]
    return [x & mask for x in piece.view(kind).tolist()]


tables_of = st.dictionaries(
    st.sampled_from([0, 1, 5, 2**32 - 1]),
    st.lists(st.integers(-(2**40), 2**40) | st.integers(-2000, 2000), min_size=19, max_size=19),
    max_size=3,
)


@given(
    dtype=st.sampled_from(list(DTYPES)),
    tables=tables_of,
    still=st.sets(st.sampled_from(list(ROWS))),
    chunk=st.integers(1, 40),
    given_out=st.booleans(),
)
@settings(max_examples=15)
def test_any_piece_is_the_formula_in_whole_numbers(dtype, tables, still, chunk, given_out):
    for table in tables.values():
        for name in still:
            table[slice(*ROWS[name])] = [0] * (ROWS[name][1] - ROWS[name][0])
    made = view(dtype)
    ids = sorted(tables)
    made.place(Passes(np.array(ids, np.uint64), np.array([tables[p] for p in ids], np.int64).reshape(-1, 19)))
    for slot in made.slots:
        for first in range(0, slot.tensor.numel(), chunk):
            last = min(first + chunk, slot.tensor.numel())
            out = torch.empty(last - first, dtype=DTYPES[dtype]) if given_out else None
            piece = made.piece(slot, first, last, out)
            assert out is None or piece is out
            assert bits_of(piece) == bits_by_hand(slot.name, dtype, first, last, tables)
    assert all(torch.equal(p, net(dtype).get_parameter(n)) for n, p in made.net.named_parameters())


def digest(threads: int) -> str:
    """SHA-256 of a matrix and of a product with it, large enough for several threads."""
    draw, before = np.random.default_rng(1), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer: Any = nn.Linear(300, 700, bias=False).requires_grad_(False)
        layer.weight.copy_(torch.from_numpy(draw.normal(size=(700, 300)).astype(np.float32)))
        made = OuterView(named_tensors(layer), layer, run_key=KEY, law=noise.OUTER, grid=GRID)
        made.place(Passes(np.arange(40, dtype=np.uint64), draw.integers(-(2**40), 2**40, (40, 700))))
        return hashlib.sha256(made.whole(made.slots[0]).numpy().tobytes()).hexdigest()
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit():
    assert digest(1) == digest(2) == digest(3)


@pytest.mark.parametrize("name", SHAPES)
def test_passes_are_counted_where_they_move_something(name):
    made = view("fp32")
    table = np.zeros((2, 19), np.int64)
    table[:, 17:] = 1  # moves d alone
    made.place(Passes(np.array([3, 4], np.uint64), table))
    slot = next(slot for slot in made.slots if slot.name == name)
    made.whole(slot)
    assert made.swept == (2 * 260 if name == "d" else 0)
