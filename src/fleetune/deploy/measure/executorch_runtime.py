# SPDX-License-Identifier: Apache-2.0
"""A folder of `--to pte` in ExecuTorch's own runtime: its losses on given tokens, and one token after another for the clock.

The engine is the package executorch (an extra: `fleetune[executorch]`).  The tokens are given, never made by the folder's own
tokenizer.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from fleetune.common.extras import pip_install
from fleetune.deploy.formats._pte_program import Program, quiet
from fleetune.deploy.measure.stepwise import Stepwise
from fleetune.errors import ModelError, UsageError

MODULE: Final = "executorch"
INSTALL: Final = pip_install("executorch")


class ExecuTorch(Stepwise):
    """A folder's model, loaded for `threads` threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        """UsageError when the engine is not installed, ModelError when it does not take the folder."""
        if importlib.util.find_spec(MODULE) is None:
            raise UsageError(f"ExecuTorch is not installed, so {folder} cannot be run", hint=INSTALL)
        with quiet():
            runtime: Any = importlib.import_module("executorch.extension.pybindings.portable_lib")
        runtime._unsafe_reset_threadpool(threads)
        try:
            self._program = Program(folder / "model.pte")
            self.vocab = int(self._program.fact("get_vocab_size"))
            self._at_once = int(self._program.fact("get_max_seq_len"))
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(f"ExecuTorch does not load {folder}: {error}", hint="export it again") from error
        self._at = 0

    def open(self, length: int) -> None:
        """Nothing to do: the program has room for keys and values."""

    def close(self) -> None:
        """Nothing to do: the process ends."""

    def _clear(self) -> None:
        self._at = 0

    def _read(self, ids: Sequence[int]) -> None:
        pieces = []
        for start in range(0, len(ids), self._at_once):
            piece = torch.tensor([list(ids[start : start + self._at_once])])
            pieces.append(self._program.forward(piece, self._at)[0].numpy())
            self._at += piece.shape[1]
        self._logits = np.concatenate(pieces)
