"""What differs between systems: locks and memory, and whole commands without what Windows lacks (a stand-in, on Linux)."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import windows_stand_in

from fleetune import models
from fleetune.common import memory
from fleetune.common.files import lock

EVERYTHING = """
import importlib, pkgutil, sys
import fleetune
from fleetune.cli.main import main
for found in pkgutil.walk_packages(fleetune.__path__, "fleetune."):
    importlib.import_module(found.name)
    print(found.name)
for command in sys.argv[1:]:
    print("=====")
    try:
        code = main(command.split())
    except SystemExit as end:
        code = end.code
    assert code == 0, command
"""
QUICK = "--limit 30 --held-out 8 --max-length 512 --samples 0 --rounds 1"
COMMANDS = [
    "--help",
    "plan ./tiny --ram 4GB",
    f"tune ./tiny demo --method fedkseed --clients 2 --set tau=4 --set K=16 {QUICK} --json",
    "compress latest --method rtn --set group=8 --json",
    "export 2 --to hf --json",
    "runs rm 1 2",
]


def stand_in(script: str, at: Path, *args: str) -> str:
    """What a script says in the stand-in, in the folder `at`, to a console of Western Europe."""
    (at / "script.py").write_text(script)
    line = [sys.executable, windows_stand_in.__file__, "script.py", *args]
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(line, cwd=at, capture_output=True, encoding="cp1252", env=env)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_module_and_command_works_without_what_windows_lacks(tmp_path: Path) -> None:
    models.tiny_llama().save(tmp_path / "tiny")
    modules, *said = stand_in(EVERYTHING, tmp_path, *COMMANDS).split("=====\n")
    source = Path(memory.__file__).parents[1]
    files = [".".join(p.relative_to(source.parent).with_suffix("").parts) for p in source.rglob("*.py")]
    assert set(modules.split()) == {name.removesuffix(".__init__") for name in files} - {"fleetune"}
    assert "examples:" in said[0]
    assert "fedkseed" in said[1]
    tuned, compressed, exported = ([json.loads(x) for x in text.splitlines()] for text in said[2:5])
    for done in (tuned[-1], compressed[-1]):
        assert (done["event"], done["peak_rss"]) == ("done", windows_stand_in.PEAK)
    assert {e["rss"] for e in tuned if "rss" in e} == {windows_stand_in.NOW}
    assert exported[-1]["path"].endswith("hf")
    assert not [p for p in (tmp_path / "runs").iterdir() if p.is_dir()], "what was locked is gone"


TRY = """
import os, sys, time
from fleetune.common.files import lock
handle = os.open("file", os.O_RDWR | os.O_CREAT)
os.lseek(handle, 7, os.SEEK_SET)
print(lock(handle), flush=True)
open("asked", "w").close()
lock(handle, wait=True)
print("held", flush=True)
"""


@pytest.mark.parametrize("windows", [False, True])
def test_a_lock_is_had_by_one_and_waited_for(windows: bool, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TRY)
    line = [sys.executable, *([windows_stand_in.__file__] if windows else []), "script.py"]
    handle = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert lock(handle)
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "False\n"
        for _ in range(2000):
            if (tmp_path / "asked").exists():
                break
            time.sleep(0.01)
        assert other.poll() is None
        os.close(handle)
        assert other.stdout.readline() == "held\n"
        assert other.wait(20) == 0
    handle = os.open(tmp_path / "file", os.O_RDWR)
    assert lock(handle), "it ended with the process"
    os.close(handle)


def test_macos_tells_the_peak_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    told = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(memory, "_status", lambda name: 0)
    assert told * 1024 <= memory.peak_rss() < 2 * told * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert told <= memory.peak_rss() < 2 * told
