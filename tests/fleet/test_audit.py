"""The log of a fleet: any change of a byte, a line or the order is found, and a kill costs at most the last line."""

import random
from pathlib import Path

import pytest

from command_line import refused
from fleetune.cli.main import main
from fleetune.errors import StorageError
from fleetune.fleet.audit import FILE, START, Audit, verify


@pytest.fixture
def log(tmp_path: Path) -> Path:
    audit = Audit(tmp_path)
    for i in range(12):
        audit.write("ok" if i % 3 else "refused", client=i, reason=f"é {i}")
    return tmp_path / FILE


def test_what_is_written_verifies_and_goes_on(log):
    assert log.stat().st_mode & 0o777 == 0o600
    first = verify(log)
    assert (first.entries, first.bad) == (12, 0)
    again = Audit(log.parent)
    assert again.chain == first.chain != START
    again.write("ok", client=1)
    assert verify(log).entries == 13


def test_every_changed_byte_is_found(log):
    data, rng = log.read_bytes(), random.Random(5)
    ends = [i for i, b in enumerate(data) if b == 10]
    for _ in range(250):
        at = rng.randrange(len(data))
        log.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        assert verify(log).bad == 1 + sum(end < at for end in ends)


def test_lines_removed_swapped_or_added_are_found(log):
    lines = log.read_bytes().splitlines(keepends=True)
    for changed, bad in (
        (lines[1:], 1),
        (lines[:5] + lines[6:], 6),
        ([*lines[:3], lines[4], lines[3], *lines[5:]], 4),
        ([*lines[:3], lines[2], *lines[3:]], 4),
        ([*lines, b"{}\n"], 13),
        ([*lines, b"[1]\n"], 13),
        ([*lines, b"x" * (1 << 17)], 13),
    ):
        log.write_bytes(b"".join(changed))
        assert verify(log).bad == bad
        if bad <= 12:
            with pytest.raises(StorageError, match=f"line {bad} "):
                Audit(log.parent)


def test_a_line_that_a_kill_cut_is_dropped(log):
    data = log.read_bytes()
    log.write_bytes(data[:-20])
    Audit(log.parent).write("ok", client=9)
    assert (verify(log).entries, verify(log).bad) == (12, 0)


def test_the_command(log, capsys):
    run = log.parent
    (run / "run.toml").write_text("")
    assert main(["fleet", "audit", str(run)]) == 0
    assert verify(log).chain in capsys.readouterr().out
    log.write_bytes(log.read_bytes().replace(b"refused", b"ok", 1))
    assert "line 1 does not follow" in refused(capsys, "fleet", "audit", str(run), code=1)
