"""`fleetune compress` as a user meets it: a model, a run, Ctrl-C and resume, and every kind of bad input."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_harness import pulled_after

from command_line import Capture, ok
from command_line import call_json as call
from fleetune import models
from fleetune.cli.main import main
from fleetune.common import files
from fleetune.models.artefact import Master

SMALL = ["--method", "optq", "--windows", "4", "--length", "16", "--set", "group=8"]


def test_a_model_is_compressed_and_measured(tiny: str, at: Path, capsys: Capture) -> None:
    text = ["--text", "text.txt", "--eval-text", "text.txt"]
    assert main(["compress", tiny, *SMALL, *text]) == 0
    out, err = capsys.readouterr()
    (told,) = [line for line in err.splitlines() if "block" in line]  # one line for all of them
    assert re.fullmatch(r"2 blocks  error 0\.\d{4}, at most 0\.\d{4}  [\d.]+ m?s", told), told
    folder = at / "runs" / "0001-optq-tiny"
    assert sorted(p.name for p in folder.iterdir()) == ["compress.json", "model"]
    assert f"fleetune export runs/{folder.name} --to compressed-tensors" in out, "GGUF has no groups of 8"
    master, base = Master(folder / "model"), models.load(tiny)
    assert (master.head.method, master.head.settings["group"]) == ("optq", 8)
    assert master.head.calibration["windows"] == 4
    assert (master.head.base, master.head.tokenizer) == (base.digest, base.tokenizer_digest)
    result = json.loads((folder / "compress.json").read_text())["result"]
    assert result["digest"] == master.digest()
    assert result["before"]["perplexity"] != result["after"]["perplexity"]
    assert 0 < result["error"] < 0.1
    code, events, _ = call(capsys, "compress", tiny, *SMALL, *text)
    # the same bytes
    assert (code, events[-1]["event"], events[-1]["digest"]) == (0, "done", result["digest"])
    assert [e["block"] for e in events if e["event"] == "block"] == [0, 1]


def test_a_tuned_run_is_compressed_from_its_ledger(tiny: str, at: Path, capsys: Capture) -> None:
    """What is compressed is the tuned model: rounding its weights to nearest by hand gives the same artefact."""
    from fleetune import compression
    from fleetune.compression.layerwise import driver
    from fleetune.tuning.result import finished

    quick = ["--limit", "60", "--held-out", "8", "--max-length", "96", "--samples", "0", "--rounds", "1"]
    zo = ["--method", "fedkseed", "--clients", "2", "--set", "tau=4", "--set", "K=16", "--set", "lr=1e-2"]
    assert call(capsys, "tune", tiny, "demo", *quick, *zo)[0] == 0
    out = ok(capsys, "compress", "latest", "--method", "rtn", "--set", "group=8")
    done = out[-1]
    run = finished.load(at / "runs" / "latest")
    finished.merge_weights(run)
    parts = driver.run(run, compression.make("rtn", {"group": 8}), None, at / "parts")
    master = Master(Path(done["folder"]) / "model")
    assert master.head.base == models.digest(models.named_tensors(run.net)) != run.digest
    for name, weight in parts.items():
        found = master.quantised(name)
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scale, weight.scale)
    assert done["before"]["loss"] != done["after"]["loss"]
    assert Path(done["folder"]).name == "0002-rtn-fedkseed-tiny"
    values = {}
    for name in ("latest", "1", "2"):
        out = ok(capsys, "eval", name, "--tasks", "loss")
        values[name] = out[-1]["loss"]
    assert values["latest"] == values["2"] != values["1"], "latest is the newer of run and compressed model"
    out = ok(capsys, "compress", "latest", *SMALL)
    assert "loss" in out[-1]["after"]


@pytest.mark.parametrize("change", ["", "text", "weights", "settings"])
def test_a_stopped_one_is_taken_up_again_and_does_not_go_on_with_something_else(
    change: str, tiny: str, at: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, at / "mine")
    text = ["--text", "text.txt"] if change else []  # else the model writes its own
    work = ["compress", "mine", *SMALL, *text, "--seed", "7"]
    with monkeypatch.context() as patch:
        patch.setattr("fleetune.cli.listener.InterruptHandler", pulled_after(10))
        code, said, _ = call(capsys, *work)
    assert code == 130
    assert "fleetune compress --resume runs/0001-optq-mine" in json.dumps(said[-1])
    folder = Path("runs/0001-optq-mine")
    assert not (folder / "model").exists()
    if not change:
        resumed = ok(capsys, "compress", "--resume", "latest")
        assert resumed[-1]["folder"] == str(folder)
        assert resumed[-1]["digest"] == ok(capsys, *work)[-1]["digest"]
        return
    if change == "text":
        Path("text.txt").write_text("Another text, of which there is enough as well. " * 30)
    elif change == "weights":
        shutil.rmtree("mine")
        models.tiny_llama(seed=5).save(Path("mine"))
    else:
        # without its checksum, as earlier versions wrote it
        record = files.read_json(folder / "compress.json", "")
        (folder / "compress.json").write_text(json.dumps(record | {"set": {"group": "8", "bits": "3"}}))
    code, said, _ = call(capsys, "compress", "--resume", "latest")
    assert code == 2
    assert "something has changed since" in said[-1]["message"]
    assert [p.name for p in (folder / "parts").glob("block-*")] == ["block-0000.safetensors"]


def test_methods_are_listed_with_their_settings(capsys: Capture) -> None:
    listed = ok(capsys, "compress", "--list")
    settings = {e["name"]: {s["name"] for s in e["settings"]} for e in listed}
    assert set(settings) == {"gkd", "llm-pruner", "optq", "qronos", "rtn", "sparsegpt"}
    assert settings["sparsegpt"] >= {"sparsity", "n", "m"}
    code, listed, _ = call(capsys, "compress", "--list", "llm_pruner")
    assert (code, [e["name"] for e in listed]) == (0, ["llm-pruner"])
    assert call(capsys, "compress", "--list", "nosuch")[0] == 2


def test_the_default_method_is_that_which_changes_the_model_least(tmp_path: Path) -> None:
    """Where devices calibrate it is one that needs no dense model beside the compressed one."""
    from fleetune import compression
    from fleetune.compression.jobs import job

    def method(**options: Any) -> str:
        return job.request_for("tiny", None, {}, options, out=tmp_path).method  # type: ignore[arg-type]

    assert method() == method(calibrate="server") == compression.DEFAULT == "qronos"
    assert method(calibrate="clients") == method(calibrate="fleet") == "optq"
