"""What other packages register: found, suggested, and left out with the reason where it cannot be used."""

import importlib
import logging
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fleetune import compression, models
from fleetune.cli import main as cli
from fleetune.common import registry
from fleetune.deploy import targets
from fleetune.errors import UsageError
from fleetune.tuning import methods

REGISTRIES = {
    "method": methods.REGISTRY,
    "compressor": compression.REGISTRY,
    "target": targets.FORMATS,
    "command": cli.COMMANDS,
}
STATED = 'KIND = "ledger"\nPAPER = "A, 2026"\nSENDS = "x"\nTARGETS = {"odd": "x"}\nHELP = "odd"\n'
BROKEN = {
    "not there": None,
    "not Python": "def (",
    "no constants": '"""Nothing."""\n',
    "ends the process": f'"""It ends."""\n{STATED}import sys\nsys.exit(0)\n',
    "does not import": f'"""It fails."""\n{STATED}import a_package_that_is_not_there\n',
}
COMMANDS = ["--help", "methods", "compress --list", "export --help", "plan tiny --ram 4GB"]


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Register a module with this text as `name` in every registry."""

    def do(name: str, code: str | None) -> str:
        module = f"registered_{name}_{abs(hash(code))}"
        if code is not None:
            (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint(name, module, group)])
        return module

    return do


@pytest.mark.parametrize("why", ["ends the process", "does not import"])
def test_a_broken_module_stops_nothing_but_itself(why, register, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models.tiny_llama().save(tmp_path / "tiny")
    register("odd", BROKEN[why])
    for command in COMMANDS:
        try:
            code = cli.main(command.split())
        except SystemExit as end:
            code = end.code
        assert code == 0, command
        assert "Traceback" not in capsys.readouterr().err
    assert cli.main(["tune", "tiny", "demo", "--method", "odd"]) == 2
    assert "odd" in capsys.readouterr().err
    assert cli.main(["compress", "tiny", "--method", "odd"]) == 2
    assert cli.main(["eval", "tiny", "--nonsense"]) == 2


@pytest.mark.parametrize("kind", REGISTRIES)
@pytest.mark.parametrize("why", BROKEN)
def test_the_reason_is_said_where_it_is_asked_for(kind: str, why: str, register) -> None:
    module = register("odd", BROKEN[why])
    with pytest.raises(UsageError, match=module) as said:
        REGISTRIES[kind].load("odd")
    assert said.value.hint


@pytest.mark.parametrize(
    ("kind", "name"), [("method", "mezo"), ("compressor", "optq"), ("target", "mlx"), ("command", "tune")]
)
def test_built_ins_keep_their_names(kind: str, name: str, register, caplog: pytest.LogCaptureFixture) -> None:
    register(name, STATED)
    with caplog.at_level(logging.WARNING):
        member = REGISTRIES[kind].member(name)
    assert member.module.startswith("fleetune.")
    assert "is left out" in caplog.text


@pytest.mark.parametrize("kind", REGISTRIES)
def test_an_unknown_name_gets_a_suggestion(kind: str) -> None:
    known = next(iter(REGISTRIES[kind].members()))
    with pytest.raises(UsageError, match=f"Did you mean '{known}'"):
        REGISTRIES[kind].member(known + "x")


def test_the_installed_packages_are_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def look(group: str) -> list[EntryPoint]:
        looked.append(group)
        return []

    monkeypatch.setattr(registry, "entry_points", look)
    for _ in range(3):
        for found in REGISTRIES.values():
            found.members()
    assert sorted(looked) == sorted(found.group for found in REGISTRIES.values())
