# SPDX-License-Identifier: Apache-2.0
"""Say why a device would rather not work now: it runs on its battery, or other programs keep it busy.

It is asked before the work of a round begins, and the round goes on without the device.  Both are read from the files of
the Linux kernel: /sys/class/power_supply and /proc/stat.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleetune.errors import UsageError

SUPPLIES: Final = Path("/sys/class/power_supply")
LOAD: Final = Path("/proc/stat")
LOOK: Final = 0.5  # seconds between two readings of how busy the processors are


@dataclass(frozen=True)
class Conditions:
    """When a device declines."""

    only_on_power: bool = False  # while it runs on its battery
    max_load: float = 0.0  # while other programs keep more than this share of the processors busy; 0: never
    supplies: Path = SUPPLIES
    load: Path = LOAD
    pause: Callable[[float], None] = time.sleep

    def check(self) -> None:
        """Raise UsageError where it cannot be told on this machine, or for a share that is none."""
        if not 0 <= self.max_load < 1:
            raise UsageError(
                f"--max-load {self.max_load:g} is no share of the processors",
                hint="0.5 declines while other programs keep more than half of them busy",
            )
        if self.only_on_power and not self.supplies.is_dir():
            raise UsageError(f"--only-on-power: this machine has no {self.supplies} to tell by")
        if self.max_load and not self.load.is_file():
            raise UsageError(f"--max-load: this machine has no {self.load} to tell by")

    def reason(self) -> str:
        """Return why the device declines now, by its code (`reasons.py`); "" where it does not."""
        if self.only_on_power and self.on_battery():
            return "battery"
        if self.max_load and (busy := self.busy()) > self.max_load:
            return f"busy {100 * busy:.0f}"
        return ""

    def on_battery(self) -> bool:
        """Tell whether a battery of this machine (not of a mouse) is being drained."""
        for supply in self.supplies.iterdir():
            own = _word(supply / "scope") != "Device"
            if own and (_word(supply / "type"), _word(supply / "status")) == ("Battery", "Discharging"):
                return True
        return False

    def busy(self) -> float:
        """Return the share of the processors that is busy, over half a second in which this process does nothing."""
        before = self._ticks()
        self.pause(LOOK)
        busy, total = (now - then for now, then in zip(self._ticks(), before, strict=True))
        return busy / max(1, total)

    def _ticks(self) -> tuple[int, int]:
        """Return the processors' clock ticks so far: busy ones, and all."""
        first = self.load.read_text(encoding="ascii").splitlines()[0].split()
        ticks = [int(word) for word in first[1:9]]  # user nice system idle iowait irq softirq steal
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _word(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # the file is not there, or the supply was just unplugged
        return ""
