# SPDX-License-Identifier: Apache-2.0
"""Which lines `measure` has: no file twice; and what it says of a run whose base was compressed before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_harness import tiny

import fleetune
from fleetune import models
from fleetune.cli.main import main
from fleetune.deploy import harness, llamacpp
from fleetune.deploy import measure as lines
from fleetune.runs.listener import Silent

FEW: dict[str, Any] = {
    "clients": 2,
    "rounds": 1,
    "held_out": 8,
    "samples": 0,
    "threads": 1,
    "device": "cpu",
    "limit": 60,
    "max_length": 96,
    "settings": {"r": 2, "lr": 1e-2},
    "method": "fedit",
}
CODES, AGAIN = "runs/0001-rtn-little", "runs/0003-rtn-fedit-hf"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, codes of it, a run of their export, and that run compressed again."""
    at = tmp_path_factory.mktemp("lines")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        model = tiny()
        models.save(model.net, model.tokenizer, at / "little")
        fleetune.compress("little", method="rtn")
        fleetune.export(CODES, to="hf")
        fleetune.tune(f"{CODES}/hf", "demo", **FEW)
        fleetune.compress("runs/0002-fedit-hf", method="rtn")
    return at


@pytest.fixture
def at(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(made, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(harness, "measured", harness.carry_out)
    before = torch.get_num_threads()
    yield tmp_path / "work"
    torch.set_num_threads(before)


def listed(*names: str) -> list[tuple[str, str]]:
    found = [lines.of(fleetune.open(name), offline=True) for name in names]
    return [(line.name, line.engine) for _, line in lines.chosen(found, Silent())]


def test_a_file_in_a_folder_that_is_named_has_one_line_in_llama_cpp(
    at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "available", lambda: True)
    file = fleetune.export(CODES, to="gguf").path
    both = [(Path(CODES).name, "torch"), (file.name, "llama.cpp"), (file.name, "torch")]
    assert listed(CODES, str(file)) == both
    assert listed(CODES, str(file.absolute())) == both
    assert listed(str(file), CODES) == [both[2], both[1], both[0]]
    shutil.copy(file, "other.gguf")  # is another file
    assert len(listed(CODES, "other.gguf")) == 4
    assert listed(str(file), str(file)) == [both[2], both[1], both[2]]


class Noted(Silent):
    """A listener that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_only_files_that_export_writes_of_a_compression_are_measured_as_its_own(
    at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "available", lambda: True)
    file = fleetune.export(CODES, to="gguf").path
    wide = fleetune.export(CODES, to="gguf:q8_0").path
    plain = fleetune.export(CODES, to="gguf:f32", path=Path(CODES, "any name.gguf")).path
    shutil.copy(file, Path(CODES, "renamed.gguf"))
    found, listener = lines.of(fleetune.open(CODES), offline=True), Noted()

    def measured() -> list[str]:
        return [line.name for _, line in lines.chosen([found], listener) if line.kind == "gguf"]

    assert measured() == sorted([file.name, wide.name, plain.name, "renamed.gguf"])
    assert listener.notes == []
    for changed in (file, wide, plain):
        raw = bytearray(changed.read_bytes())
        raw[-40] ^= 1
        changed.write_bytes(raw)
    Path(CODES, "broken.gguf").write_bytes(b"GGUF")
    raw = Path(CODES, "renamed.gguf").read_bytes()
    Path(CODES, "lacks one.gguf").write_bytes(raw.replace(b"blk.1.attn_q.weight", b"blk.9.attn_q.weight"))
    shutil.copy(fleetune.export("runs/0003-rtn-fedit-hf", to="gguf").path, Path(CODES, "another.gguf"))
    found = lines.of(fleetune.open(CODES), offline=True)
    assert measured() == ["renamed.gguf"]
    said = {note.partition(" is left out: ")[0]: note for note in listener.notes}
    assert sorted(said) == sorted(
        [file.name, wide.name, plain.name, "broken.gguf", "lacks one.gguf", "another.gguf"]
    )
    assert f"fleetune measure '{plain}'" in said[plain.name]
    assert listed(str(file))[1] == (file.name, "llama.cpp"), "by its name it is measured"


def test_a_gain_over_a_compressed_base_is_said_to_be_that(
    at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ["--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1", "--offline"]
    assert main(["measure", AGAIN, "--kept-gain", *fast, "--json"]) == 0
    out, err = capsys.readouterr()
    (kept,) = json.loads(out.splitlines()[-1])["kept"].values()
    assert kept["text"].endswith(
        f"the gain is over the base of that run, {CODES}, which was compressed already"
    )
    assert f"base is {CODES}, compressed before it was tuned" in err
    assert main(["measure", "runs/0002-fedit-hf", *fast]) == 0
    assert f"base is {CODES}, compressed before it was tuned" in capsys.readouterr().err


def test_a_base_that_was_never_compressed_is_not_said_to_be(at: Path) -> None:
    fleetune.tune("little", "demo", **FEW)
    assert lines.compressed_before(fleetune.open("runs/0004-fedit-little")) is None
    assert lines.compressed_before(fleetune.open(CODES)) is None
    assert lines.compressed_before(fleetune.open("little")) is None
    assert lines.compressed_before(fleetune.open(AGAIN)) == Path(CODES)


def test_compress_says_what_latest_means_from_now_on(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "runs/0002-fedit-hf", "--method", "rtn"]) == 0
    said = capsys.readouterr().out
    assert "the link runs/latest still leads to the run 0002-fedit-hf" in said
    assert fleetune.open("latest").name == "0004-rtn-fedit-hf"
    assert Path("runs/latest").resolve().name == "0002-fedit-hf"
    Path("runs/latest").unlink()
    assert main(["compress", "runs/0002-fedit-hf", "--method", "rtn"]) == 0
    assert "latest" not in capsys.readouterr().out
