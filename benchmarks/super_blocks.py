# SPDX-License-Identifier: Apache-2.0
"""Errors on the grids of GGUF's super-blocks, beside llama.cpp's own quantiser.

    python -m benchmarks.super_blocks                               random weights, with and without weights of the errors
    python -m benchmarks.super_blocks smollm2-135m wiki.valid.txt   a model's MLP outputs, whose rows 256 divides

Random weights: 256 rows of 1024, of a normal distribution and of Student's t with 4 degrees of freedom, rounded to nearest.  Our
sum of squared errors is told as a share of llama.cpp's: as it is called without an importance matrix, with one of ones, and with
a lognormal one (sigma = 1), by which both errors are weighed then.

A model: four of its down projections, dimensions permuted (`benchmarks.compression`), the inputs those of the first 16 windows of
256 tokens.  Told is ||WX - QX||^2 / ||WX||^2 in 1e-4: of rounding to nearest, of llama.cpp's quantiser with an importance matrix
of the same inputs (the diagonal of X X^T), and of OPTQ.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from benchmarks.compression import permute, windows
from fleetune import compression, models
from fleetune.compression.layerwise import hessian
from fleetune.compression.layerwise.grids import Grid
from fleetune.compression.layerwise.groups import rounded
from fleetune.models.superblocks import SUPER_TYPES

BESIDE = ("ggml", "iq4_nl")  # grids of blocks of 32, Q4_0 and IQ4_NL
FOUND = importlib.util.find_spec("llama_cpp_py_sync")
LIBRARY = Path(FOUND.origin).parent / "libggml-base.so.0" if FOUND and FOUND.origin else None


def there() -> bool:
    """Whether llama.cpp's library is installed."""
    return LIBRARY is not None and LIBRARY.is_file()


@cache
def _library() -> Any:
    opened = ctypes.CDLL(str(LIBRARY))
    opened.ggml_quantize_chunk.restype = ctypes.c_size_t
    opened.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    return opened


def llama_cpp(x: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """What llama.cpp makes of x float32 [R, C] in blocks of `kind`; importance float32 [C] is its importance matrix."""
    x, type_ = np.ascontiguousarray(x, np.float32), gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    out = np.zeros((len(x), x.shape[1] // block * size), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    at = None if weights is None else weights.ctypes.data
    written = _library().ggml_quantize_chunk(int(type_), x.ctypes.data, out.ctypes.data, 0, *x.shape, at)
    assert written == out.size
    read: np.ndarray = gguf.quants.dequantize(out, type_)
    return read


def grid_of(kind: str) -> Grid:
    """The grid of a super-block type."""
    return Grid(kind, SUPER_TYPES[kind].bits)


def of_random_weights() -> Iterator[tuple[str, str, float, float, float]]:
    """(distribution, grid, our share of llama.cpp's error: plain, with ones, weighed)."""
    rng = np.random.default_rng(11)
    for name in ("normal", "Student's t"):
        for kind in SUPER_TYPES:
            shape = (256, 1024)
            drawn = rng.standard_normal(shape) if name == "normal" else rng.standard_t(4, shape)
            x, h = (0.02 * drawn).astype(np.float32), rng.lognormal(0, 1, 1024).astype(np.float32)
            ours = [
                rounded(torch.from_numpy(x), grid_of(kind), 32, w).dense()
                for w in (None, torch.from_numpy(h))
            ]
            theirs = [llama_cpp(x, kind.upper(), w) for w in (None, np.ones_like(h), h)]

            def error(q: Any, weights: Any, x: np.ndarray = x) -> float:
                return float((weights * (np.asarray(q, np.float64) - x) ** 2).sum())

            plain = error(ours[0], 1)
            yield (
                name, kind, plain / error(theirs[0], 1), plain / error(theirs[1], 1),
                error(ours[1], h) / error(theirs[2], h),
            )  # fmt: skip


def inputs(model: models.Model, text: str, layers: list[int]) -> dict[int, Tensor]:
    """The Hessians of these layers' down projections."""
    found: dict[int, Tensor] = {}

    def keep(number: int, x: Tensor) -> None:
        H = found.setdefault(number, torch.zeros(x.shape[-1], x.shape[-1]))
        hessian.accumulate(H, x)

    net: Any = model.net
    hooks = [
        net.model.layers[i].mlp.down_proj.register_forward_hook(lambda _, x, y, i=i: keep(i, x[0].float()))
        for i in layers
    ]
    with torch.no_grad():
        for window in windows(model, text, 256, 16):
            net(window[None])
    for hook in hooks:
        hook.remove()
    return {i: hessian.mirrored(H) for i, H in found.items()}


def of_a_model(model: models.Model, text: str) -> Iterator[str]:
    """Rows of a table: grid, bits a weight, the errors of each layer, the seconds of OPTQ."""
    permute(model)
    net: Any = model.net
    count = len(net.model.layers)
    layers = [0, count // 3, 2 * count // 3, count - 1]
    hessians = inputs(model, text, layers)
    for kind in (*BESIDE, *SUPER_TYPES):
        type_, cells, seconds = {"ggml": "Q4_0"}.get(kind, kind.upper()), [], 0.0
        for i, H in hessians.items():
            W = net.model.layers[i].mlp.down_proj.weight.detach().float()
            solved = [compression.make(name, {"grid": kind}) for name in ("rtn", "optq")]
            rtn = solved[0].solve(W, H).weight.dense()  # type: ignore[union-attr]
            began = time.process_time()
            optq = solved[1].solve(W, H).weight.dense()  # type: ignore[union-attr]
            seconds += (time.process_time() - began) / len(hessians)
            theirs = torch.from_numpy(llama_cpp(W.numpy(), type_, H.diagonal().numpy()))
            errors = [1e4 * hessian.trace(W - Q, H) / hessian.trace(W, H) for Q in (rtn, theirs, optq)]
            cells.append(" · ".join(f"{error:.1f}" for error in errors))
        bits = Grid(kind, 4).bits_per_weight if kind in BESIDE else grid_of(kind).bits_per_weight
        yield f"| {kind} | {bits:g} | {' | '.join(cells)} | {seconds:.2f} s |"


def main() -> None:
    """Print a table, a row as soon as it is there."""
    parser = argparse.ArgumentParser(
        "benchmarks.super_blocks", description="Errors beside llama.cpp's quantiser."
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.model:
        for line in of_a_model(models.load(options.model, device="cpu"), options.text):
            print(line, flush=True)
        return
    for name, kind, *shares in of_random_weights():
        print(f"| {name} | {kind} | " + " | ".join(f"{share:.3f}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
