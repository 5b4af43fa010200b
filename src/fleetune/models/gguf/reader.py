# SPDX-License-Identifier: Apache-2.0
"""Open a GGUF file with the package gguf, four times faster, and once where transformers would parse it again.

The package makes two slices of a memory map for every token of the vocabulary, and numpy takes most of the time for what is
special about a map.  transformers parses the whole file for the configuration and again for the tokenizer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_lending = threading.Lock()


class Reader(gguf.GGUFReader):  # type: ignore[misc]
    """The package's reader, whose arrays are plain views of the mapped file.

    Errors are the package's own.  Should it read through another method one day, it reads as slowly as before.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        super().__init__(path)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if isinstance(self.data, np.memmap):
            self.data: Any = self.data.view(np.ndarray)
        kind = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
        return self.data[offset : offset + kind.itemsize * int(count)].view(kind)


@contextmanager
def lent(reader: Reader) -> Iterator[None]:
    """Give transformers an open file while the body runs, in place of parsing it; any other file is parsed.

    transformers takes `GGUFReader` from the package at each call.  Meanwhile that is a function, in all threads.  One of
    them lends at a time.
    """

    def opened(path: str | os.PathLike[str]) -> Reader:
        return reader if os.path.samefile(path, reader.path) else Reader(path)

    with _lending:
        theirs = gguf.GGUFReader
        try:
            gguf.GGUFReader = opened
            yield
        finally:
            gguf.GGUFReader = theirs
