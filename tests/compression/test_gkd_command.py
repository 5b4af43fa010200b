# SPDX-License-Identifier: Apache-2.0
"""`fleetune compress --method gkd` as a user meets it: student, teacher, Ctrl-C and resume, export, eval, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_harness import LORA, call, pulled_after, tuned

from fleetune import models
from fleetune.cli.main import main

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
    assert [e["step"] for e in again if e["event"] == "step" and "reward" not in e] == [1, 2, 3, 4]
    code, _, err = call(capsys, "compress", str(folder / "model"), "--method", "rtn", "--set", "group=8")
    assert code == 0, err


def test_a_reward_of_ones_own(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (at / "mine.py").write_text("def short(prompt, answer, reference):\n    return -len(answer) / 10\n")
    mine = ["--set", "reward=mine.py:short", "--set", "alpha=0.5", "--set", "reward_samples=2"]
    code, told, err = call(capsys, "compress", tiny["deep"], *SELF, *ROWS, *mine, "-v")
    assert code == 0, err
    means = [e["reward"] for e in told if e["event"] == "step"]
    assert len(means) == 4
    assert f"step 4: mean reward {means[-1]:.4f} of 4 answers" in caplog.text
    assert all(-1 < mean < 0 for mean in means)
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
    tuned(capsys, tiny["deep"])
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
    (run,) = at.glob("runs/0001-*")
    code, named, err = call(capsys, "compress", tiny["other"], *GKD, *ROWS, "--set", f"teacher={run}")
    assert code == 0, err
    assert done[-1]["digest"] == named[-1]["digest"]


def test_a_plain_result_teaches_by_number_or_as_the_latest(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "compress", tiny["deep"], *SELF, *ROWS)
    assert code == 0, err
    digests = []
    for teacher in ("latest", "1", "runs/0001-gkd-deep/model"):
        code, done, err = call(capsys, "compress", tiny["other"], *GKD, *ROWS, "--set", f"teacher={teacher}")
        assert code == 0, err
        digests.append(done[-1]["digest"])
    assert len(set(digests)) == 1


def test_a_run_with_an_adapter_teaches_its_own_half(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter is part of both: of the teacher's loss, and of the blocks that the student begins with."""
    tuned(capsys, tiny["deep"], LORA)
    code, done, err = call(capsys, "compress", "latest", *SELF)
    assert code == 0, err
    code, whole, err = call(capsys, "compress", "1", "--method", "rtn", "--set", "group=8")
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
    with monkeypatch.context() as patch:
        patch.setattr("fleetune.cli.listener.InterruptHandler", pulled_after(2))
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


COMPRESSED = {
    "a student of codes": (
        ["1", *GKD, *ROWS, "--set", "teacher={deep}"],
        "1 was compressed with rtn: it holds codes",
    ),
    "its folder": (
        ["runs/0001-rtn-deep", *GKD, *ROWS, "--set", "teacher={deep}"],
        "fleetune export runs/0001-rtn-deep --to hf",
    ),
    "its artefact": (["runs/0001-rtn-deep/model", *GKD, *ROWS, "--set", "teacher={deep}"], "it holds codes"),
    "a teacher of codes": (
        ["{deep}", *GKD, *ROWS, "--set", "teacher=1"],
        "teacher=1: 1 was compressed with rtn: it holds codes",
    ),
    "a pruned teacher": (
        ["{deep}", *GKD, *ROWS, "--set", "teacher=0002-sparsegpt-deep"],
        "with sparsegpt: it holds zeros among",
    ),
    "another method": (["runs/0001-rtn-deep", "--method", "optq"], "it holds codes"),
    "a number of nothing": (["7", "--method", "rtn"], "no run '7' in runs"),
}


def test_compressed_models_must_be_exported_first(
    tiny: dict[str, str], at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before any weights are read; and what is exported then learns and teaches."""
    few = ["--set", "group=8"], ["--windows", "2", "--length", "16"], [*SELF[2:], *ROWS]
    for method, more in zip(("rtn", "sparsegpt", "gkd"), few, strict=True):
        code, _, err = call(capsys, "compress", tiny["deep"], "--method", method, *more)
        assert code == 0, err
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", lambda *_, **__: pytest.fail("a model is loaded"))
        for case, (args, text) in COMPRESSED.items():
            assert main(["compress", *(a.format(**tiny) for a in args)]) == 2, case
            assert text in capsys.readouterr().err, case
    code, told, err = call(capsys, "export", "1", "--to", "hf")
    assert code == 0, err
    for names in ([told[-1]["path"], tiny["deep"]], [tiny["deep"], told[-1]["path"]]):
        code, _, err = call(capsys, "compress", names[0], *GKD, *ROWS, "--set", f"teacher={names[1]}")
        assert code == 0, err


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
    "answers beyond the context": (
        ["{deep}", *SELF, *ROWS, "--set", "max_new_tokens=2000"],
        "beyond the context",
    ),
    "an unknown setting": (["{deep}", *SELF, *ROWS, "--set", "betta=1"], "Did you mean 'beta'"),
    "a beta that cannot be": (["{deep}", *SELF, *ROWS, "--set", "beta=2"], "not between 0 and 1"),
    "a reward for nothing": (
        ["{deep}", *SELF, *ROWS, "--set", "reward=f1", "--set", "lmbda=0"],
        "a reward with lmbda = 0",
    ),
    "a reward that is not": (["{deep}", *SELF, *ROWS, "--set", "reward=mine.py:f"], "no file mine.py"),
    "no zeros to keep": (["{deep}", *SELF, *ROWS, "--set", "keep_zeros=true"], "has a zero to keep"),
    "an encoder learns": (["{bert}", *SELF, *ROWS], "an encoder cannot be compressed"),
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
