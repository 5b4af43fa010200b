"""Directions from seeds, the view of a moved model, the ledger; and which kernels compute directions (`FLEETUNE_KERNELS`).

Both kernels give the same bits, so devices of a fleet may differ.  Numba's are faster on a CPU, but take some 80 MB of memory.
"""

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
