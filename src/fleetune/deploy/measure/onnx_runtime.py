# SPDX-License-Identifier: Apache-2.0
"""A folder of `--to onnx` in ONNX Runtime itself: its losses on given tokens, and one token after another for the clock.

The engine is the package onnxruntime (an extra: `fleetune[onnx]`).  The tokens are given, never made by the folder's own
tokenizer, and keys and values are fp32, as the graph has them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from fleetune.common.extras import pip_install
from fleetune.deploy.measure.stepwise import Stepwise
from fleetune.errors import ModelError, UsageError

MODULE: Final = "onnxruntime"
INSTALL: Final = pip_install("onnx")


class OnnxRuntime(Stepwise):
    """A folder's model, loaded for `threads` threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        """UsageError when the engine is not installed, ModelError when it does not take the folder."""
        if importlib.util.find_spec(MODULE) is None:
            raise UsageError(f"ONNX Runtime is not installed, so {folder} cannot be run", hint=INSTALL)
        runtime: Any = importlib.import_module(MODULE)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        file, processors = str(folder / "model.onnx"), ["CPUExecutionProvider"]
        try:
            self._session = runtime.InferenceSession(file, options, providers=processors)
        except Exception as error:  # of classes without a common base
            raise ModelError(
                f"ONNX Runtime does not load {folder}: {error}", hint="export it again"
            ) from error
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._past = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self._session.get_inputs()
            if value.name.startswith("past")
        }
        self.vocab = int(self._session.get_outputs()[0].shape[-1])

    def open(self, length: int) -> None:
        """Nothing to do: keys and values grow with the text."""

    def close(self) -> None:
        """Nothing to do: the process ends."""

    def _clear(self) -> None:
        self._kept, self._at = self._past, 0

    def _read(self, ids: Sequence[int]) -> None:
        self._at += len(ids)
        feed = {
            "input_ids": np.array([list(ids)], np.int64),
            "attention_mask": np.ones((1, self._at), np.int64),
            **self._kept,
        }
        found = dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
        self._logits = found.pop("logits")[0]
        self._kept = {name.replace("present", "past_key_values", 1): kept for name, kept in found.items()}
