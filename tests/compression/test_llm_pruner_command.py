# SPDX-License-Identifier: Apache-2.0
"""`fleetune compress --method llm-pruner` as a user meets it: pruning, recovery, a kill and resume, what follows, bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_harness import LORA, call, pulled_after, tuned
from pruner_harness import tiny as made

from fleetune import models
from fleetune.cli.main import main
from fleetune.models.families import widths

BASE = ["--method", "llm-pruner", "--length", "64"]
QUICK = [*BASE, "--set", "first=1", "--set", "last=1", "--set", "round_to=4", "--set", "ratio=0.34"]
FEW = ["--set", "steps=4", "--set", "batch_size=2"]
ROWS = ["--data", "rows.jsonl"]


KILL = """
import os, signal, sys
from fleetune.cli.main import main
from fleetune.compression.methods import llm_pruner
told = llm_pruner.LoraRecovery._update
def update(self, model, batch, optimizer, parameters, t):
    if t == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return told(self, model, batch, optimizer, parameters, t)
llm_pruner.LoraRecovery._update = update
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    every = {"llama": made(), "qwen": made("qwen2"), "mistral": made("mistral"), "bert": models.tiny_bert()}
    for name, model in every.items():
        models.save(model.net, model.tokenizer, folder / name)
    return {name: str(folder / name) for name in every}


def test_a_model_is_pruned_trained_quantised_and_exported(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--eval-text", "text.txt"]
    assert main(["compress", tiny["llama"], *QUICK, *FEW, *ROWS, *text]) == 0
    out, err = capsys.readouterr()
    assert "of the weights are gone: 4 blocks with 2 to 3 key heads and 28 to 40 channels" in err
    assert "step 4/4  loss" in err
    assert "pruned" in out
    folder = at / "runs" / "0001-llm-pruner-llama"
    assert f"fleetune export runs/{folder.name} --to gguf" in out
    assert sorted(p.name for p in folder.iterdir()) == ["compress.json", "model"]
    assert "loaded by `fleetune`" in (folder / "model" / "README.md").read_text()
    result = json.loads((folder / "compress.json").read_text())["result"]
    model = models.load(str(folder / "model"), device="cpu")
    assert model.digest == result["digest"]
    assert result["parameters"]["after"] == model.n_params < result["parameters"]["before"]
    assert len({result[when]["perplexity"] for when in ("before", "pruned", "after")}) == 3
    code, seen, err = call(capsys, "eval", "1", "--text", "text.txt", "--tasks", "perplexity")
    assert code == 0, err
    assert seen[-1]["perplexity"] == pytest.approx(result["after"]["perplexity"], rel=1e-5)
    solve = ["--method", "optq", "--set", "group=4", "--text", "text.txt", "--length", "32"]
    code, _, err = call(capsys, "compress", "runs/0001-llm-pruner-llama/model", *solve, *text)
    assert code == 0, err
    code, exported, err = call(capsys, "export", "latest", "--to", "hf", "--text", "text.txt")
    assert (code, exported.pop()["runtime"]) == (0, None), err
    assert "not run: transformers does not load blocks of different widths" in err
    assert "--to gguf" in err
    plain = models.load(exported[-1]["path"], device="cpu")
    assert [tuple(w) for w in widths.block_widths(plain.net.config)] == [
        tuple(w) for w in widths.block_widths(model.net.config)
    ]
    code, seen, err = call(capsys, "eval", "2", "--text", "text.txt", "--tasks", "perplexity")
    assert code == 0, err
    code, exported, err = call(capsys, "export", "1", "--to", "hf:bf16")
    assert code == 0, err
    assert "transformers does not" in err
    assert models.load(exported[-1]["path"], dtype="bf16", device="cpu").n_params == model.n_params


def test_either_dash_text_and_no_recovery(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["compress", tiny["qwen"], *QUICK, "--set", "first=0", "--set", "last=0", "--text", "text.txt"]
    code, done, err = call(capsys, *args, "--set", "recover=none")
    assert code == 0, err
    assert [e["event"] for e in done] == ["start", "pruned", "done"]
    assert done[1]["widths"][0] == {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 28,
    }
    under = ["--method", "llm_pruner"]
    code, again, err = call(capsys, *args, "--set", "recover=none", *under)
    assert code == 0, err
    assert again[-1]["digest"] == done[-1]["digest"]
    assert again[-1]["folder"] == "runs/0002-llm-pruner-qwen"
    code, trained, err = call(capsys, *args, *FEW)
    assert code == 0, err
    assert [e["step"] for e in trained if e["event"] == "step"] == [1, 2, 3, 4]
    assert trained[-1]["digest"] != done[-1]["digest"]
    code, own, err = call(
        capsys, "compress", tiny["llama"], *QUICK, "--set", "recover=none", "--windows", "4"
    )
    assert code == 0, err
    assert "the model writes 4 windows itself" in err
    config = json.loads((at / own[-1]["folder"] / "model" / "config.json").read_text())
    assert config["model_type"] == "fleetune_llama"


def test_a_run_is_pruned_on_its_own_half(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(capsys, tiny["llama"], LORA)
    code, done, err = call(
        capsys, "compress", "latest", *QUICK, *FEW, "--set", "mode=depth", "--set", "ratio=0.5"
    )
    assert code == 0, err
    assert done[1]["blocks"] == 3
    assert {"before", "pruned", "after"} <= done[-1].keys()
    code, seen, err = call(capsys, "eval", "2", "--tasks", "loss")
    assert code == 0, err
    assert seen[-1]["loss"] == pytest.approx(done[-1]["after"]["loss"], rel=1e-5)


@pytest.mark.faults
def test_a_killed_one_goes_on(tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed without a word after its third step: neither the choice nor the kept steps are done again."""
    more = [f"--set={x}" for x in ("batch_size=2", "steps=8", "save_every=2", "lr=1e-3")]
    args = ["compress", tiny["llama"], *QUICK, *ROWS, *more]
    killed = subprocess.run([sys.executable, "-c", KILL, *args], cwd=at, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = at / "runs" / "0001-llm-pruner-llama"
    assert sorted(p.name for p in (folder / "parts").iterdir()) == ["kept.json", "recovery"]
    assert main(["export", "latest"]) == 2
    assert "is not finished" in capsys.readouterr().err
    code, resumed, err = call(capsys, "compress", "--resume", "latest")
    assert code == 0, err
    assert [e["step"] for e in resumed if e["event"] == "step"] == [3, 4, 5, 6, 7, 8]
    assert not (folder / "parts").exists()
    _, whole, _ = call(capsys, *args)
    assert whole[-1]["digest"] == resumed[-1]["digest"]


def test_ctrl_c_while_the_importance_is_measured(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept of it, and `--resume` begins anew."""

    args = ["compress", tiny["llama"], *QUICK, *ROWS, "--set", "recover=none"]
    with monkeypatch.context() as patch:
        patch.setattr("fleetune.cli.listener.InterruptHandler", pulled_after(0))
        code, out, _ = call(capsys, *args)
    assert code == 130
    assert "stopped after 1 of 8 rows" in json.dumps(out[-1])
    assert [p.name for p in (at / "runs" / "0001-llm-pruner-llama").iterdir()] == ["compress.json"]
    code, resumed, err = call(capsys, "compress", "--resume", "latest")
    assert code == 0, err
    assert [e["event"] for e in resumed] == ["start", "pruned", "done"]


BAD = {
    "gkd on text": (["{llama}", *QUICK, "--text", "text.txt", "--set", "recover=gkd"], "not on plain text"),
    "gkd on its own text": (["{llama}", *QUICK, "--set", "recover=gkd"], "not on plain text"),
    "all spared": (["{llama}", *BASE, *ROWS], "first = 4 and last = 2 spare all 4 blocks"),
    "nothing goes": (["{llama}", *QUICK, *ROWS, "--set", "ratio=0.01"], "takes nothing"),
    "another family": (["{mistral}", *QUICK, *ROWS], "type 'mistral' are not pruned"),
    "an encoder": (["{bert}", *QUICK, *ROWS], "an encoder cannot be compressed"),
    "an unknown setting": (["{llama}", *QUICK, *ROWS, "--set", "rato=1"], "Did you mean 'ratio'"),
    "a mode that is not there": (
        ["{llama}", *QUICK, *ROWS, "--set", "mode=channel"],
        "mode = 'channel' is not one of",
    ),
    "too long windows": (
        ["{llama}", *QUICK, "--text", "text.txt", "--length", "1000"],
        "longer than the model's 512",
    ),
    "too little text": (["{llama}", *QUICK, "--text", "text.txt", "--length", "500"], "a window needs 500"),
    "no such method": (["{llama}", "--method", "llmpruner"], "Did you mean 'llm-pruner'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_clear_error(
    case: str, tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, text = BAD[case]
    code = main(["compress", *(a.format(**tiny) for a in args)])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert text in err
    assert "error: " in err
    assert "Traceback" not in err
    assert out == ""
    assert not (at / "runs").exists()


def test_a_dry_run_writes_nothing_and_settings_are_listed(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "compress", tiny["llama"], *QUICK, *ROWS, "--dry-run")[0] == 0
    assert not (at / "runs").exists()
    for name in ("llm-pruner", "llm_pruner"):
        code, listed, _ = call(capsys, "compress", "--list", name)
        assert code == 0
        assert {s["name"] for s in listed[-1]["settings"]} >= {
            "ratio",
            "importance",
            "first",
            "last",
            "recover",
        }


@pytest.mark.parametrize(("recover", "copies"), [("lora", 1), ("gkd", 6)])
def test_a_disk_too_small_is_said_before_any_work(
    recover: str,
    copies: int,
    tiny: dict[str, str],
    at: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = [
        "compress",
        tiny["llama"],
        *QUICK,
        *FEW,
        *ROWS,
        "--set",
        f"recover={recover}",
        "--set",
        "save_every=1",
    ]
    need = copies * 4 * made().n_params
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=need - 2000))
    code, events, _ = call(capsys, *args)
    assert code == 1
    assert "the state that is kept and the result take" in events[-1]["message"]
    assert not (at / "runs" / "0001-llm-pruner-llama" / "parts").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=need))
    assert call(capsys, "compress", "--resume", "1")[0] == 0
