"""`compress` with gkd and llm-pruner as a user meets them: results, runs, Ctrl-C and resume, a kill, a full disk."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_harness import tuned
from pruner_harness import tiny as pruned_one

from command_line import Capture, ok
from command_line import call_json as call
from fleetune import models
from fleetune.cli.main import main
from fleetune.models.families import widths

QUICK = shlex.split("--length 64 --set steps=4 --set batch_size=2 --set max_new_tokens=4 --set lmbda=1")
GKD = ["--method", "gkd", *QUICK]
SELF = [*GKD, "--set", "teacher=same", "--set", "keep_layers=2"]
ROWS = ["--data", "rows.jsonl"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made = {"deep": models.tiny_llama(layers=3), "other": models.tiny_llama(7), "llama": pruned_one()}
    for name, model in made.items():
        models.save(model.net, model.tokenizer, folder / name)
    return {name: str(folder / name) for name in made}


def test_a_model_teaches_a_shallower_self(tiny: dict[str, str], at: Path, capsys: Capture) -> None:
    assert main(["compress", tiny["deep"], *SELF, *ROWS, "--eval-text", "text.txt"]) == 0
    out, err = capsys.readouterr()
    assert "step 4/4  divergence" in err
    assert "teacher" in out
    assert "perplexity" in out
    folder = at / "runs" / "0001-gkd-deep"
    assert f"fleetune export runs/{folder.name} --to gguf" in out
    assert sorted(p.name for p in folder.iterdir()) == ["compress.json", "model"]
    result = json.loads((folder / "compress.json").read_text())["result"]
    model = models.load(str(folder / "model"))
    assert len(model.net.model.layers) == 2
    assert model.digest == result["digest"]
    assert len({result[when]["perplexity"] for when in ("before", "after", "teacher")}) == 3
    seen = ok(capsys, "eval", "1", "--text", "text.txt", "--tasks", "perplexity")
    assert seen[-1]["perplexity"] == pytest.approx(result["after"]["perplexity"], rel=1e-5)
    again = ok(capsys, "compress", tiny["deep"], *SELF, *ROWS)
    assert again[-1]["digest"] == result["digest"]  # the same work, the same weights
    assert [e["step"] for e in again if e["event"] == "step"] == [1, 2, 3, 4]


def test_runs_as_student_and_as_teacher(tiny: dict[str, str], at: Path, capsys: Capture) -> None:
    """The held-out rows of the run that are not trained on measure both; eval finds them again."""
    tuned(capsys, tiny["deep"])
    learn = ["--set", "lr=1e-2", "--set", "steps=10", "--set", "lmbda=0"]
    done = ok(capsys, "compress", "latest", *GKD, *learn, "--set", f"teacher={tiny['other']}")
    before, after, teacher = (done[-1][when] for when in ("before", "after", "teacher"))
    assert after["divergence"] < before["divergence"]
    assert "divergence" not in teacher
    assert len({each["other_perplexity"] for each in (before, after, teacher)}) == 3
    seen = ok(capsys, "eval", "2", "--tasks", "loss")
    assert seen[-1]["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert seen[-1]["rows"] == 4
    done = ok(capsys, "compress", tiny["other"], *GKD, *ROWS, "--set", "teacher=1")


PRUNER_BASE = ["--method", "llm-pruner", "--length", "64"]
PRUNER = [*PRUNER_BASE, "--set", "first=1", "--set", "last=1", "--set", "round_to=4", "--set", "ratio=0.34"]
FEW = ["--set", "steps=4", "--set", "batch_size=2"]
KILL = """
import os, signal, sys
from fleetune.cli.main import main
from fleetune.compression.methods import llm_pruner
told = llm_pruner.clipped_step
def step(*given, t, **named):
    if t == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return told(*given, t=t, **named)
llm_pruner.clipped_step = step
main(sys.argv[1:])
"""


def test_a_model_is_pruned_trained_quantised_and_exported(tiny: dict, at: Path, capsys: Capture) -> None:
    text = ["--eval-text", "text.txt"]
    assert main(["compress", tiny["llama"], *PRUNER, *FEW, *ROWS, *text]) == 0
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
    for name in ("perplexity", "other_perplexity"):
        assert len({result[when][name] for when in ("before", "pruned", "after")}) == 3
    seen = ok(capsys, "eval", "1", "--text", "text.txt", "--tasks", "perplexity")
    assert seen[-1]["perplexity"] == pytest.approx(result["after"]["perplexity"], rel=1e-5)
    solve = ["--method", "optq", "--set", "group=4", "--text", "text.txt", "--length", "32"]
    ok(capsys, "compress", "runs/0001-llm-pruner-llama/model", *solve, *text)
    code, exported, err = call(capsys, "export", "latest", "--to", "hf", "--text", "text.txt")
    assert (code, exported.pop()["runtime"]) == (0, None), err
    assert "not run: transformers does not load blocks of different widths" in err
    assert "--to gguf" in err
    plain = models.load(exported[-1]["path"], device="cpu")
    here, there = ([tuple(w) for w in widths.block_widths(m.net.config)] for m in (plain, model))
    assert here == there


@pytest.mark.faults
def test_a_killed_one_goes_on(tiny: dict[str, str], at: Path, capsys: Capture) -> None:
    """Killed without a word after its third step: the kept steps are not done again."""
    more = [f"--set={x}" for x in ("batch_size=2", "steps=8", "save_every=2", "lr=1e-3")]
    args = ["compress", tiny["llama"], *PRUNER, *ROWS, *more]
    killed = subprocess.run([sys.executable, "-c", KILL, *args], cwd=at, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = at / "runs" / "0001-llm-pruner-llama"
    assert sorted(p.name for p in (folder / "parts").iterdir()) == ["recovery"]
    resumed = ok(capsys, "compress", "--resume", "latest")
    assert [e["step"] for e in resumed if e["event"] == "step"] == [3, 4, 5, 6, 7, 8]
    assert not (folder / "parts").exists()
    _, whole, _ = call(capsys, *args)
    assert whole[-1]["digest"] == resumed[-1]["digest"]
