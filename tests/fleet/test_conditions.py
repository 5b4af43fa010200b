"""When a device declines: on its battery, or while other programs keep it busy."""

from pathlib import Path

import pytest

from fleetune.errors import UsageError
from fleetune.fleet.device import Conditions


def supply(folder: Path, name: str, **words: str) -> None:
    (folder / name).mkdir(parents=True)
    for file, word in words.items():
        (folder / name / file).write_text(f"{word}\n")


EMPTIES = {"type": "Battery", "status": "Discharging"}


@pytest.mark.parametrize(
    ("supplies", "declines"),
    [
        ({}, False),  # a machine without a battery
        ({"BAT0": EMPTIES}, True),
        ({"BAT0": {"type": "Battery", "status": "Charging"}, "AC": {"type": "Mains", "online": "1"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Not charging"}}, False),
        ({"mouse": EMPTIES | {"scope": "Device"}}, False),
        ({"BAT0": {"type": "Battery", "status": "Full"}, "BAT1": EMPTIES}, True),
        ({"odd": {}}, False),
    ],
)
def test_on_battery(tmp_path, supplies, declines):
    for name, words in supplies.items():
        supply(tmp_path, name, **words)
    own = Conditions(only_on_power=True, supplies=tmp_path)
    own.check()
    assert own.reason() == ("battery" if declines else "")
    assert Conditions(supplies=tmp_path).reason() == ""


@pytest.mark.parametrize("most", [0.0, 0.5, 0.74, 0.75, 0.9])
def test_busy(tmp_path, most):
    stat = tmp_path / "stat"
    # 75 of 100 ticks busy
    before, after = ("cpu  100 0 50 1000 10 5 5 0 7 0", "cpu  150 10 60 1015 20 5 10 0 99 0")
    stat.write_text(f"{before}\ncpu0 1 2 3\n")
    waits: list[float] = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        stat.write_text(f"{after}\n")

    own = Conditions(max_load=most, load=stat, pause=pause)
    own.check()
    assert own.reason() == ("busy 75" if 0 < most < 0.75 else "")
    assert waits == ([0.5] if most else [])


def test_what_cannot_be_told_is_refused(tmp_path):
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match="no share"):
            Conditions(max_load=share).check()
    with pytest.raises(UsageError, match=r"on.power.*: this machine has no"):
        Conditions(only_on_power=True, supplies=tmp_path / "none").check()
    with pytest.raises(UsageError, match=r"max.load.*: this machine has no"):
        Conditions(max_load=0.5, load=tmp_path / "none").check()
