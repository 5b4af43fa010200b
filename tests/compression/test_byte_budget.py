"""`fleetune compress --bytes` and `--bits`: the file has the size that was said, and what cannot be is refused up front."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from deploy_harness import tokenizer
from pruner_harness import SIZES, tiny

from command_line import Capture, Patch, ok, pressed_when, refused
from command_line import call_json as call
from fleetune import compression
from fleetune.common.display import human_bytes
from fleetune.compression.jobs import budget
from fleetune.compression.layerwise.driver import End
from fleetune.deploy import export
from fleetune.errors import UsageError
from fleetune.models.artefact import Master

SMALL = ("--text", "text.txt", "--windows", "4", "--length", "16")
Events = list[dict[str, Any]]


@pytest.fixture
def model(at: Path) -> str:
    """A tiny llama of which 12 matrices have rows of 96, and 2 of 256, with a tokenizer that GGUF holds."""
    dataclasses.replace(tiny("llama", **SIZES), tokenizer=tokenizer()).save(at / "tiny")
    return "tiny"


def told(events: Events) -> dict[str, Any]:
    (found,) = [event for event in events if event["event"] == "budget"]
    return found


def exported(capsys: Capture, folder: Path) -> Path:
    """The newest compressed model as a file with the name that `export` gives it."""
    return folder / ok(capsys, "export", "latest", "--to", "gguf")[0]["path"]


def test_the_file_has_the_size_that_was_said(model: str, at: Path, capsys: Capture) -> None:
    events = ok(capsys, "compress", model, *SMALL, "--bytes", "140kB", "--method", "optq")
    found, limit = told(events), 140_000
    names = [event["event"] for event in events]
    assert names.index("start") < names.index("choosing") < names.index("budget") < names.index("block")
    steps = [(e["phase"], e["done"], e["total"]) for e in events if e["event"] == "choosing"]
    assert steps == [*(("sensitivity", k, 4) for k in range(4)), *(("grids", k, 2) for k in range(3))]
    file = exported(capsys, at)
    assert file.stat().st_size == found["bytes"] <= limit
    kinds = [t.tensor_type.name for t in gguf.GGUFReader(file).tensors if len(t.shape) == 2]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == found["kinds"]
    assert sum(found["kinds"].values()) == 15, "the tied embedding is one of them"
    (said,) = [e["words"] for e in ok(capsys, "verify", "latest") if e.get("what") == "codes"]
    assert sorted(re.findall(r"(\d+) of ", said)) == sorted(map(str, found["kinds"].values()))
    assert "bits 4" not in said


def test_untied_ends_are_solved_each_for_itself(at: Path, capsys: Capture) -> None:
    dataclasses.replace(tiny(tie_word_embeddings=False, **SIZES), tokenizer=tokenizer()).save(at / "tiny")
    events = ok(capsys, "compress", "tiny", *SMALL, "--bytes", "170kB")
    assert exported(capsys, at).stat().st_size == told(events)["bytes"]
    grids = Master(Path(events[-1]["folder"]) / "model").head.grids
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(grids)


def test_a_budget_that_cannot_be_met_names_the_least_that_can(model: str, at: Path, capsys: Capture) -> None:
    err = refused(capsys, "compress", model, *SMALL, "--bytes", "100kB")
    assert "no file of 100 kB can hold this model" in err
    assert not list(at.glob("runs/*")), "refused before a folder is made"
    least = err.split("--bytes ")[1].split()[0]
    assert call(capsys, "compress", model, *SMALL, "--bytes", least, "--dry-run")[0] == 0
    events = ok(capsys, "compress", model, *SMALL, "--bits", "5")
    head = Master(Path(events[-1]["folder"]) / "model").head
    assert head.settings["bits"] == 5
    assert "grid" not in head.settings


def test_without_a_size_and_a_grid_the_file_is_as_large_as_q4_0(
    model: str, at: Path, capsys: Capture
) -> None:
    flags = ("--length", "16", "--windows", "6")
    code, (checked,), err = call(capsys, "compress", model, *flags, "--dry-run")
    assert code == 0, err
    assert checked["text"] == "text that comes with Fleetune · 6 windows of 16 tokens"
    events = ok(capsys, "compress", model, *flags)
    planned = human_bytes(next(event["planned"] for event in events if event["event"] == "start"))
    assert checked["memory"] == f"about {planned}"
    mixed = exported(capsys, at)
    ok(capsys, "compress", model, *flags, "--set", "grid=ggml")
    plain = exported(capsys, at)
    assert {t.tensor_type.name for t in gguf.GGUFReader(plain).tensors if len(t.shape) == 2} == {
        "Q4_0",
        "Q8_0",
    }
    tensors = [sum(int(t.n_bytes) for t in gguf.GGUFReader(file).tensors) for file in (mixed, plain)]
    assert 0.97 * tensors[1] < tensors[0] <= tensors[1]
    assert events[-1]["after"]["kl_divergence"] > 0, "it is measured on other text"


def test_fast_is_one_grid_and_nothing_that_says_a_size(model: str, at: Path, capsys: Capture) -> None:
    events = ok(capsys, "compress", model, *SMALL, "--fast")
    assert "choosing" not in [event["event"] for event in events]
    assert set(Master(Path(events[-1]["folder"]) / "model").head.codebooks.values()) == {"iq4_nl"}
    assert "leave out --fast" in refused(capsys, "compress", model, *SMALL, "--fast", "--bits", "4")


def test_where_no_gguf_file_can_be_made_one_grid_has_the_bits(
    model: str, at: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    def refuse(*_: object) -> int:
        raise UsageError("no place")

    monkeypatch.setattr(export, "size_beside", refuse)
    events = ok(capsys, "compress", model, *SMALL, "--bits", "8")
    grids = Master(Path(events[-1]["folder"]) / "model").head.grids
    assert {bits for bits, _ in grids.values()} == {8}


def test_a_resumed_one_has_its_grids(model: str, at: Path, capsys: Capture, monkeypatch: Patch) -> None:
    flags = (*SMALL, "--bytes", "150kB")
    code, events, _ = call(capsys, "compress", model, *flags)
    whole = events[-1]["digest"]
    parts = at / "runs" / "0002-qronos-tiny" / "parts"
    pressed = pressed_when(lambda: any(parts.glob("block-*")))
    monkeypatch.setattr("fleetune.cli.console.InterruptHandler", pressed)
    code, events, err = call(capsys, "compress", model, *flags)
    assert code == 130, err
    assert list(parts.glob("block-*"))
    monkeypatch.undo()
    monkeypatch.chdir(at)
    chosen = told(events)
    events = ok(capsys, "compress", "--resume", "2")
    assert told(events)["kinds"] == chosen["kinds"]
    assert events[-1]["digest"] == whole


def test_a_choice_comes_back_as_it_was_kept_and_a_damaged_one_not_at_all(tmp_path: Path) -> None:
    table, chosen = torch.rand(4, 4), {"a": ("iq4_nl", 4), "b": ("ggml", 8)}
    kept = budget.Budget(chosen, {"IQ4_NL": 1}, 99, 0.5, [End("b", 0.25, table), End("c", 1.0, None)])
    budget.save_choice(kept, tmp_path, "o")
    assert budget.saved_choice(tmp_path, "another") is None
    found = budget.saved_choice(tmp_path, "o")
    assert dataclasses.replace(found, ends=[]) == dataclasses.replace(kept, ends=[])
    torch.testing.assert_close(found.ends[0].table, table)
    assert [end[:2] for end in found.ends] == [("b", 0.25), ("c", 1.0)]
    plan = found.plan(compression.make("optq", {}))  # type: ignore[arg-type]
    assert (plan.solvers["a"].grid, plan.solvers["b"].bits) == ("iq4_nl", 8)  # type: ignore[attr-defined]
    file = tmp_path / budget.FILE
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert budget.saved_choice(tmp_path, "o") is None
    file.unlink()
    assert budget.saved_choice(tmp_path, "o") is None
