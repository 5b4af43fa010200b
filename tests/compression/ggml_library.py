# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's own quantiser, from the library that the installed bindings bring along."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

FOUND = importlib.util.find_spec("llama_cpp_py_sync")
FILE = Path(FOUND.origin).parent / "libggml-base.so.0" if FOUND and FOUND.origin else None
THERE = FILE is not None and FILE.is_file()


@cache
def library() -> Any:
    opened = ctypes.CDLL(str(FILE))
    opened.ggml_quantize_chunk.restype = ctypes.c_size_t
    opened.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    return opened


def rounded(x: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """What llama.cpp makes of x float32 [R, C] in blocks of `kind`; importance float32 [C] is its importance matrix."""
    x, type_ = np.ascontiguousarray(x, np.float32), gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    out = np.zeros((len(x), x.shape[1] // block * size), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    at = None if weights is None else weights.ctypes.data
    written = library().ggml_quantize_chunk(int(type_), x.ctypes.data, out.ctypes.data, 0, *x.shape, at)
    assert written == out.size
    read: np.ndarray = gguf.quants.dequantize(out, type_)
    return read
