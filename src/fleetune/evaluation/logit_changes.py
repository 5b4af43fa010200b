# SPDX-License-Identifier: Apache-2.0
"""The functions by which some families change the logits after their output head, number by number.

| family | logits | slope, by the head's output z |
|---|---|---|
| Gemma 2 (`final_logit_softcapping` c) | c tanh(z / c) | 1 - (logit / c)^2 |
| Granite (`logits_scaling` s) | z / s | 1 / s |
| Cohere (`logit_scale` s) | z s | s |

With them a loss goes by blocks of the vocabulary (`head_loss.py`).  The operations are those of transformers, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Change(Protocol):
    """A function of each logit by itself."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Return what the model gives for what its head gave."""
        ...

    def slope(self, changed: Tensor) -> Tensor | float:
        """Return the derivative at the logits that it gave."""
        ...


@dataclass(frozen=True)
class Cap:
    """c tanh(z / c)."""

    c: float

    def __call__(self, logits: Tensor) -> Tensor:
        """Cap the logits."""
        return (logits / self.c).tanh() * self.c

    def slope(self, changed: Tensor) -> Tensor:
        """Return 1 - tanh^2."""
        return 1.0 - (changed / self.c).square()


@dataclass(frozen=True)
class Divide:
    """z / s."""

    s: float

    def __call__(self, logits: Tensor) -> Tensor:
        """Divide the logits."""
        return logits / self.s

    def slope(self, changed: Tensor) -> float:
        """Return 1 / s."""
        return 1.0 / self.s


@dataclass(frozen=True)
class Multiply:
    """z s."""

    s: float

    def __call__(self, logits: Tensor) -> Tensor:
        """Multiply the logits."""
        return logits * self.s

    def slope(self, changed: Tensor) -> float:
        """Return s."""
        return self.s


def stated(config: Any) -> Change | None:
    """Return the change that a configuration states; None where it states none that is known here."""
    for name, kind in (
        ("final_logit_softcapping", Cap),
        ("logits_scaling", Divide),
        ("logit_scale", Multiply),
    ):
        if value := getattr(config, name, None):
            return kind(float(value))
    return None
