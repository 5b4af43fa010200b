# SPDX-License-Identifier: Apache-2.0
"""Read the energy that a machine's processors have used, where Linux counts it (powercap, Intel's and AMD's RAPL).

The counters are of whole processor packages: whatever else runs at the same time is in them.  Many systems let only root
read them; then there is no figure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

FOLDER: Final = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts joules from its creation on."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._packages = [p for p in _packages(folder) if _read(p / "energy_uj") is not None]
        self._begin = [_read(p / "energy_uj") or 0 for p in self._packages]

    def joules(self) -> float | None:
        """Return the joules so far of all packages; None where no counter can be read.

        A counter that went round once is followed; one that did so more often (hours) gives too little.
        """
        total, known = 0.0, False
        for package, begin in zip(self._packages, self._begin, strict=True):
            now = _read(package / "energy_uj")
            if now is None:
                return None
            around = (_read(package / "max_energy_range_uj") or 0) if now < begin else 0
            total, known = total + (now - begin + around) / 1e6, True
        return total if known else None


def _packages(folder: Path) -> list[Path]:
    """Return the counters of whole packages: `intel-rapl:0`, not its parts `intel-rapl:0:1`; AMD's have that name too."""
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return []
    return [p for p in found if p.name.startswith("intel-rapl:") and p.name.count(":") == 1]


def _read(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
