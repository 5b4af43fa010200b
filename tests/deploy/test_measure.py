"""`fleetune measure` as a user types it: a compressed run with its kept gain, other subjects, exports, bad input."""

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_harness import QUICK, tiny

from command_line import Capture, Patch, ok
from command_line import call_json as call
from fleetune import compression, models
from fleetune.cli.main import main
from fleetune.common import files
from fleetune.common.display import pip_install
from fleetune.compression.jobs import inputs, solve
from fleetune.compression.layerwise import driver
from fleetune.data.encode import encode_all
from fleetune.deploy import harness, llamacpp
from fleetune.deploy.export import size_beside
from fleetune.evaluation.losses import response_loss
from fleetune.models.artefact import Master
from fleetune.runs import compression_folder, rundir
from fleetune.runs.listener import Silent
from fleetune.subject import Compressed
from fleetune.tuning.result import finished

RUN = [*shlex.split("--method fedit --set r=2 --set lr=1e-2"), *QUICK]
TEXT = ["--text", "text.txt", "--length", "64"]
FAST = ["--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1", "--offline"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, a run of it, the run compressed, and that as a file."""
    at = tmp_path_factory.mktemp("work")
    (at / "text.txt").write_text("The heron stood still in the shallow water, and the evening went on. " * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        tiny().save(at / "little")
        assert main(["tune", "little", "demo", *RUN, "--offline", "-qq"]) == 0
        assert (
            main(["compress", "latest", "--windows", "4", "--length", "32", "--set", "grid=ggml", "-qq"]) == 0
        )
        assert main(["export", "latest", "-qq"]) == 0
        yield at


@pytest.fixture
def at(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy to work in, where models are measured in this process."""
    shutil.copytree(made, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(harness, "measured", harness.carry_out)
    before = torch.get_num_threads()
    yield tmp_path / "work"
    torch.set_num_threads(before)


def folder_of(at: Path) -> Path:
    (folder,) = at.glob("runs/*/compress.json")
    return folder.parent


def test_the_kept_gain_of_a_compressed_run(at: Path, capsys: Capture) -> None:
    folder = folder_of(at)
    code, told, err = call(capsys, "measure", "latest", "--kept-gain", *TEXT, *FAST)
    assert code == 0, err
    rows = {row["name"]: row for row in told[-1]["rows"]}
    names = ["base", "tuned", "compressed", "compressed base"]
    file = [f"{folder.name}.gguf"] if llamacpp.available() else []
    assert list(rows) == [*names[:3], *file, names[3]]
    record = json.loads((folder / "compress.json").read_text())["result"]
    assert rows["tuned"]["loss"] == pytest.approx(record["before"]["loss"], rel=1e-5)
    assert rows["compressed"]["loss"] == pytest.approx(record["after"]["loss"], rel=1e-5)
    base = models.load("little")
    held = encode_all(Compressed(folder).held_out(offline=True), base.tokenizer, 160)[0]
    assert rows["base"]["loss"] == pytest.approx(response_loss(base, held), rel=1e-5)
    b, t, c, cb = (rows[name]["loss"] for name in names)
    assert t < b
    value = (c - cb) / (t - b)
    assert told[-1]["kept"]["loss"]["value"] == pytest.approx(value)
    assert list(told[-1]["kept"]) == ["loss"]  # the text is nothing that was tuned for
    assert rows["compressed"]["bits_linear"] == 4.75
    assert rows["base"]["bits"] == 32
    assert rows["tuned"]["bytes"] > rows["base"]["bytes"]  # the adapter comes on top
    assert rows["compressed base"]["prefill"] is None
    assert all(row["perplexity"] > 1 and row["peak_rss"] > 5e7 for row in rows.values())
    for name in file:
        assert rows[name]["engine"] == "llama.cpp"
        assert rows[name]["bits_linear"] == 4.5
        assert rows[name]["loss"] == pytest.approx(c, rel=0.01)  # its embedding is Q8_0
    kept_down = json.loads((folder / harness.FILE).read_text())
    assert kept_down["kept"]["loss"]["value"] == pytest.approx(value)
    assert "compressed the same way" in err


def test_the_base_is_compressed_on_the_run_s_own_windows(at: Path) -> None:
    """By hand: the run's rows as tokens, and the text that comes along; the solver on the base, with these windows."""
    folder = folder_of(at)
    shutil.rmtree(folder / "base", ignore_errors=True)
    path = solve.compressed_base(Silent(), folder, size_beside, offline=True)
    own, base = Master(folder / "model").head, models.load("little")
    rows = encode_all(_calibrated_on(folder), base.tokenizer, 160)[0]
    text = inputs.of_package(base, 32, 2)[0]
    windows = torch.cat([driver.windows([row.ids for row in rows], 32, 2), text])
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    told = {"windows": len(windows), "length": 32, "sha256": digest}
    assert told == own.calibration == Master(path).head.calibration
    parts = driver.run(base, compression.make(compression.DEFAULT, {}), windows, at / "parts")
    for name, weight in parts.items():
        found = Master(path).quantised(name)
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scale, weight.scale)
    assert not (folder / "base" / "parts").exists()
    before = (path / "master.safetensors").stat().st_mtime_ns
    assert solve.compressed_base(Silent(), folder, size_beside, offline=True) == path
    assert (path / "master.safetensors").stat().st_mtime_ns == before  # made once


def _calibrated_on(folder: Path) -> Any:
    return finished.held_out(Path(compression_folder.request_of(folder).model), offline=True)[::2]


def test_a_base_of_other_windows_is_refused(at: Path, capsys: Capture) -> None:
    folder = folder_of(at)
    shutil.rmtree(folder / "base", ignore_errors=True)
    record = files.read_json(folder / "compress.json", "")
    (folder / "compress.json").write_text(files.json_text({**record, "windows": 2}))
    code, told, _ = call(capsys, "measure", str(folder), "--kept-gain", *FAST)
    assert code == 2
    assert "is not what" in told[-1]["message"]
    assert not (folder / "base").exists()


def test_several_subjects_have_a_line_each(at: Path, capsys: Capture) -> None:
    folder, run = folder_of(at), rundir.find("1", at / "runs")
    asked = ["--data", "demo", "--limit", "2"]
    told = ok(capsys, "measure", "little", str(run), str(folder), str(folder / "model"), *FAST, *asked)
    rows = told[-1]["rows"]
    files = [f"{folder.name}.gguf"] if llamacpp.available() else []
    assert [row["name"] for row in rows] == ["little", run.name, folder.name, *files, "model"]
    assert all("loss" in row for row in rows)
    assert rows[-1]["loss"] == rows[2]["loss"]


def test_a_compressed_model_and_its_file_are_compared_with_the_tuned_one(at: Path, capsys: Capture) -> None:
    """Without a text on the rows: the number that `compress` stated; the tuned model is the reference, in every engine."""
    folder = folder_of(at)
    code, told, err = call(capsys, "measure", "2", *FAST)
    assert code == 0, err
    rows = {row["name"]: row for row in told[-1]["rows"]}
    after = json.loads((folder / "compress.json").read_text())["result"]["after"]
    names = [name for name in after if name.startswith(("kl_", "same_"))]
    assert names == ["kl_divergence", "kl_divergence_error", "same_top", "same_top_error", "kl_tokens"]
    assert {n: rows["compressed"][n] for n in names} == pytest.approx({n: after[n] for n in names}, rel=1e-3)
    assert not any(name in rows[model] for model in ("base", "tuned") for name in names)
    if llamacpp.available():
        file = rows[f"{folder.name}.gguf"]
        assert file["engine"] == "llama.cpp"
        assert file["kl_tokens"] == after["kl_tokens"]
        # its embedding is Q8_0
        assert after["kl_divergence"] < file["kl_divergence"] < 4 * after["kl_divergence"]
    assert f"tuned in torch is the reference: {after['kl_tokens']:,} tokens" in err
    assert f"compressed in torch: validation loss {rows['compressed']['loss']:.3f} (" in err
    assert json.loads((folder / harness.FILE).read_text())["reference"] == "runs/0001-fedit-little"


def test_every_model_is_compared_with_a_reference_that_is_named(at: Path, capsys: Capture) -> None:
    folder = folder_of(at)
    text = [*TEXT, "--windows", "3", *FAST]
    told = ok(capsys, "measure", "little", "2", "--reference", "little", *text)
    base, small = told[-1]["rows"][:2]
    assert (base["name"], base["kl_divergence"], base["same_top"]) == ("little", 0.0, 100.0)
    assert base["kl_tokens"] == small["kl_tokens"] == 3 * 63
    told = ok(capsys, "measure", str(folder), "--reference", "1", *text)
    rows = {row["name"]: row for row in told[-1]["rows"]}
    kl = {name: row["kl_divergence"] for name, row in rows.items()}
    assert kl["tuned"] < 1e-9 < kl["compressed"] < small["kl_divergence"]
    assert kl["base"] == pytest.approx(small["kl_divergence"], rel=0.5)
    assert main(["measure", "2", *text]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[-6:] == ["KL", "divergence", "same", "top", "token,", "%"]
    (line,) = [line for line in out if line.startswith(" compressed")]
    assert line.count("±") == 3  # of the loss as well


def test_a_file_is_run_by_torch_and_by_its_engine(at: Path, capsys: Capture, monkeypatch: Patch) -> None:
    file = next(folder_of(at).glob("*.gguf"))
    shutil.copy(file, "a.gguf")
    told = ok(capsys, "measure", "a.gguf", *TEXT, *FAST)
    rows = told[-1]["rows"]
    assert [row["engine"] for row in rows] == (["torch", "llama.cpp"] if llamacpp.available() else ["torch"])
    assert rows[0]["bytes"] == Path("a.gguf").stat().st_size
    assert rows[-1]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=0.01)
    monkeypatch.setattr(llamacpp, "MODULE", "no_such_engine")
    code, told, err = call(capsys, "measure", "a.gguf", *TEXT, *FAST)
    assert (code, len(told[-1]["rows"])) == (0, 1)
    assert pip_install("llamacpp") in err


def test_an_export_is_run_where_it_is_for(at: Path, capsys: Capture) -> None:
    words = models.load("little").tokenizer
    count = len(words(Path("text.txt").read_text())["input_ids"])
    for to in ("hf", "gguf:f32"):
        place = "b.gguf" if to == "gguf:f32" else to
        told = ok(capsys, "export", "2", "--to", to, "--path", place, "--text", "text.txt")
        found = told[-1]
        assert found["event"] == "check"
        if to == "hf" or llamacpp.available():
            assert found["runtime"] == ("transformers" if to == "hf" else "llama.cpp")
            assert found["ratio"] == pytest.approx(1, rel=1e-3)
            assert found["tokens"] == count - -(-count // 512)  # the first token of each window is context
    code, told, _ = call(capsys, "export", "1", "--to", "hf", "--path", "of-run", "--text", "text.txt")
    assert (code, told[-1]["runtime"]) == (0, "transformers")
    assert told[-1]["ratio"] == pytest.approx(1, rel=1e-5)


BAD = {
    "a text of one token": (["measure", "little", "--text", "one.txt"], "1 tokens: nothing to predict"),
    "a text of nothing": (["measure", "little", "--text", "empty.txt"], "has no rows"),
    "no threads": (["measure", "little", "--threads", "0"], "threads = 0"),
    "a kept gain of a model": (["measure", "little", "--kept-gain"], "compressed run's folder"),
    "windows beyond the model": (["measure", "little", "--text", "text.txt", "--length", "4096"], "made for"),
    "an export's text that is none": (["export", "2", "--to", "hf", "--text", "no.txt"], "no text file"),
    "an adapter's perplexity": (["export", "1", "--to", "gguf:lora", "--text", "text.txt"], "adapter alone"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_clear_error(case: str, at: Path, capsys: Capture) -> None:
    args, text = BAD[case]
    Path("one.txt").write_text("a")
    Path("empty.txt").touch()
    before = sorted(at.rglob("*"))
    code = main(args)
    out, err = capsys.readouterr()
    assert code == 2, err
    assert text in err
    assert out == ""
    assert sorted(at.rglob("*")) == before
