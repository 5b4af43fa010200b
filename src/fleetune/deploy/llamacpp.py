"""Run a .gguf file in llama.cpp: its losses on given tokens, and one token after another for the clock.

Of the package llama-cpp-py-sync (`fleetune[llamacpp]`) only the bindings of llama.h are used.  The tokens are given, never made
by the file's own tokenizer: so the numbers compare weights and kernels.
"""

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetune.common.display import pip_install
from fleetune.errors import ModelError, UsageError

MODULE: Final = "llama_cpp_py_sync"
INSTALL: Final = pip_install("llamacpp")
BATCH: Final = 512  # tokens at a time in a prefill: llama.cpp's own default
SCORED: Final = 64  # positions whose logits are alive at a time: 13 MB of them for 49,152 pieces


def available() -> bool:
    """Whether the engine is installed."""
    return importlib.util.find_spec(MODULE) is not None


def cross_entropy(logits: NDArray[np.float32], targets: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return -log softmax(logits)[target] in nats: logits [n, V], targets [n] -> float64 [n]."""
    wide = logits.astype(np.float64)
    top = wide.max(1)
    own = wide[np.arange(len(targets)), targets]
    found: NDArray[np.float64] = top + np.log(np.exp(wide - top[:, None]).sum(1)) - own
    return found


class LlamaCpp:
    """A file's model, loaded for `threads` threads; `close` frees it."""

    def __init__(self, file: Path, threads: int) -> None:
        """UsageError when the engine is not installed, ModelError when it does not take the file."""
        if not available():
            raise UsageError(f"llama.cpp is not installed, so {file} cannot be run", hint=INSTALL)
        bindings = importlib.import_module(f"{MODULE}._cffi_bindings")
        self._ffi, self._lib = bindings.get_ffi(), bindings.get_lib()
        self._lib.llama_backend_init()
        settings = self._lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model: Any = self._lib.llama_model_load_from_file(str(file).encode(), settings)
        if self._model == self._ffi.NULL:
            raise ModelError(f"llama.cpp does not load {file}", hint="export the model again")
        self._file, self._threads, self._context = file, threads, self._ffi.NULL
        self.vocab = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model)))

    def open(self, length: int) -> None:
        """Make room for sequences of `length` tokens."""
        self._free()
        self._context = self._lib.llama_init_from_model(self._model, self._settings(length))
        if self._context == self._ffi.NULL:
            raise ModelError(f"llama.cpp has no room for {length} tokens of {self._file}", hint="free memory")
        self._at, self._room = 0, length

    def _settings(self, length: int) -> Any:
        """Return the parameters of a context of `length` tokens."""
        settings = self._lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = length, BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = self._threads
        return settings

    def prefill(self, ids: Sequence[int]) -> None:
        """Forget everything and read `ids`, at the last of which the next token is predicted."""
        self._clear()
        for first in range(0, len(ids), BATCH):
            self._read(ids[first : first + BATCH], all_logits=False)

    def step(self) -> None:
        """Append the likeliest token and predict the next."""
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        self._read([int(self._rows(logits, 1)[0].argmax())], all_logits=False)

    def losses(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, int]]:
        """Cross-entropy in nats over the tokens of rows (ids, n_prompt) from number n_prompt on (from 1): sums and numbers."""
        self.open(max(len(ids) for ids, _ in rows))
        found = [self._token_losses(ids)[max(n_prompt, 1) - 1 :] for ids, n_prompt in rows]
        return [(float(losses.sum()), len(losses)) for losses in found]

    def scored_logits(self, rows: Sequence[tuple[Sequence[int], int]]) -> Iterator[np.ndarray]:
        """Yield the logits of the tokens that `losses` scores, in order: float32 [n, V], each lasts until the next."""
        self.open(max(len(ids) for ids, _ in rows))
        for ids, n_prompt in rows:
            first = max(n_prompt, 1) - 1
            for at, logits in self._pieces(ids):
                if first < at + len(logits):
                    yield logits[max(0, first - at) :]

    def close(self) -> None:
        """Give the memory back."""
        self._free()
        if self._model != self._ffi.NULL:
            self._lib.llama_model_free(self._model)
            self._model = self._ffi.NULL

    def _token_losses(self, ids: Sequence[int]) -> np.ndarray:
        """float64 [T - 1]: the cross-entropy of every token but the first."""
        parts, targets = [np.zeros(0)], np.asarray(ids)[1:]
        for first, piece in self._pieces(ids):
            parts.append(cross_entropy(piece, targets[first : first + len(piece)]))
        return np.concatenate(parts)

    def _pieces(self, ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position, the logits there and at those that follow, float32 [n, V]), without the last position's."""
        self._clear()
        for first in range(0, len(ids) - 1, SCORED):
            part = ids[first : min(first + SCORED, len(ids) - 1)]
            self._read(part, all_logits=True)
            yield first, self._rows(self._lib.llama_get_logits(self._context), len(part))

    def _rows(self, logits: Any, count: int) -> np.ndarray:
        raw = self._ffi.buffer(logits, 4 * count * self.vocab)
        return np.frombuffer(raw, np.float32).reshape(count, self.vocab)

    def _read(self, ids: Sequence[int], *, all_logits: bool) -> None:
        if self._at + len(ids) > self._room:  # llama.cpp would end the process
            raise ModelError(f"there is room for {self._room} tokens, not for {self._at + len(ids)}")
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = int(token), self._at + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = all_logits or i + 1 == len(ids)
        failed = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if failed:
            raise ModelError(
                f"llama.cpp stopped with {failed} at token {self._at + len(ids)} of {self._file}",
                hint="give shorter rows, or free memory",
            )
        self._at += len(ids)

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._at = 0

    def _free(self) -> None:
        if self._context != self._ffi.NULL:
            self._lib.llama_free(self._context)
            self._context = self._ffi.NULL


@contextmanager
def opened(file: Path, threads: int) -> Iterator[LlamaCpp]:
    """The file's model while the block runs."""
    engine = LlamaCpp(file, threads)
    try:
        yield engine
    finally:
        engine.close()
