# SPDX-License-Identifier: Apache-2.0
"""KL divergence and same top token of a compressed model: in `compress` and its files, and in `eval --reference`."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_harness import LORA, call, pulled_after, tuned

from fleetune import models
from fleetune.cli.main import main
from fleetune.common.events import Measured, as_dict
from fleetune.data.encode import encode_all
from fleetune.deploy import harness
from fleetune.deploy import measure as measuring
from fleetune.errors import StorageError
from fleetune.evaluation import kl_divergence
from fleetune.evaluation.losses import text_rows
from fleetune.models import Model
from fleetune.runs import compression_folder
from fleetune.runs.compression_folder import LOGITS
from fleetune.subject import Compressed
from fleetune.tuning.result import finished

RTN = ["--method", "rtn", "--set", "group=8"]
TEXT = ["--eval-text", "text.txt"]
NAMES = ["kl_divergence", "kl_divergence_error", "same_top", "same_top_error", "kl_tokens"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, path)
    return str(path)


def expected(dense: Model, model: Model, rows: Any) -> list[float]:
    """KL divergence and same top token from all logits, in float64."""
    kl, same = list[float](), list[bool]()
    for row in rows:
        ids = torch.from_numpy(np.asarray(row.ids, np.int64))[None]
        with torch.inference_mode():
            P, Q = (
                m.net(input_ids=ids).logits[0, max(row.n_prompt, 1) - 1 : -1].double() for m in (dense, model)
            )
        p, q = P.log_softmax(-1), Q.log_softmax(-1)
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        same += (P.argmax(-1) == Q.argmax(-1)).tolist()
    return [
        float(np.mean(kl)),
        float(np.std(kl, ddof=1) / len(kl) ** 0.5),
        100 * float(np.mean(same)),
        len(kl),
    ]


def stated(values: dict[str, float]) -> list[float]:
    return [values[name] for name in NAMES if name != "same_top_error"]


def close(values: dict[str, float], wanted: list[float]) -> None:
    assert stated(values) == pytest.approx(wanted, rel=1e-3)
    assert values["kl_divergence"] > 0


def test_a_compressed_model_is_compared_with_the_dense_one(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told, err = call(capsys, "compress", tiny, *RTN, *TEXT)
    assert code == 0, err
    before, after = told[-1]["before"], told[-1]["after"]
    assert list(before) == ["perplexity"]
    assert list(after) == ["perplexity", *NAMES]
    (folder,) = (at / "runs").iterdir()
    dense, texts = models.load(tiny), [(at / "text.txt").read_text()]
    close(after, expected(dense, models.load_artefact(folder / "model"), text_rows(dense, texts)))
    assert json.loads((folder / "compress.json").read_text())["result"]["after"] == after
    assert sorted(p.name for p in folder.iterdir()) == ["compress.json", "model"]
    size = 4 * 264 * after["kl_tokens"] + 128
    assert f"{after['kl_tokens']:,} tokens to compare by: {size / 1000:.0f} kB of logits" in err
    for more in ([], ["--low-memory"]):
        _, again, _ = call(capsys, "compress", tiny, *RTN, *TEXT, *more)
        assert stated(again[-1]["after"]) == (
            stated(after) if not more else pytest.approx(stated(after), rel=1e-3)
        )


def test_the_table_shows_it_with_its_error(tiny: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", tiny, *RTN, *TEXT]) == 0
    out, _ = capsys.readouterr()
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    (folder,) = (at / "runs").iterdir()
    after = json.loads((folder / "compress.json").read_text())["result"]["after"]
    value, sign, error = lines["kl_divergence"]
    assert (float(value), sign, float(error)) == (
        pytest.approx(after["kl_divergence"], abs=5.1e-5),
        "±",
        pytest.approx(after["kl_divergence_error"], abs=5.1e-5),
    )
    assert lines["same_top"] == [f"{after['same_top']:.1f}", "±", f"{after['same_top_error']:.1f}", "%"]
    assert not {"kl_divergence_error", "same_top_error", "kl_tokens"} & set(lines)


def test_a_run_is_compared_on_the_rows_that_it_was_not_calibrated_on(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(capsys, tiny, LORA)
    code, told, err = call(capsys, "compress", "1", "--windows", "2", "--length", "16", "--set", "group=8")
    assert code == 0, err
    folder = Path(told[-1]["folder"])
    dense = finished.load(at / "runs" / "0001-fedit-tiny", offline=True)
    rows = encode_all(Compressed(folder).held_out(offline=True), dense.tokenizer, 512)[0]
    close(told[-1]["after"], expected(dense, models.load_artefact(folder / "model"), rows))
    code, seen, err = call(capsys, "eval", "2", "--reference", "1", "--tasks", "loss", "--device", "cpu")
    assert code == 0, err
    assert {name: seen[-1][name] for name in NAMES} == pytest.approx(
        {name: told[-1]["after"][name] for name in NAMES}, rel=1e-5
    )
    assert seen[-1]["loss"] == pytest.approx(told[-1]["after"]["loss"], rel=1e-6)
    # of the tuned model, the one that it was tuned from is a reference as well
    code, seen, err = call(capsys, "eval", "1", "--reference", tiny, "--tasks", "loss", "--device", "cpu")
    assert code == 0, err
    rows = encode_all(finished.held_out(at / "runs" / "0001-fedit-tiny"), dense.tokenizer, 512)[0]
    close(seen[-1], expected(models.load(tiny), dense, rows))
    assert seen[-1]["base_loss"] > 0


def test_a_pruned_model_and_a_student_are_compared_too(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, texts = models.load(tiny), [(at / "text.txt").read_text()]
    pruner = [
        "--set",
        "ratio=0.3",
        "--set",
        "recover=none",
        "--set",
        "mode=depth",
        "--set",
        "first=0",
        "--set",
        "last=0",
    ]
    _, told, _ = call(
        capsys, "compress", tiny, "--method", "llm-pruner", *pruner, "--windows", "2", "--length", "16", *TEXT
    )
    assert told[-1]["event"] == "done", told[-1]
    model = models.load(f"{told[-1]['folder']}/model")
    close(told[-1]["after"], expected(dense, model, text_rows(dense, texts)))
    assert told[-1]["pruned"] == told[-1]["after"]
    teacher = models.tiny_llama(seed=4)
    models.save(teacher.net, teacher.tokenizer, at / "teacher")
    student = ["teacher=./teacher", "steps=2", "batch_size=1", "max_new_tokens=4", "lmbda=0"]
    _, told, _ = call(
        capsys,
        "compress",
        tiny,
        "--method",
        "gkd",
        "--data",
        "rows.jsonl",
        *TEXT,
        *(word for each in student for word in ("--set", each)),
    )
    assert told[-1]["event"] == "done", told[-1]
    model, rows = models.load(f"{told[-1]['folder']}/model"), text_rows(dense, texts)
    close(told[-1]["after"], expected(teacher, model, rows))
    close(told[-1]["before"], expected(teacher, dense, rows))
    assert "kl_divergence" not in told[-1]["teacher"]


def test_ctrl_c_leaves_no_logits_and_a_resumed_compression_states_the_same(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, told, _ = call(capsys, "compress", tiny, *RTN, *TEXT)
    with monkeypatch.context() as patch:
        patch.setattr("fleetune.cli.listener.InterruptHandler", pulled_after(9))
        assert call(capsys, "compress", tiny, *RTN, *TEXT)[0] == 130
    folder = sorted((at / "runs").iterdir())[-1]
    assert not (folder / LOGITS).exists()
    (folder / LOGITS).write_bytes(b"what a kill left")
    code, again, err = call(capsys, "compress", "--resume", str(folder))
    assert code == 0, err
    assert again[-1]["after"] == told[-1]["after"]
    assert sorted(p.name for p in folder.iterdir()) == ["compress.json", "model"]
    (folder / LOGITS).write_bytes(b"what a copy of a killed one brought")
    assert call(capsys, "compress", "--resume", str(folder))[0] == 0
    assert sorted(p.name for p in folder.iterdir()) == ["compress.json", "model"]


def test_an_infinite_divergence_is_null_in_the_files(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "compress", tiny, *RTN, *TEXT)[0] == 0
    (folder,) = (at / "runs").iterdir()
    known = compression_folder.record(folder)["result"]
    known["after"] |= {"kl_divergence": math.inf, "perplexity": math.nan}
    compression_folder.write_record(folder, compression_folder.request_of(folder), known)
    line = Measured(
        name="codes",
        engine="torch",
        path=str(folder),
        bytes=1,
        bits_linear=4.0,
        bits=4.0,
        peak_rss=1,
        prefill=None,
        generate=None,
        kl_divergence=math.inf,
        kl_tokens=7,
    )
    measuring._write(folder, {}, [as_dict(line)], {})

    def strict(name: str) -> Any:
        return json.loads((folder / name).read_text(), parse_constant=lambda text: pytest.fail(text))

    after = strict("compress.json")["result"]["after"]
    assert (after["kl_divergence"], after["perplexity"]) == (None, None)
    assert after["same_top"] == known["after"]["same_top"]
    (row,) = strict("measure.json")["rows"]
    assert (row["kl_divergence"], row["kl_tokens"]) == (None, 7)
    assert call(capsys, "compress", "--resume", str(folder))[1][-1]["after"] == after
    assert main(["runs", "show", "1"]) == 0


# --- eval ---------------------------------------------------------------------------------------------------


def test_a_model_is_compared_with_a_reference_on_a_text(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kl_divergence, "ROOM", 4 * 264 * 100)  # the first 100 tokens
    assert call(capsys, "compress", tiny, *RTN, *TEXT)[0] == 0
    asked = ["--reference", tiny, "--tasks", "perplexity", "--text", "text.txt", "--device", "cpu"]
    code, told, err = call(capsys, "eval", "1", *asked)
    assert code == 0, err
    (folder,) = (at / "runs").iterdir()
    after = json.loads((folder / "compress.json").read_text())["result"]["after"]
    assert after["kl_tokens"] == 100
    assert {name: told[-1][name] for name in NAMES} == {name: after[name] for name in NAMES}
    assert f"{tiny} is the reference: 100 tokens, 106 kB of logits" in err
    assert main(["eval", "1", *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["kl_divergence,", "100", "tokens"] and "±" in line for line in lines)
    assert any(line.split()[:3] == ["same_top,", "100", "tokens"] and line.endswith(" %") for line in lines)
    code, told, _ = call(capsys, "eval", tiny, *asked)
    assert (told[-1]["kl_divergence"], told[-1]["same_top"]) == (0.0, 100.0)


def other_tokens(at: Path) -> str:
    """A model whose tokenizer gives the tokens other numbers."""
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, at / "other")
    file = at / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[5:7]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))
    for sums in (at / "other").glob("*SUMS"):
        sums.unlink()
    return str(at / "other")


@pytest.mark.parametrize("command", ["eval", "measure"])
def test_a_temporary_folder_without_room_for_the_logits_is_said_before_they_are_written(
    command: str, tiny: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is too small cannot be had here: of the disk's answer the free bytes are replaced."""
    used, answer = shutil.disk_usage, list[str]()

    def nearly_full(path: str | Path) -> object:
        answer.append(str(path))
        return used(path)._replace(free=1000)

    def here(job: harness.MeasureJob) -> harness.Measurement:
        return harness.carry_out(job)

    monkeypatch.setenv("TMPDIR", str(at))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    monkeypatch.setattr(harness, "measured", here)  # in this process, whose disk is so full
    rows = ["--tasks", "perplexity", "--device", "cpu"] if command == "eval" else ["--repeats", "1"]
    code, told, _ = call(capsys, command, tiny, "--reference", tiny, "--text", "text.txt", *rows)
    assert code == StorageError.exit_code
    assert "the logits of the reference take" in told[-1]["message"]
    assert "1.0 kB free" in told[-1]["message"]
    assert "TMPDIR" in told[-1]["hint"]
    assert answer[-1].startswith(str(at))
    assert not list(at.glob("fleetune-*"))


@pytest.mark.parametrize("command", ["eval", "measure"])
def test_a_reference_with_other_tokens_is_refused_before_a_model_is_loaded(
    command: str, tiny: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    other = other_tokens(at)
    monkeypatch.setattr(models, "load", no_model)
    code, told, _ = call(capsys, command, tiny, "--reference", other, "--text", "text.txt")
    assert code == 2
    assert "have different tokens" in told[-1]["message"]
    assert "the model that it was made from" in told[-1]["hint"]


def test_without_rows_or_text_there_is_nothing_to_compare_on(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told, _ = call(capsys, "eval", tiny, "--reference", tiny)
    assert code == 2
    assert "needs DATA" in told[-1]["message"]
    code, told, _ = call(capsys, "eval", tiny, "--reference", tiny, "--tasks", "hellaswag")
    assert code == 2
    assert "on rows or a text" in told[-1]["message"]
    code, told, _ = call(capsys, "measure", tiny, "--reference", tiny)
    assert code == 2
    assert "nothing to compare" in told[-1]["message"]
