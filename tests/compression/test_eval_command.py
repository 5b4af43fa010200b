# SPDX-License-Identifier: Apache-2.0
"""`fleetune eval`: every option does what it says or is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_harness import QUICK, ZEROTH, call, tuned

import fleetune
from fleetune import models
from fleetune.cli.main import main

RTN = ["--method", "rtn", "--set", "group=8"]
LOSS = ["rows.jsonl", "--tasks", "loss"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, path)
    return str(path)


BAD = {
    "no rows": (["--limit", "0"], "limit = 0 is below 1"),
    "rows from the end": (["--limit", "-1"], "limit = -1 is below 1"),
    "no answer": (["--answer-tokens", "0"], "answer_tokens = 0 is below 1"),
    "less than no answer": (["--answer-tokens", "-5", "--limit", "-2"], "answer_tokens = -5 is below 1"),
    "no tasks": (["--tasks", ""], "--tasks names no task"),
    "a comma for tasks": (["--tasks", " ,"], "--tasks names no task"),
    "no text file": (["--text", "no.txt"], "no text file at no.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_clear_error_before_a_model_is_loaded(
    case: str, tiny: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", no_model)
    args, text = BAD[case]
    assert main(["eval", tiny, "rows.jsonl", *args]) == 2
    out, err = capsys.readouterr()
    assert text in err
    assert out == ""


def test_a_compressed_model_is_measured_in_the_type_and_on_the_device_that_are_named(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "compress", tiny, *RTN)[0] == 0
    assert call(capsys, "export", "1", "--to", "hf", "--path", "plain")[0] == 0
    losses = {}
    for dtype in ("fp32", "bf16"):
        for subject in ("1", "runs/0001-rtn-tiny/model", "plain"):
            code, seen, err = call(capsys, "eval", subject, *LOSS, "--dtype", dtype, "--device", "cpu")
            assert code == 0, err
            losses[subject, dtype] = seen[-1]["loss"]
        assert losses["1", dtype] == losses["runs/0001-rtn-tiny/model", dtype] == losses["plain", dtype]
    assert losses["1", "fp32"] != losses["1", "bf16"]
    assert main(["eval", "1", *LOSS, "--device", "foo"]) == 2
    assert "no device named 'foo'" in capsys.readouterr().err


def test_a_run_has_a_dtype_of_its_own(tiny: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(capsys, tiny)
    assert main(["eval", "1", *LOSS, "--dtype", "bf16"]) == 2
    assert "a run has a dtype of its own, here fp32" in capsys.readouterr().err
    assert main(["eval", "1", *LOSS, "--device", "foo"]) == 2
    assert "no device named 'foo'" in capsys.readouterr().err
    for own in ([], ["--dtype", "fp32"]):
        assert call(capsys, "eval", "1", *LOSS, *own)[0] == 0


def test_rows_that_were_trained_on_are_said_to_be(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {n}", "response": f"{n} it is"}) + "\n" for n in range(20))
    )
    assert call(capsys, "tune", tiny, "rows.jsonl", *QUICK, *ZEROTH)[0] == 0
    assert call(capsys, "compress", "1", *RTN)[0] == 0
    rows = Path("rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    held = fleetune.open("runs/0001-fedkseed-tiny").held_out()  # type: ignore[union-attr]
    trained = len(rows) - len(held)
    for subject in ("1", "2"):
        said = f"{trained} of {len(rows)} rows were trained on in runs/0001-fedkseed-tiny"
        assert said in call(capsys, "eval", subject, *LOSS)[2]
    for given in ([], ["other.jsonl"]):
        Path("other.jsonl").write_text(json.dumps({"prompt": "none of", "response": "those rows"}))
        assert "trained on" not in call(capsys, "eval", "1", *given, "--tasks", "loss")[2]
    assert "trained on" not in call(capsys, "eval", tiny, *LOSS)[2]
    Path("rows.jsonl").rename("moved.jsonl")
    assert call(capsys, "eval", "1", "moved.jsonl", "--tasks", "loss")[0] == 0, "nothing is known of them"


def test_perplexity_without_a_text_is_said_to_be_of_the_answers_alone(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss counts the answer after its prompt, so the two do not belong together."""
    Path("rows.jsonl").write_text(json.dumps({"prompt": "say it", "response": "it is said"}))
    Path("book.txt").write_text("it is said")
    lines = []
    for more in ([], ["--text", "book.txt"]):
        assert main(["eval", tiny, "rows.jsonl", "--tasks", "loss,perplexity", *more]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "perplexity" in line]
        lines.append(line.split())
    assert lines[0][:6] == ["perplexity", "of", "the", "answers", "without", "prompts,"]
    assert lines[1] == ["perplexity", lines[0][-1]]
