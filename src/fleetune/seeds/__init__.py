# SPDX-License-Identifier: Apache-2.0
"""Directions from seeds, the view of a moved model, the ledger.

Here the kernels are chosen that compute directions on this device, by the environment variable `FLEETUNE_KERNELS`.
Both give the same bits, so this is no part of a recipe and devices of one fleet may differ.  Numba's are the
faster ones on a CPU, but Numba takes some 80 MB of memory whatever the model's size; torch's take next to
none.  Neither torch nor Numba is imported here, so that a plan can ask as well.
"""

from __future__ import annotations

import os
from typing import Final

from fleetune.errors import UsageError

CHOICES: Final = ("auto", "numba", "torch")
VARIABLE: Final = "FLEETUNE_KERNELS"


def chosen_kernels(backend: str = "auto") -> str:
    """Return `backend` or, for "auto", what the environment says: auto, numba or torch.  UsageError for another word."""
    chosen = backend if backend != "auto" else os.environ.get(VARIABLE) or "auto"
    if chosen not in CHOICES:
        raise UsageError(f"no kernels named {chosen!r}", hint=f"set {VARIABLE} to auto, numba or torch")
    return chosen
