"""Write the change of some tensors as signs, one bit a number, with a scale for each group of numbers.

signSGD's scaled sign (Bernstein et al. 2018, arXiv 1802.04434; Karimireddy et al. 2019, arXiv 1901.09847, Algorithm 1): a group x
is written as s = mean |x| and the signs of x, which of all such is nearest to x.  A further plane writes what is left in the same
way.  A matrix has a group for each place along its shorter side, so that LoRA has one for each direction of A and of B; any
other tensor is one matrix of its first axis by the rest.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, Self

import numpy as np

Tensors = dict[str, np.ndarray]


class Signs(NamedTuple):
    """Planes of signs: one bit a number, 1 for what is below 0, and a scale a group."""

    bits: np.ndarray  # uint8 [planes, numbers / 8, rounded up]
    scales: np.ndarray  # float32 [planes, groups]


class Layout(NamedTuple):
    """Where the numbers of tensors stand in one vector: the tensors in the order of their names, each group in one piece."""

    shapes: Mapping[str, tuple[int, ...]]
    groups: np.ndarray  # uint32 [tensors, 2]: groups, and numbers of each

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> Self:
        shapes = {name: tensors[name].shape for name in sorted(tensors)}
        sides = [sorted((s[0], math.prod(s[1:]))) for s in shapes.values()]
        return cls(shapes, np.array(sides, np.uint32).reshape(-1, 2))

    @property
    def sizes(self) -> np.ndarray:
        """The numbers of each group, int64."""
        return np.repeat(self.groups[:, 1], self.groups[:, 0]).astype(np.int64)

    def flat(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return tensors as the one vector."""
        matrices = [tensors[name].reshape((*tensors[name].shape[:1], -1)) for name in self.shapes]
        return np.concatenate([(m.T if len(m) > m.shape[1] else m).ravel() for m in matrices])

    def tensors(self, vector: np.ndarray) -> Tensors:
        """Return the tensors of the one vector."""
        parts = np.split(vector, np.cumsum(self.groups.prod(axis=1, dtype=np.int64))[:-1])
        found = {}
        for part, (name, shape), sides in zip(parts, self.shapes.items(), self.groups.tolist(), strict=True):
            matrix = part.reshape(sides)
            found[name] = np.ascontiguousarray(matrix.T if shape[0] > sides[0] else matrix).reshape(shape)
        return found


def encode(x: np.ndarray, sizes: np.ndarray, planes: int = 1) -> Signs:
    """Return x, in groups of these sizes, as planes of signs."""
    starts, left = np.cumsum(sizes) - sizes, x.astype(np.float64)
    scales = np.empty((planes, len(sizes)), np.float32)
    bits = []
    for plane in range(planes):
        scales[plane] = np.add.reduceat(np.abs(left), starts) / sizes
        bits.append(np.packbits(left < 0))
        left -= _plane(bits[-1], scales[plane], sizes)
    return Signs(np.stack(bits), scales)


def add(vector: np.ndarray, signs: Signs, sizes: np.ndarray) -> np.ndarray:
    """Return float32 `vector` and the planes, added one after another."""
    vector = vector.astype(np.float32)
    for bits, scales in zip(*signs, strict=True):
        vector += _plane(bits, scales, sizes)
    return vector


def _plane(bits: np.ndarray, scales: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    size = np.repeat(scales, sizes)
    return np.where(np.unpackbits(bits, count=len(size)).view(np.bool_), -size, size)
