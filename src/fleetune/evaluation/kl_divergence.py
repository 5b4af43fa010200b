"""Compare the next-token distributions of a model with those of its reference: KL divergence and same top token.

With p the reference's softmax and q the measured model's, KL = sum_v p_v (log p_v - log q_v) in nats, in float64.  Standard
errors are sd / sqrt(n) over the n tokens, as in llama.cpp's `perplexity --kl-divergence`: tokens count as independent, which
those of one window are not.  The reference's logits wait in a file, float32 [tokens, vocabulary].
"""

import shutil
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import numpy as np

from fleetune.common import paired
from fleetune.common.display import human_bytes
from fleetune.common.files import storage_error
from fleetune.errors import StorageError

ROOM: Final = 10**9  # bytes of the file: 5,086 tokens of 49,152 pieces
FREE: Final = "free some space"
TEMPORARY: Final = (
    "free some space, or set TMPDIR to a folder on a larger disk"  # hint of a file in the temporary folder
)
PIECE: Final = 1 << 22  # bytes of float64 logits that are worked on at a time


class Divergence(NamedTuple):
    """The comparison with a reference; the errors are None for one token."""

    kl_divergence: float  # mean, nats
    kl_divergence_error: float | None
    same_top: float  # % of the tokens
    same_top_error: float | None
    kl_tokens: int

    def values(self) -> dict[str, float]:
        """Return what is known, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def positions(scored: int, vocabulary: int) -> int:
    """Return how many of so many scored tokens are compared: the first ones, whose logits fit the file."""
    return min(scored, max(1, ROOM // (4 * vocabulary)))


def file_size(scored: int, vocabulary: int) -> int:
    """Return the bytes of the logits in the file."""
    return 4 * vocabulary * positions(scored, vocabulary)


def scored(rows: Iterable[tuple[Sized, int]]) -> int:
    """Return how many tokens of rows (ids, n_prompt) are scored; the first one of a row never is."""
    return sum(max(0, len(ids) - max(n_prompt, 1)) for ids, n_prompt in rows)


def write(path: Path, pieces: Iterable[np.ndarray], scored: int, hint: str = FREE) -> int:
    """Write the reference's logits, float32 [n, vocabulary] a piece, of the first of so many scored tokens; return of how many.

    StorageError, with `hint`, when the disk has no room for all of them.
    """
    count = left = 0
    try:
        with open(path, "wb") as file:
            for piece in pieces:
                if not count:
                    need, free = file_size(scored, piece.shape[1]), shutil.disk_usage(path.parent).free
                    if need > free:
                        raise StorageError(
                            f"the logits of the reference take {human_bytes(need)}, {path.parent} has {human_bytes(free)} free",
                            hint=hint,
                        )
                    count = left = positions(scored, piece.shape[1])
                    head = {"descr": "<f4", "fortran_order": False, "shape": (count, piece.shape[1])}
                    np.lib.format.write_array_header_1_0(file, head)
                part = np.ascontiguousarray(piece[:left], "<f4")
                file.write(part.data)
                left -= len(part)
                if not left:
                    return count
    except OSError as error:
        raise storage_error(error, path) from error
    raise ValueError("there are fewer logits than scored tokens")


def tokens_in(path: Path) -> int:
    """Return the number of tokens whose logits are in the file of `write`."""
    with open(path, "rb") as file:
        return _shape(file)[0]


def _shape(file: BinaryIO) -> tuple[int, int]:
    """Return tokens and vocabulary of an open file, which is then at the first logit."""
    np.lib.format.read_magic(file)
    tokens, vocabulary = np.lib.format.read_array_header_1_0(file)[0]
    return tokens, vocabulary


def compare(path: Path, pieces: Iterable[np.ndarray]) -> Divergence:
    """Compare logits, float32 [n, vocabulary] a piece, with those of the same tokens in the file of `write`."""
    found = list[tuple[np.ndarray, np.ndarray]]()
    with open(path, "rb") as file:  # read, not mapped: its pages would count as memory of this process
        tokens, vocabulary = _shape(file)
        left = tokens
        for piece in pieces:
            count = min(len(piece), left)
            part = np.fromfile(file, "<f4", count * vocabulary).reshape(count, vocabulary)
            found.append(of_tokens(part, piece[:count]))
            left -= count
            if not left:
                return summary(*(np.concatenate(values) for values in zip(*found, strict=True)))
    raise ValueError(f"{tokens - left} tokens were given, the reference has {tokens}")


def of_tokens(P: np.ndarray, Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the KL divergence of each token, and whether the top is the same: float64 [n], bool [n].

    P [n, V] are the reference's logits, Q [n, V'] the model's; of V and V' the smaller counts.
    """
    V = min(P.shape[1], Q.shape[1])
    size = max(1, PIECE // (8 * V))
    kl = [_kl(P[a : a + size, :V], Q[a : a + size, :V]) for a in range(0, max(1, len(P)), size)]
    return np.concatenate(kl), P[:, :V].argmax(1) == Q[:, :V].argmax(1)


def summary(kl: np.ndarray, same: np.ndarray) -> Divergence:
    """Return the means over tokens with their standard errors, from what `of_tokens` gives."""
    ones = [1] * len(kl)
    mean, error = paired.ratio(kl.tolist(), ones)
    share, share_error = paired.ratio((100.0 * same).tolist(), ones)
    return Divergence(mean, error, share, share_error, len(kl))


def _kl(P: np.ndarray, Q: np.ndarray) -> np.ndarray:
    p, q = _log_softmax(P), _log_softmax(Q)
    terms = np.exp(p)
    with np.errstate(invalid="ignore"):  # -inf less -inf, where p is 0
        terms *= p - q
    terms[np.isneginf(p)] = 0.0
    total: np.ndarray = terms.sum(1)
    return total


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    x -= np.log(np.exp(x).sum(1, keepdims=True))
    return x
