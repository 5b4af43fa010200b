# SPDX-License-Identifier: Apache-2.0
"""`fleetune compress` as a user meets it: a model, a run, Ctrl-C and resume, and every kind of bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command_harness import pulled_after
from deploy_harness import gguf_of

from fleetune import models
from fleetune.cli.main import main
from fleetune.common import files
from fleetune.common.display import human_bytes
from fleetune.compression.layerwise.activations import HiddenStates
from fleetune.models.artefact import Master, Quantised

SMALL = ["--method", "optq", "--windows", "4", "--length", "16", "--set", "group=8"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, path)
    return str(path)


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(
        "The heron stood still in the shallow water, and the evening went on. " * 20
    )
    (tmp_path / "short.txt").write_text("A.")
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(list(args))
    out, err = capsys.readouterr()
    return code, out, err


def events(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_model_is_compressed_and_measured(tiny: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", "text.txt", "--eval-text", "text.txt"]
    code, out, err = call(capsys, "compress", tiny, *SMALL, *text)
    assert code == 0, err
    (told,) = [line for line in err.splitlines() if "block" in line]  # one line for all of them
    assert re.fullmatch(r"2 blocks  error 0\.\d{4}, at most 0\.\d{4}  [\d.]+ m?s", told), told
    (folder,) = (at / "runs").iterdir()
    assert folder.name == "0001-optq-tiny"
    assert sorted(p.name for p in folder.iterdir()) == ["compress.json", "model"]
    assert "perplexity" in out
    assert f"fleetune export runs/{folder.name} --to compressed-tensors" in out, (
        "groups of 8 fit no GGUF file"
    )
    master = Master(folder / "model")
    assert master.head.method == "optq"
    assert master.head.settings["group"] == 8
    assert master.head.calibration["windows"] == 4
    base = models.load(tiny)
    assert master.head.base == base.digest
    assert master.head.tokenizer == base.tokenizer_digest
    result = json.loads((folder / "compress.json").read_text())["result"]
    assert result["digest"] == master.digest()
    assert result["before"]["perplexity"] != result["after"]["perplexity"]
    assert 0 < result["error"] < 0.1
    code, out, _ = call(capsys, "compress", tiny, *SMALL, *text, "--json")
    done = events(out)[-1]
    assert (code, done["event"], done["digest"]) == (
        0,
        "done",
        result["digest"],
    )  # the same work, the same bytes
    assert [e["block"] for e in events(out) if e["event"] == "block"] == list(range(len(events(out)) - 2))


def test_the_size_of_a_gguf_file_is_told_beside_that_of_its_plain_numbers(
    at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = gguf_of(at / "base")
    assert main(["compress", str(file), "--method", "rtn", "--set", "group=8"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["weights"]]
    plain = human_bytes(4 * models.load(str(file), device="cpu").n_params)
    assert f"{plain}, {human_bytes(file.stat().st_size)} in its file" in line
    models.save(models.tiny_llama().net, models.tiny_llama().tokenizer, at / "folder")
    assert main(["compress", "folder", "--method", "rtn", "--set", "group=8"]) == 0
    assert "in its file" not in capsys.readouterr().out


def test_a_tuned_run_is_compressed_from_its_ledger(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is compressed is the tuned model: rounding its weights to nearest by hand gives the same artefact."""
    from fleetune import compression
    from fleetune.compression.layerwise import driver
    from fleetune.tuning.result import finished

    quick = ["--limit", "60", "--held-out", "8", "--max-length", "96", "--samples", "0", "--rounds", "1"]
    zo = ["--method", "fedkseed", "--clients", "2", "--set", "tau=4", "--set", "K=16", "--set", "lr=1e-2"]
    assert call(capsys, "tune", tiny, "demo", *quick, *zo)[0] == 0
    code, out, err = call(capsys, "compress", "latest", "--method", "rtn", "--set", "group=8", "--json")
    assert code == 0, err
    done = events(out)[-1]
    run = finished.load(at / "runs" / "latest")
    finished.merge_weights(run)
    parts = driver.run(run, compression.make("rtn", {"group": 8}), None, at / "parts")
    master = Master(Path(done["folder"]) / "model")
    assert master.head.base == models.digest(models.named_tensors(run.net)) != run.digest
    for name, weight in parts.items():
        assert isinstance(weight, Quantised)
        found = master.quantised(name)
        assert found is not None
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scale, weight.scale)
    assert done["before"]["loss"] != done["after"]["loss"]
    assert Path(done["folder"]).name == "0002-rtn-fedkseed-tiny"
    values = {}
    for name in ("latest", "1", "2"):
        code, out, err = call(capsys, "eval", name, "--tasks", "loss", "--json")
        assert code == 0, err
        values[name] = events(out)[-1]["loss"]
    assert values["latest"] == values["2"] != values["1"], "latest is the newer of run and compressed model"
    code, _, err = call(capsys, "compress", "1", *SMALL, "--dtype", "bf16")
    assert (code, "a run has a dtype of its own" in err) == (2, True)
    code, out, _ = call(capsys, "compress", "latest", *SMALL)  # its held-out rows are the calibration text
    assert code == 0
    assert "loss" in out


def test_a_stopped_one_is_taken_up_again(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fleetune.cli.listener.InterruptHandler", pulled_after(10))
        code, _, err = call(capsys, "compress", tiny, *SMALL, "--seed", "7")
    assert code == 130
    assert "fleetune compress --resume runs/0001-optq-tiny" in err
    folder = at / "runs" / "0001-optq-tiny"
    assert [p.name for p in (folder / "parts").glob("block-*")] == ["block-0000.safetensors"]
    assert not (folder / "model").exists()
    code, out, err = call(capsys, "compress", "--resume", "latest", "--json")
    assert code == 0, err
    resumed = events(out)[-1]
    assert resumed["folder"] == "runs/0001-optq-tiny"
    _, out, _ = call(capsys, "compress", tiny, *SMALL, "--seed", "7", "--json")
    assert events(out)[-1]["digest"] == resumed["digest"]


def test_a_layer_that_nothing_reaches_has_no_part_in_the_error(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = HiddenStates.inputs

    def but_one(self: HiddenStates, number: int, linears: Mapping[str, Any], experts: Any) -> Any:
        H, routed = inputs(self, number, linears, experts)
        H.pop("model.layers.1.mlp.up_proj", None)
        return H, routed

    code, out, _ = call(capsys, "compress", tiny, *SMALL, "--json")
    whole = events(out)[-1]["error"]
    monkeypatch.setattr(HiddenStates, "inputs", but_one)
    code, out, err = call(capsys, "compress", tiny, *SMALL, "--json")
    assert code == 0, err
    assert 0 < events(out)[-1]["error"] != whole


def test_a_true_sequential_one_says_so_and_is_taken_up_as_one(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*SMALL, "--text", "text.txt"]
    code, out, err = call(capsys, "compress", tiny, *given, "--json")
    assert code == 0, err
    plain = events(out)[-1]
    with monkeypatch.context() as patch:
        patch.setattr("fleetune.cli.listener.InterruptHandler", pulled_after(10))
        assert call(capsys, "compress", tiny, *given, "--true-sequential")[0] == 130
    code, out, err = call(capsys, "compress", "--resume", "latest", "--json")
    assert code == 0, err
    resumed = events(out)[-1]
    code, out, err = call(capsys, "compress", tiny, *given, "--true-sequential")
    assert code == 0, err
    assert "true sequential" in err
    whole = Master(at / "runs" / "0003-optq-tiny" / "model")
    assert whole.digest() == resumed["digest"] != plain["digest"]
    assert whole.head.calibration["true_sequential"]
    assert resumed["planned"] == plain["planned"]


@pytest.mark.parametrize(
    ("words", "sequential"),
    [
        (["--method", "optq"], False),
        (["--method", "optq", "--true-sequential"], True),
        (["--method", "qronos"], True),
    ],
)
def test_the_start_says_whether_layers_are_solved_in_turn(
    words: list[str], sequential: bool, tiny: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "compress", tiny, *SMALL, *words, "--text", "text.txt", "--json")
    assert code == 0, err
    (start,) = [event for event in events(out) if event["event"] == "start"]
    assert start["true_sequential"] is sequential


@pytest.mark.parametrize("change", ["text", "weights", "settings", "order"])
def test_a_stopped_one_does_not_go_on_with_something_else(
    change: str, tiny: str, at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, at / "mine")
    with monkeypatch.context() as patch:
        patch.setattr("fleetune.cli.listener.InterruptHandler", pulled_after(10))
        assert call(capsys, "compress", "mine", *SMALL, "--text", "text.txt")[0] == 130
    folder = Path("runs/0001-optq-mine")
    if change == "text":
        Path("text.txt").write_text("Another text, of which there is enough as well. " * 30)
    elif change == "weights":
        shutil.rmtree("mine")
        model = models.tiny_llama(seed=5)
        models.save(model.net, model.tokenizer, Path("mine"))
    else:
        record = files.read_json(
            folder / "compress.json", ""
        )  # without its checksum, as earlier versions wrote it
        other: dict[str, Any] = {
            "settings": {"set": {"group": "8", "bits": "3"}},
            "order": {"true_sequential": True},
        }
        (folder / "compress.json").write_text(json.dumps(record | other[change]))
    code, _, err = call(capsys, "compress", "--resume", "latest")
    assert (code, "something has changed since" in err) == (2, True), err
    assert "fleetune compress mine" in err
    assert [p.name for p in (folder / "parts").glob("block-*")] == ["block-0000.safetensors"]


BAD = {
    "no model": (["compress"], 2, "needs a model or a run"),
    "unknown method": (["compress", "{tiny}", "--method", "gptqq"], 2, "no compression method named"),
    "unknown setting": (["compress", "{tiny}", "--set", "bit=4"], 2, "Did you mean 'bits'"),
    "setting without a value": (["compress", "{tiny}", "--set", "bits"], 2, "NAME=VALUE"),
    "a group that divides nothing": (["compress", "{tiny}", "--set", "group=7"], 2, "do not divide"),
    "bits beside a grid that has others": (
        ["compress", "./nothing", "--set", "grid=q6_k", "--set", "bits=4"],
        2,
        "has bits = 6, and bits = 4 is given as well",
    ),
    "a group beside a grid that has another": (
        ["compress", "./nothing", "--method", "rtn", "--set", "grid=q3_k", "--set", "group=32"],
        2,
        "has group = 16, and group = 32 is given as well",
    ),
    "bits as a fraction beside a grid": (
        ["compress", "./nothing", "--set", "grid=q6_k", "--set", "bits=4.0"],
        2,
        "has bits = 6, and bits = 4.0 is given as well",
    ),
    "gradients of windows without a prediction": (
        ["compress", "./nothing", "--length", "1", "--set", "tokens=gradient"],
        2,
        "no gradient by which tokens could count",
    ),
    "a size by gradients of windows without a prediction": (
        ["compress", "./nothing", "--length", "1", "--bpw", "5"],
        2,
        "no gradient by which a size could be spent",
    ),
    "a pattern that makes no sense": (
        ["compress", "{tiny}", "--method", "sparsegpt", "--set", "n=4"],
        2,
        "0 < n < m",
    ),
    "too little text": (["compress", "{tiny}", *SMALL, "--text", "short.txt"], 2, "a window needs 16"),
    "no text file": (["compress", "{tiny}", *SMALL, "--text", "no.txt"], 2, "no text file at no.txt"),
    "rows as text": (["compress", "{tiny}", *SMALL, "--text", "pairs.jsonl"], 2, "try: --data pairs.jsonl"),
    "text as rows": (["compress", "{tiny}", *SMALL, "--data", "text.txt"], 2, "try: --text text.txt"),
    "a binary file as rows": (
        ["compress", "{tiny}", *SMALL, "--data", "binary.dat"],
        2,
        "no reader for '.dat'",
    ),
    "no eval text": (["compress", "{tiny}", *SMALL, "--eval-text", "no.txt"], 2, "no text file at no.txt"),
    "two texts": (["compress", "{tiny}", "--text", "text.txt", "--data", "demo"], 2, "both given"),
    "no windows": (["compress", "{tiny}", "--windows", "0"], 2, "windows = 0 is below 1"),
    "windows beyond the context": (
        ["compress", "{tiny}", "--length", "9999", "--set", "group=8"],
        2,
        "longer than the model's",
    ),
    "rounding in an order": (
        ["compress", "{tiny}", "--method", "rtn", "--set", "group=8", "--true-sequential"],
        2,
        "not calibrated",
    ),
    "a student in an order": (
        ["compress", "{tiny}", "--method", "gkd", "--set", "teacher=same", "--true-sequential"],
        2,
        "solves no layers",
    ),
    "an order that is there": (
        ["compress", "{tiny}", "--method", "qronos", "--set", "group=8", "--true-sequential"],
        2,
        "qronos is true sequential in any case",
    ),
    "a model that is none": (["compress", "./nothing"], 2, "nothing"),
    "an encoder": (["compress", "{bert}"], 2, "an encoder cannot be compressed"),
    "nothing to resume": (["compress", "--resume", "9"], 2, "no compression '9'"),
    "out is a file": (
        ["compress", "{tiny}", *SMALL, "--text", "text.txt", "--out", "text.txt"],
        1,
        "text.txt: it is a file, not a folder",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_clear_error(
    case: str,
    tiny: str,
    at: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    bert = tmp_path_factory.mktemp("bert") / "bert"
    if case == "an encoder":
        model = models.tiny_bert()
        models.save(model.net, model.tokenizer, bert)
    Path("pairs.jsonl").write_text('{"prompt": "say a", "response": "a it is"}\n')
    Path("binary.dat").write_bytes(bytes(range(256)))
    args, code, text = BAD[case]
    found, out, err = call(capsys, *[a.format(tiny=tiny, bert=bert) for a in args])
    assert found == code, err
    assert text in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert out == ""
    assert not list((at / "runs").glob("*")) if (at / "runs").exists() else True


def test_methods_are_listed_with_their_settings(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "compress", "--list", "--json")
    assert code == 0
    listed = {e["name"]: e for e in events(out)}
    assert set(listed) == {"gkd", "llm-pruner", "optq", "qronos", "rtn", "sparsegpt"}
    assert {s["name"] for s in listed["sparsegpt"]["settings"]} >= {"sparsity", "n", "m"}
    code, out, _ = call(capsys, "compress", "--list", "optq")
    assert code == 0
    assert "damping" in out
    assert "sparsity" not in out
    code, _, err = call(capsys, "compress", "--list", "nosuch")
    assert code == 2
    assert "nosuch" in err


def test_a_dry_run_writes_nothing(tiny: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "compress", tiny, *SMALL, "--text", "text.txt", "--dry-run")
    assert code == 0
    assert "nothing was written" in err
    assert not (at / "runs").exists()


def test_runs_lists_and_removes_what_was_compressed(
    tiny: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("rtn", "rtn"):
        assert call(capsys, "compress", tiny, "--method", method, "--set", "group=8")[0] == 0
    (at / "runs" / "0002-rtn-tiny" / "compress.json").write_text(
        json.dumps({"model": tiny, "method": "rtn"})  # as a killed one leaves it
    )
    _, out, _ = call(capsys, "runs", "--json")
    rows = events(out)
    assert [(r["event"], r["name"], r["of"], r["status"]) for r in rows] == [
        ("compressed", "0001-rtn-tiny", "tiny", "done"),
        ("compressed", "0002-rtn-tiny", "tiny", "stopped"),
    ]
    assert rows[0]["bytes"] == sum(p.stat().st_size for p in (at / "runs/0001-rtn-tiny/model").iterdir())
    assert "0002-rtn-tiny" in call(capsys, "runs")[1]
    assert call(capsys, "runs", "rm", "1", "9")[0] == 2
    assert (at / "runs" / "0001-rtn-tiny").is_dir(), "nothing is removed when a name is wrong"
    assert call(capsys, "runs", "rm", "1")[0] == 0
    assert [p.name for p in (at / "runs").iterdir()] == ["0002-rtn-tiny"]


def test_an_unmeasured_quality_is_said(tiny: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, said in (([], True), (["--eval-text", "text.txt"], False)):
        code, out, err = call(capsys, "compress", tiny, *SMALL, "--text", "text.txt", *more)
        assert code == 0, err
        assert ("not measured; fleetune measure runs/0001-optq-tiny --text FILE" in out) == said


def test_the_default_method_is_that_which_changes_the_model_least(tmp_path: Path) -> None:
    """Where devices calibrate it is one that needs no dense model beside the compressed one."""
    from fleetune import compression
    from fleetune.compression.jobs import job

    def method(**options: Any) -> str:
        return job.request_for("tiny", None, {}, options, out=tmp_path).method  # type: ignore[arg-type]

    assert method() == method(calibrate="server") == compression.DEFAULT == "qronos"
    assert method(calibrate="clients") == method(calibrate="fleet") == "optq"
