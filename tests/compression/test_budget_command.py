# SPDX-License-Identifier: Apache-2.0
"""`fleetune compress --bytes` and `--bpw`: the file has the size that was said, and what cannot be is refused up front."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from command_harness import call, pulled_after
from deploy_harness import tiny as wide
from deploy_harness import tokenizer
from pruner_harness import tiny

from fleetune import compression, models
from fleetune.cli.main import main
from fleetune.common.display import human_bytes
from fleetune.compression.budget import costs
from fleetune.compression.jobs import budget
from fleetune.compression.layerwise import driver
from fleetune.models.artefact import Master

SMALL = ("--text", "text.txt", "--windows", "4", "--length", "16")
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


Events = list[dict[str, Any]]


@pytest.fixture
def model(at: Path) -> str:
    """A tiny llama of which 24 matrices have rows of 96, and 4 of 256, with a tokenizer that GGUF holds."""
    made = dataclasses.replace(tiny("llama", **SIZES), tokenizer=tokenizer())
    models.save(made.net, made.tokenizer, at / "tiny")
    return "tiny"


def told(events: Events) -> dict[str, Any]:
    (found,) = [event for event in events if event["event"] == "budget"]
    return found


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command that is refused says."""
    code = main(list(args))
    err = capsys.readouterr().err
    assert code == 2, err
    return err


def exported(capsys: pytest.CaptureFixture[str], folder: Path) -> Path:
    """The newest compressed model as a file with the name that `export` gives it."""
    code, events, err = call(capsys, "export", "latest", "--to", "gguf")
    assert code == 0, err
    return folder / events[0]["path"]


@pytest.mark.parametrize(
    ("size", "method"), [("240kB", "optq"), ("260 kB", "optq"), ("300000", "optq"), ("280kB", "qronos")]
)
def test_the_file_has_the_size_that_was_said(
    model: str, at: Path, capsys: pytest.CaptureFixture[str], size: str, method: str
) -> None:
    code, events, err = call(capsys, "compress", model, *SMALL, "--bytes", size, "--method", method)
    assert code == 0, err
    found, limit = told(events), int(float(size.rstrip(" kB")) * (1000 if "k" in size else 1))
    file = exported(capsys, at)
    assert file.stat().st_size == found["bytes"] <= limit
    kinds = [t.tensor_type.name for t in gguf.GGUFReader(file).tensors if len(t.shape) == 2]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == found["kinds"]
    assert sum(found["kinds"].values()) == 29, "the tied embedding is one of them"


def test_bits_a_weight_are_those_of_the_matrices(
    model: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, events, err = call(capsys, "compress", model, *SMALL, "--bpw", "5.25")
    assert code == 0, err
    matrices = [t for t in gguf.GGUFReader(exported(capsys, at)).tensors if len(t.shape) == 2]
    bits = 8 * sum(t.n_bytes for t in matrices) / sum(t.n_elements for t in matrices)
    assert 5.0 < bits <= 5.25
    head = Master(Path(events[-1]["folder"]) / "model").head
    assert head.settings["bpw"] == 5.25
    assert not {"bits", "grid"} & set(head.settings)


def test_more_bytes_change_the_model_less(model: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = []
    for size in ("230kB", "270kB", "360kB"):
        code, events, err = call(
            capsys, "compress", model, *SMALL, "--bytes", size, "--eval-text", "text.txt"
        )
        assert code == 0, err
        changed.append((told(events)["kl_divergence"], events[-1]["after"]["kl_divergence"]))
    assert changed == sorted(changed, reverse=True)
    assert changed[0][1] > 4 * changed[2][1]


def test_untied_ends_are_solved_each_for_itself(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = dataclasses.replace(tiny("llama", tie_word_embeddings=False, **SIZES), tokenizer=tokenizer())
    models.save(made.net, made.tokenizer, at / "tiny")
    code, events, err = call(capsys, "compress", "tiny", *SMALL, "--bytes", "290kB")
    assert code == 0, err
    assert exported(capsys, at).stat().st_size == told(events)["bytes"]
    grids = Master(Path(events[-1]["folder"]) / "model").head.grids
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(grids)


def test_a_budget_that_cannot_be_met_names_the_least_that_can(
    model: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, "compress", model, *SMALL, "--bytes", "100kB")
    assert "no file of 100 kB can hold this model" in err
    assert not list(at.glob("runs/*")), "refused before a folder is made"
    shutil.copytree(model, "my tiny")
    hint = (
        refused(capsys, "compress", "my tiny", *SMALL, "--bytes", "100kB").split("try: ")[1].splitlines()[0]
    )
    words = shlex.split(hint[hint.index("fleetune compress") :])
    assert [words[1], Path(words[2]).name, *words[3:]] == ["compress", "my tiny", "--method", "llm-pruner"]
    assert Path(words[2]).is_dir()
    least = err.split("--bytes ")[1].split()[0]
    assert call(capsys, "compress", model, *SMALL, "--bytes", least)[0] == 0
    err = refused(capsys, "compress", model, *SMALL, "--bpw", "3")
    assert "3 bits a weight are too few" in err
    bits = float(err.split("--bpw ")[1].split()[0])
    code, _, err = call(capsys, "compress", model, *SMALL, "--bpw", str(bits))
    assert code == 0, err
    refused(capsys, "compress", model, *SMALL, "--bpw", str(bits - 0.01))


@pytest.fixture
def asked_to_write(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows of text a model was asked to write, each time."""
    counts: list[int] = []

    def written(model: Any, length: int, count: int, seed: int, *, batch: int = 8) -> torch.Tensor:
        counts.append(count)
        return torch.arange(count * length).view(count, length) % 64

    monkeypatch.setattr(driver, "sampled_windows", written)
    return counts


def run_of(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Tune a model for a round: its held-out rows fill no window of 512."""
    Path("rows.jsonl").write_text("".join(f'{{"prompt": "say {n}", "response": "so"}}\n' for n in range(8)))
    flags = ("--method", "fedkseed", "--set", "K=4", "--set", "tau=1", "--set", "lr=1e-4", "--clients", "2")
    code, _, err = call(capsys, "tune", model, "rows.jsonl", *flags, "--rounds", "1", "--held-out", "4")
    assert code == 0, err


@pytest.mark.parametrize("limit", [("--bytes", "1kB"), ("--bpw", "0.5")])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_budget_that_cannot_be_met_is_refused_before_any_text_is_written(
    model: str,
    capsys: pytest.CaptureFixture[str],
    limit: tuple[str, ...],
    dry: tuple[str, ...],
    asked_to_write: list[int],
) -> None:
    err = refused(capsys, "compress", model, "--length", "16", *limit, *dry)
    assert "can hold this model" in err or "bits a weight are too few" in err
    assert "the model w" not in err, "no word of text either"
    assert asked_to_write == []


def test_a_run_s_budget_is_refused_before_any_text_is_written(
    model: str, capsys: pytest.CaptureFixture[str], asked_to_write: list[int]
) -> None:
    run_of(model, capsys)
    assert "no file of 1.0 kB" in refused(capsys, "compress", "latest", "--length", "16", "--bytes", "1kB")
    assert asked_to_write == []


def test_a_dry_run_writes_no_text_and_says_the_same_of_it(
    model: str, at: Path, capsys: pytest.CaptureFixture[str], asked_to_write: list[int]
) -> None:
    flags = ("--length", "16", "--windows", "6", "--bytes", "90GB")
    code, (checked,), err = call(capsys, "compress", model, *flags, "--dry-run")
    assert code == 0, err
    assert asked_to_write == []
    assert "no calibration text is given: the model would write 6 windows itself" in err
    assert checked["text"] == "text of its own · 6 windows of 16 tokens · true sequential"
    code, events, err = call(capsys, "compress", model, *flags)
    assert code == 0, err
    assert asked_to_write == [6]
    planned = human_bytes(next(event["planned"] for event in events if event["event"] == "start"))
    assert checked["memory"] == f"about {planned}"
    asked_to_write.clear()
    made = dataclasses.replace(tiny("llama"), tokenizer=tokenizer())
    models.save(made.net, made.tokenizer, at / "other")
    code, (pruning,), err = call(
        capsys,
        "compress",
        "other",
        "--method",
        "llm-pruner",
        "--set",
        "first=1",
        "--set",
        "last=1",
        "--length",
        "16",
        "--windows",
        "6",
        "--dry-run",
    )
    assert code == 0, err
    assert pruning["text"] == "text of its own · 6 windows of 16 tokens at most"
    run_of(model, capsys)
    code, (of_run,), err = call(capsys, "compress", "latest", "--length", "512", "--dry-run")
    assert code == 0, err
    assert "the model would write 12 windows of text: 4 of them are measured on" in err
    assert of_run["text"].startswith("8 windows that the run's model would write · 8 windows of 512 tokens")
    assert asked_to_write == []
    code, events, err = call(capsys, "compress", "latest", "--length", "512")
    assert code == 0, err
    assert asked_to_write == [12]
    planned = human_bytes(next(event["planned"] for event in events if event["event"] == "start"))
    assert of_run["memory"] == f"about {planned}"


def test_the_choice_of_grids_is_followed_in_json(
    model: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, events, err = call(capsys, "compress", model, *SMALL, "--bytes", "240kB")
    assert code == 0, err
    names = [event["event"] for event in events]
    assert names.index("start") < names.index("choosing") < names.index("budget") < names.index("block")
    steps = [(e["phase"], e["done"], e["total"]) for e in events if e["event"] == "choosing"]
    assert steps == [*(("sensitivity", k, 4) for k in range(4)), *(("grids", k, 4) for k in range(5))]


def test_a_dry_run_says_what_a_budget_buys(model: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, (checked,), err = call(capsys, "compress", model, *SMALL, "--bytes", "240kB", "--dry-run")
    assert code == 0, err
    assert checked["budget"] in err
    assert "sensitivities that the run measures first" in checked["budget"]
    found = re.match(
        r"240 kB as gguf, where (\S+) kB to (\S+) kB can be had · each matrix (.*), by", checked["budget"]
    )
    assert found is not None
    assert found[3].split(", ")[:2] == ["Q2_K", "Q3_K"]
    assert found[3].split(", ")[-1] == "Q8_0"
    for size, kind in (
        ("9MB", 2),
        (f"{float(found[1]) + 1:.0f}kB", 1),
    ):  # the file of the largest types, of the smallest
        code, events, err = call(capsys, "compress", model, *SMALL, "--bytes", size)
        assert code == 0, err
        assert abs(told(events)["bytes"] / 1000 - float(found[kind])) < 1


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        (("--bytes", "1MB", "--bpw", "5"), "both say how large", "give one of them"),
        (("--bytes", "1MB", "--set", "bits=5"), "chooses bits for each matrix", "leave out --set bits"),
        (("--bytes", "1MB", "--set", "order=gar"), "order=gar would move", "order=static"),
        (("--bpw", "0"), "holds nothing", "--bpw 4.5"),
        (("--bytes", "1MB", "--method", "rtn"), "rtn does not", "--method qronos"),
        (("--bytes", "1MB", "--method", "sparsegpt"), "sparsegpt does not", "--method qronos"),
        (("--bytes", "1MB", "--method", "llm-pruner"), "leaves floats", "--method"),
        (("--bytes", "many"), "is not a size", "write"),
        (("--bpw", "-1"), "bpw = -1.0", "--help"),
        (("--bpw", "nan"), "bpw = nan is not a number of bits a weight, below 33", "--help"),
    ],
)
def test_what_has_no_place_beside_a_budget_is_refused(
    model: str, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str, hint: str
) -> None:
    err = refused(capsys, "compress", model, *SMALL, *flags)
    assert message in err
    assert hint in err


def test_a_pruned_model_is_told_the_least_that_it_can_have(
    at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grids without a 0 are not for it, so the least is more; some pruned rows of the embedding are enough."""
    made = dataclasses.replace(tiny("llama", **SIZES), tokenizer=tokenizer())
    with torch.no_grad():
        for name, p in made.net.named_parameters():
            if "down_proj" in name or "embed" in name:
                p[-20:] = 0.0
    models.save(made.net, made.tokenizer, at / "tiny")
    bits = refused(capsys, "compress", "tiny", *SMALL, "--bpw", "2.7").split("--bpw ")[1].split()[0]
    code, events, err = call(capsys, "compress", "tiny", *SMALL, "--bpw", bits)
    assert code == 0, err
    assert not {"Q2_K", "Q4_K", "IQ4_XS"} & set(told(events)["kinds"])


def test_a_lost_choice_is_made_again_and_the_blocks_with_it(
    model: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*SMALL, "--bytes", "260kB")
    whole = call(capsys, "compress", model, *flags)[1][-1]["digest"]
    with monkeypatch.context() as patch:
        patch.setattr("fleetune.cli.listener.InterruptHandler", pulled_after(60))
        assert call(capsys, "compress", model, *flags)[0] == 130
    parts = at / "runs" / "0002-qronos-tiny" / "parts"
    assert list(parts.glob("block-*"))
    (parts / budget.FILE).write_bytes(b"damaged")
    code, events, err = call(capsys, "compress", "--resume", "2")
    assert code == 0, err
    assert "it is made again, and the blocks are solved again" in err
    assert events[-1]["digest"] == whole


def test_rows_that_no_type_fits_are_refused(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = dataclasses.replace(tiny("llama"), tokenizer=tokenizer())
    models.save(made.net, made.tokenizer, at / "tiny")
    err = refused(capsys, "compress", "tiny", *SMALL, "--bytes", "1MB")
    assert "leave out --bytes; then --set group=4" in err


def test_a_model_without_a_place_in_gguf_is_refused(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny("llama", **SIZES)
    models.save(made.net, made.tokenizer, at / "tiny")
    err = refused(capsys, "compress", "tiny", *SMALL, "--bytes", "1MB", "--dry-run")
    assert "the tokenizer of tiny has no merges" in err
    assert "leave out --bytes and --bpw" in err


def test_a_stopped_one_resumes_with_the_grids_that_were_chosen(
    model: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*SMALL, "--bytes", "260kB")
    code, events, _ = call(capsys, "compress", model, *flags)
    whole = events[-1]["digest"]
    monkeypatch.setattr("fleetune.cli.listener.InterruptHandler", pulled_after(60))
    code, events, err = call(capsys, "compress", model, *flags)
    assert code == 130, err
    parts = at / "runs" / "0002-qronos-tiny" / "parts"
    assert list(parts.glob("block-*"))
    monkeypatch.undo()
    monkeypatch.chdir(at)
    chosen = told(events)
    code, events, err = call(capsys, "compress", "--resume", "2")
    assert code == 0, err
    assert told(events)["kinds"] == chosen["kinds"]
    assert events[-1]["digest"] == whole


def test_a_choice_comes_back_as_it_was_kept_and_a_damaged_one_not_at_all(tmp_path: Path) -> None:
    table, model = torch.rand(4, 4), wide()
    first, second, *others = costs.matrices(model)
    chosen = {first: ("iq4_nl", 4), second: ("ggml", 8)} | dict.fromkeys(others, ("ggml", 5))
    kept = budget.Budget(chosen, {"IQ4_NL": 1}, 99, 0.5, [("b", 0.25, table), ("c", 1.0, None)])
    budget.save(kept, tmp_path, "o")
    assert budget.saved(tmp_path, "another", model) is None
    found = budget.saved(tmp_path, "o", model)
    assert found is not None
    assert dataclasses.replace(found, ends=[]) == dataclasses.replace(kept, ends=[])
    torch.testing.assert_close(found.ends[0][2], table)
    assert [end[:2] for end in found.ends] == [("b", 0.25), ("c", 1.0)]
    plan = found.plan(compression.make("optq", {}))  # type: ignore[arg-type]
    assert (plan.solvers[first].grid, plan.solvers[second].bits) == ("iq4_nl", 8)  # type: ignore[attr-defined]
    file = tmp_path / budget.FILE
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert budget.saved(tmp_path, "o", model) is None
    file.unlink()
    assert budget.saved(tmp_path, "o", model) is None


@pytest.mark.parametrize("grid", [("ggml", 99), ("q4_k", 4), ("none", 4), (None, [4]), None])
def test_a_choice_that_the_model_cannot_have_is_made_again(grid: Any, tmp_path: Path) -> None:
    """Signed as a good one is: of bits that no type has, of rows that super-blocks do not fit, of another matrix."""
    model = wide()
    chosen = dict.fromkeys(costs.matrices(model), ("ggml", 4))
    name = next(iter(chosen))
    if grid is None:
        del chosen[name]
    else:
        chosen[name] = grid
    budget.save(budget.Budget(chosen, {}, 99, 0.5, []), tmp_path, "o")
    assert budget.saved(tmp_path, "o", model) is None
