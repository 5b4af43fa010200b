# SPDX-License-Identifier: Apache-2.0
"""`fleetune compress --method gkd` as a user meets it: student, teacher, Ctrl-C and resume, export, eval, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fleetune import models
from fleetune.cli import main
from fleetune.commands import distil

QUICK = [
    "--length",
    "64",
    "--set",
    "steps=4",
    "--set",
    "batch_size=2",
    "--set",
    "max_new_tokens=4",
    "--set",
    "lmbda=1",
]
GKD = ["--method", "gkd", *QUICK]
SELF = [*GKD, "--set", "teacher=same", "--set", "keep_layers=2"]
ROWS = ["--data", "rows.jsonl"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made = {"deep": models.tiny_llama(layers=4), "other": models.tiny_llama(7), "bert": models.tiny_bert()}
    made["foreign"] = models.tiny_llama()
    made["foreign"].tokenizer.add_tokens(["another"])
    for name, model in made.items():
        models.save(model.net, model.tokenizer, folder / name)
    return {name: str(folder / name) for name in made}


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The heron stood still in the shallow water. " * 5)
    rows = [{"instruction": f"count to {i}", "response": " ".join(map(str, range(i)))} for i in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, list[dict[str, Any]], str]:
    code = main([*args, "--json"])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines() if line.startswith("{")], err


def test_a_model_teaches_a_shallower_self(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    code, seen, err = call(capsys, "eval", "1", "--text", "text.txt", "--tasks", "perplexity")
    assert code == 0, err
    assert seen[-1]["perplexity"] == pytest.approx(result["after"]["perplexity"], rel=1e-5)
    code, exported, err = call(capsys, "export", "latest", "--to", "hf:bf16")
    assert code == 0, err
    assert exported[-1]["path"] == "runs/0001-gkd-deep/hf-bf16"
    half = models.load(exported[-1]["path"], dtype="bf16")
    assert half.n_params == model.n_params
    code, again, err = call(capsys, "compress", tiny["deep"], *SELF, *ROWS)
    assert code == 0, err
    assert again[-1]["digest"] == result["digest"]  # the same work, the same weights
    assert [e["step"] for e in again if e["event"] == "step"] == [1, 2, 3, 4]
    code, _, err = call(capsys, "compress", str(folder / "model"), "--method", "rtn", "--set", "group=8")
    assert code == 0, err


def test_a_reward_of_ones_own(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (at / "mine.py").write_text("def short(prompt, answer, reference):\n    return -len(answer) / 10\n")
    mine = ["--set", "reward=mine.py:short", "--set", "alpha=0.5", "--set", "reward_samples=2"]
    assert main(["compress", tiny["deep"], *SELF, *ROWS, *mine, "-v"]) == 0
    assert "step 4: mean reward -" in caplog.text
    capsys.readouterr()
    (at / "mine.py").write_text("def short(prompt, answer, reference):\n    return None\n")
    assert main(["compress", tiny["deep"], *SELF, *ROWS, *mine]) == 2
    err = capsys.readouterr().err
    assert "reward 'mine.py:short', on the answer" in err
    assert "returned a NoneType, not a float" in err
    assert "Traceback" not in err


def test_runs_as_student_and_as_teacher(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The held-out rows of the run that are not trained on measure both; eval finds them again."""
    quick = ["--limit", "30", "--held-out", "8", "--max-length", "512", "--samples", "0", "--rounds", "1"]
    zo = ["--method", "fedkseed", "--clients", "2", "--set", "tau=4", "--set", "K=16", "--set", "lr=1e-2"]
    assert call(capsys, "tune", tiny["deep"], "demo", *quick, *zo)[0] == 0
    learn = ["--set", "lr=1e-2", "--set", "steps=20", "--set", "lmbda=0"]
    code, done, err = call(capsys, "compress", "latest", *GKD, *learn, "--set", f"teacher={tiny['other']}")
    assert code == 0, err
    before, after, teacher = (done[-1][when] for when in ("before", "after", "teacher"))
    assert after["divergence"] < before["divergence"]
    assert "divergence" not in teacher
    code, seen, err = call(capsys, "eval", "2", "--tasks", "loss")
    assert code == 0, err
    assert seen[-1]["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert seen[-1]["rows"] == 4
    code, done, err = call(capsys, "compress", tiny["other"], *GKD, *ROWS, "--set", "teacher=1")
    assert code == 0, err
    code, named, err = call(capsys, "compress", tiny["other"], *GKD, *ROWS, "--set", "teacher=latest")
    assert code == 0, err
    assert done[-1]["digest"] == named[-1]["digest"]


def test_a_run_with_an_adapter_teaches_its_own_half(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter is part of both: of the teacher's loss, and of the blocks that the student begins with."""
    quick = ["--limit", "30", "--held-out", "8", "--max-length", "512", "--samples", "0", "--rounds", "1"]
    lora = ["--method", "fedit", "--clients", "2", "--set", "r=2", "--set", "lr=1e-1"]
    assert call(capsys, "tune", tiny["deep"], "demo", *quick, *lora)[0] == 0
    code, done, err = call(capsys, "compress", "latest", *SELF)
    assert code == 0, err
    code, whole, err = call(capsys, "compress", "latest", "--method", "rtn", "--set", "group=8")
    assert code == 0, err
    assert done[-1]["teacher"]["loss"] == pytest.approx(whole[-1]["before"]["loss"], rel=1e-6)
    assert (
        (at / "runs" / "0002-gkd-fedit-deep" / "model" / "README.md")
        .read_text()
        .endswith("its teacher was 0001-fedit-deep.\n")
    )


def test_a_stopped_one_is_taken_up_again(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([False, False, True])

    class Pulled:
        def __init__(self, ui: object) -> None:
            pass

        def __enter__(self) -> Pulled:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        @property
        def pulled(self) -> bool:
            return next(asked)

    with monkeypatch.context() as patch:
        patch.setattr(distil, "Brake", Pulled)
        code, out, _ = call(capsys, "compress", tiny["deep"], *SELF, *ROWS, "--seed", "7")
    assert code == 130
    assert "fleetune compress --resume runs/0001-gkd-deep" in json.dumps(out[-1])
    folder = at / "runs" / "0001-gkd-deep"
    assert [p.name for p in (folder / "parts").iterdir()] == ["state.safetensors"]
    assert not (folder / "model").exists()
    assert main(["export", "latest"]) == 2
    assert "is not finished" in capsys.readouterr().err
    code, resumed, err = call(capsys, "compress", "--resume", "latest")
    assert code == 0, err
    assert [e["step"] for e in resumed if e["event"] == "step"] == [4]
    assert not (folder / "parts").exists()
    _, whole, _ = call(capsys, "compress", tiny["deep"], *SELF, *ROWS, "--seed", "7")
    assert whole[-1]["digest"] == resumed[-1]["digest"]
    _, other, _ = call(capsys, "compress", tiny["deep"], *SELF, *ROWS, "--seed", "8")
    assert other[-1]["digest"] != whole[-1]["digest"]


BAD = {
    "no teacher": (["{deep}", *GKD, *ROWS], "no teacher is given"),
    "no rows": (["{deep}", *SELF], "needs rows to train on"),
    "text for rows": (["{deep}", *SELF, "--text", "text.txt"], "trains on rows, not on plain text"),
    "another vocabulary": (["{deep}", *GKD, *ROWS, "--set", "teacher={foreign}"], "another vocabulary"),
    "an encoder teaches": (["{deep}", *GKD, *ROWS, "--set", "teacher={bert}"], "is an encoder"),
    "no such teacher": (["{deep}", *GKD, *ROWS, "--set", "teacher=./nobody"], "nobody"),
    "no such run": (["{deep}", *GKD, *ROWS, "--set", "teacher=12"], "no run '12'"),
    "its own teacher": (["{deep}", *GKD, *ROWS, "--set", "teacher=same"], "nothing to learn from itself"),
    "too many blocks": (["{deep}", *SELF, *ROWS, "--set", "keep_layers=4"], "keep_layers = 4 of 4 blocks"),
    "answers beyond the context": (["{deep}", *SELF, *ROWS, "--set", "max_new_tokens=2000"], "beyond the context"),
    "an unknown setting": (["{deep}", *SELF, *ROWS, "--set", "betta=1"], "Did you mean 'beta'"),
    "a beta that cannot be": (["{deep}", *SELF, *ROWS, "--set", "beta=2"], "not between 0 and 1"),
    "a reward for nothing": (["{deep}", *SELF, *ROWS, "--set", "reward=f1", "--set", "lmbda=0"], "a reward with lmbda = 0"),
    "a reward that is not": (["{deep}", *SELF, *ROWS, "--set", "reward=mine.py:f"], "no file mine.py"),
    "no zeros to keep": (["{deep}", *SELF, *ROWS, "--set", "keep_zeros=true"], "has a zero to keep"),
    "an encoder learns": (["{bert}", *SELF, *ROWS], "an encoder cannot be compressed"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_clear_error(
    case: str, tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, text = BAD[case]
    code = main(["compress", *(a.format(**tiny) for a in args)])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert text in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert out == ""
    assert not (at / "runs").exists()


def test_a_dry_run_writes_nothing_and_settings_are_listed(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "compress", tiny["deep"], *SELF, *ROWS, "--dry-run")[0] == 0
    assert not (at / "runs").exists()
    code, listed, _ = call(capsys, "compress", "--list", "gkd")
    assert code == 0
    assert {s["name"] for s in listed[-1]["settings"]} >= {"teacher", "beta", "lmbda", "keep_layers"}
