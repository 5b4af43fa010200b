# SPDX-License-Identifier: Apache-2.0
"""Write text to stdout or stderr, whatever becomes of their reader and whatever their encoding lacks."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from io import UnsupportedOperation
from typing import TextIO

_PLAIN = str.maketrans({"▼": "v", "▲": "^", "─": "-", "·": "|", "…": "~", "−": "-"})


class Stream:
    """A text stream that outlives its reader and never fails on a character its encoding lacks.

    `raw` is None where the process was started without the stream.  `lost` is called once, when it cannot be written
    for another reason than that nobody reads it.
    """

    def __init__(self, raw: TextIO | None, lost: Callable[[OSError], None] = lambda error: None) -> None:
        self.raw, self.lost = raw, lost
        self.ended = raw is None
        self.encoding = (raw and raw.encoding) or "utf-8"
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.fancy = raw is not None and raw.isatty() and not plain

    def write(self, text: str) -> int:
        """Write and flush a text; return its length, also where nobody reads it."""
        if self.ended or self.raw is None:
            return len(text)
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            text = text.translate(_PLAIN).encode(self.encoding, "replace").decode(self.encoding)
        try:
            self.raw.write(text)
            self.raw.flush()
        except OSError as error:
            self._detach(self.raw)
            if not isinstance(error, BrokenPipeError):
                self.lost(error)
        return len(text)

    def flush(self) -> None:
        """Nothing to do: every write is flushed."""

    def isatty(self) -> bool:
        """Tell whether colours and a live bar may be drawn."""
        return self.fancy

    def fileno(self) -> int:
        """Return the descriptor; UnsupportedOperation where the process was started without the stream."""
        if self.raw is None:
            raise UnsupportedOperation("the process has no such stream")
        return self.raw.fileno()

    def _detach(self, raw: TextIO) -> None:
        # What is still buffered would raise again when the interpreter exits: let it go to the null device.
        self.ended = True
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, raw.fileno())
            os.close(null)
