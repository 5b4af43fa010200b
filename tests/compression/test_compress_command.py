"""`fleetune compress` as a user meets it: a model, a run, Ctrl-C and resume, how far it is from the dense model, what is refused, what needs it."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_harness import LORA, QUICK, ZEROTH, tuned
from pruner_harness import pruner
from pruner_harness import tiny as prunable

from command_line import Capture, Patch, ok, pressed_when, refused
from command_line import call_json as call
from fleetune import compression, models
from fleetune.cli.main import main
from fleetune.common import files
from fleetune.compression.jobs import job
from fleetune.compression.layerwise import driver
from fleetune.data.encode import encode_all
from fleetune.errors import RecipeError
from fleetune.evaluation.losses import text_rows
from fleetune.models import Model
from fleetune.models.artefact import Master
from fleetune.runs import rundir
from fleetune.subject import Compressed
from fleetune.tuning.result import finished

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
    quick = ["--limit", "60", "--held-out", "8", "--max-length", "96", "--samples", "0", "--rounds", "1"]
    zo = ["--method", "fedkseed", "--clients", "2", "--set", "tau=4", "--set", "K=16", "--set", "lr=1e-2"]
    assert call(capsys, "tune", tiny, "demo", *quick, *zo)[0] == 0
    done = ok(capsys, "compress", "latest", "--method", "rtn", "--set", "group=8")[-1]
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
    values = {name: ok(capsys, "eval", name, "--tasks", "loss")[-1]["loss"] for name in ("latest", "1", "2")}
    assert values["latest"] == values["2"] != values["1"], "latest is the newer of run and compressed model"
    assert "loss" in ok(capsys, "compress", "latest", *SMALL)[-1]["after"]


@pytest.mark.parametrize("change", ["", "text", "weights", "settings"])
def test_a_stopped_one_is_taken_up_again_and_does_not_go_on_with_something_else(
    change, tiny, at, capsys, monkeypatch
):
    shutil.copytree(tiny, at / "mine")
    text = ["--text", "text.txt"] if change else []  # else what comes along
    work = ["compress", "mine", *SMALL, *text, "--seed", "7"]
    looks = iter([False] * 32 + [True] * 99)
    with monkeypatch.context() as patch:
        patch.setattr("fleetune.cli.console.InterruptHandler", pressed_when(lambda: next(looks)))
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
    assert "something has changed since" in refused(capsys, "compress", "--resume", "latest")
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

    def method(**options: Any) -> str:
        return job.request_for("tiny", None, {}, options, out=tmp_path).method  # type: ignore[arg-type]

    assert method() == method(calibrate="server") == compression.DEFAULT == "qronos"
    assert method(calibrate="clients") == method(calibrate="fleet") == "optq"


RTN = ["--method", "rtn", "--set", "group=8"]
TEXT = ["--eval-text", "text.txt"]
NAMES = ["kl_divergence", "kl_divergence_error", "same_top", "same_top_error", "kl_tokens"]


def expected(dense: Model, model: Model, rows: Any) -> list[float]:
    """KL divergence and same top token from all logits, in float64."""
    kl, same = list[float](), list[bool]()
    for row in rows:
        ids, first = torch.from_numpy(np.asarray(row.ids, np.int64))[None], max(row.n_prompt, 1) - 1
        with torch.inference_mode():
            P, Q = (m.net(input_ids=ids).logits[0, first:-1].double() for m in (dense, model))
        p, q = P.log_softmax(-1), Q.log_softmax(-1)
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        same += (P.argmax(-1) == Q.argmax(-1)).tolist()
    return [np.mean(kl), np.std(kl, ddof=1) / len(kl) ** 0.5, 100 * np.mean(same), len(kl)]


def stated(values: dict[str, float]) -> list[float]:
    return [values[name] for name in NAMES if name != "same_top_error"]


def close(values: dict[str, float], wanted: list[float]) -> None:
    assert stated(values) == pytest.approx(wanted, rel=1e-3)
    assert values["kl_divergence"] > 0


def test_a_compressed_model_is_compared_with_the_dense_one(tiny: str, at: Path, capsys: Capture) -> None:
    code, told, err = call(capsys, "compress", tiny, *RTN, *TEXT)
    assert code == 0, err
    before, after = told[-1]["before"], told[-1]["after"]
    assert list(before) == ["perplexity", "other_perplexity"]
    assert list(after) == [*before, *NAMES]
    (folder,) = (at / "runs").iterdir()
    dense, texts = models.load(tiny), [(at / "text.txt").read_text()]
    close(after, expected(dense, models.load_artefact(folder / "model"), text_rows(dense, texts)))
    assert json.loads((folder / "compress.json").read_text())["result"]["after"] == after
    assert sorted(p.name for p in folder.iterdir()) == ["compress.json", "model"]
    size = 4 * 264 * after["kl_tokens"] + 128
    assert f"compared on {after['kl_tokens']:,} tokens: {size / 1000:.0f} kB of logits" in err
    for more in ([], ["--low-memory"]):
        _, again, _ = call(capsys, "compress", tiny, *RTN, *TEXT, *more)
        wanted = pytest.approx(stated(after), rel=1e-3) if more else stated(after)
        assert stated(again[-1]["after"]) == wanted


def test_a_run_is_compared_on_rows_that_calibrated_nothing(tiny: str, at: Path, capsys: Capture) -> None:
    tuned(capsys, tiny, LORA)
    told = ok(capsys, "compress", "1", "--windows", "2", "--length", "16", "--set", "group=8")
    folder = Path(told[-1]["folder"])
    dense = finished.load(at / "runs" / "0001-fedit-tiny", offline=True)
    rows = encode_all(Compressed(folder).held_out(offline=True), dense.tokenizer, 128)[0]
    close(told[-1]["after"], expected(dense, models.load_artefact(folder / "model"), rows))


def other_tokens(at: Path) -> str:
    """A model whose tokenizer gives the tokens other numbers."""
    models.tiny_llama().save(at / "other")
    file = at / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[5:7]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))
    for sums in (at / "other").glob("*SUMS"):
        sums.unlink()
    return str(at / "other")


def test_a_reference_with_other_tokens_is_refused_before_a_model_is_loaded(tiny, at, capsys, monkeypatch):
    def no_model(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    other = other_tokens(at)
    monkeypatch.setattr(models, "load", no_model)
    told = refused(capsys, "measure", tiny, "--reference", other, "--text", "text.txt")
    assert "have different tokens" in told
    assert "the model that it was made from" in told


LOSS = ["rows.jsonl", "--tasks", "loss"]


def test_a_compressed_model_is_measured_in_the_type_named(tiny: str, at: Path, capsys: Capture) -> None:
    assert call(capsys, "compress", tiny, *RTN)[0] == 0
    assert call(capsys, "export", "1", "--to", "hf", "--path", "plain")[0] == 0
    losses = {}
    for dtype in ("fp32", "bf16"):
        for subject in ("1", "runs/0001-rtn-tiny/model", "plain"):
            seen = ok(capsys, "eval", subject, *LOSS, "--dtype", dtype, "--device", "cpu")
            losses[subject, dtype] = seen[-1]["loss"]
        assert losses["1", dtype] == losses["runs/0001-rtn-tiny/model", dtype] == losses["plain", dtype]
    assert losses["1", "fp32"] != losses["1", "bf16"]


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("optq", {"bits": 6}, "bits = 6"),
    ("optq", {"grid": "q7_k"}, "one of ggml"),
    ("optq", {"grid": "iq4_nl", "bits": 3}, "16 values"),
    ("rtn", {"grid": "q6_k", "bits": 8}, "codes of 6 bits"),
    ("optq", {"grid": "q2_k", "group": 64}, "groups of 16"),
    ("optq", {"damping": "2"}, "between 0 and 1"),
    ("optq", {"grid": "universal", "bits": 8}, "5 bits at most"),
    ("rtn", {"group": -1}, "below 0"),
    ("sparsegpt", {"sparsity": 1}, "sparsity = 1"),
    ("sparsegpt", {"n": 4, "m": 4}, "0 < n < m"),
    ("sparsegpt", {"n": 2, "m": 64, "bits": 4}, "whole patterns"),
    ("sparsegpt", {"grid": "iq4_nl", "bits": 4}, "has no 0"),
    ("sparsegpt", {"grid": "q6_k", "bits": 4}, "for optq and rtn"),
    ("sparsegpt", {"sparcity": 0.5}, "'sparsity'"),
    ("gkd", {}, "no teacher"),
    ("gkd", {"teacher": "t", "beta": 1.5}, "beta = 1.5"),
    ("gkd", {"teacher": "t", "temperature": 0}, "positive"),
    ("gkd", {"teacher": "t", "clip": -1}, "negative"),
    ("llm-pruner", {"ratio": 1}, "between 0 and 1"),
    ("llm-pruner", {"scope": "all"}, "not one of"),
    ("llm-pruner", {"first": -1}, "below 0"),
    ("llm-pruner", {"dropout": 1}, "shares"),
]
MODELS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"first": 2, "last": 2}, {}, "spare all 4"),
    ({"round_to": 64}, {}, "40 channels"),
    ({"ratio": 0.04}, {}, "takes nothing"),
    ({}, {"kind": "mistral"}, "'mistral'"),
]
REQUESTS = [
    ("", "needs a model"),
    ("m --method gptqq", "gptqq"),
    ("m --set bit=4", "'bits'"),
    ("m --set group=7", "divide"),
    ("./nothing --set grid=q6_k --set bits=4", "bits = 6"),
    ("./nothing --length 1 --bits 5", "gradient"),
    ("m --method optq --set group=8 --text short.txt", "window needs"),
    ("m --text no.txt", "no.txt"),
    ("m --text rows.jsonl", "--data rows.jsonl"),
    ("m --data short.bin", "no reader"),
    ("m --text text.txt --data rows.jsonl", "both given"),
    ("m --windows 0", "below 1"),
    ("m --length 9999 --set group=8", "longer than"),
    ("bert", "encoder"),
    ("--resume 9", "'9'"),
    ("m --bytes 1MB --bits 5", "both say"),
    ("m --bytes 1MB --set bits=5", "chooses bits"),
    ("m --bytes 1MB --method rtn", "rtn does not"),
    ("m --bytes 1MB --method llm-pruner", "leaves floats"),
    ("m --bits 3", "--set bits=3 is one grid"),
    ("m --method rtn --train-scales 5", "takes none"),
    ("m --method sparsegpt --train-scales 5", "no scales"),
    ("m --low-memory --method gkd --set teacher=same --data rows.jsonl", "in memory"),
    ("m --calibrate clients", "only a run"),
    ("m --clients 2", "--calibrate clients"),
    ("m --method gkd --set teacher=same", "needs rows"),
    ("m --method gkd --set teacher=same --text text.txt", "not on plain text"),
    ("m --method gkd --set teacher=same --data rows.jsonl", "learn from itself"),
    ("m --method gkd --set teacher=bert --data rows.jsonl", "encoder"),
    ("m --method gkd --set teacher=./nobody --data rows.jsonl", "nobody"),
    ("m --method gkd --set teacher=same --set keep_layers=2 --data rows.jsonl", "2 of 2 blocks"),
]


@pytest.mark.parametrize(("name", "values", "word"), SETTINGS)
def test_settings_that_make_no_sense_are_refused(name: str, values: dict[str, Any], word: str) -> None:
    with pytest.raises(RecipeError, match=word.replace("(", r"\(")):
        compression.make(name, values)


@pytest.mark.parametrize(("values", "sizes", "word"), MODELS)
def test_models_that_cannot_be_pruned_are_refused(values: dict, sizes: dict, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        pruner(**values).check(prunable(**sizes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("m", models.tiny_llama()), ("bert", models.tiny_bert())):
        models.save(model.net, model.tokenizer, folder / name)
    return folder


@pytest.mark.parametrize(("line", "word"), REQUESTS)
def test_requests_that_make_no_sense_are_refused_before_a_folder_is_made(line, word, saved, at, capsys):
    for name in ("short.txt", "short.bin"):
        (at / name).write_text("A.")
    for name in ("m", "bert"):
        (at / name).symlink_to(saved / name)
    assert main(["compress", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert word in err
    assert "Traceback" not in err
    assert out == ""
    assert not (at / "runs").exists()


GKD = shlex.split(
    "--method gkd --set teacher=same --set keep_layers=2 --set steps=1 --set lmbda=0 --set batch_size=2 --data rows.jsonl --length 64"
)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(models.tiny_llama(layers=3).save(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def made(three: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder."""
    out = tmp_path_factory.mktemp("made")
    assert main(["tune", three, "demo", *QUICK, *ZEROTH, "--out", str(out), "-qq"]) == 0
    return out / "0001-fedkseed-tiny"


def a_run(made: Path) -> None:
    """Copy it as the next one."""
    with rundir.create(Path("runs"), "fedkseed", "tiny") as run:
        shutil.copytree(made, run.path, dirs_exist_ok=True)


def test_a_run_that_something_was_made_from_stays(three: str, made: Path, at: Path, capsys: Capture) -> None:
    a_run(made)
    a_run(made)
    for subject in ("runs/latest", "2"):  # a link that may soon point elsewhere, and a number
        assert call(capsys, "compress", subject, *RTN)[0] == 0
    record = json.loads(Path("runs/0003-rtn-fedkseed-tiny/compress.json").read_text())
    assert record["model"].endswith("runs/0002-fedkseed-tiny")
    err = refused(capsys, "runs", "rm", "latest")
    assert "latest is runs/0004-rtn-fedkseed-tiny now" in err
    assert "fleetune runs rm runs/0004-rtn-fedkseed-tiny" in err
    for names in (["2"], ["1", "2"], ["2", "3"], ["runs/latest"]):
        err = refused(capsys, "runs", "rm", *names)
        assert "is needed by" in err
        assert "runs/0004-rtn-fedkseed-tiny" in err
        assert ("runs/0003-rtn-fedkseed-tiny" in err) == ("3" not in names)
    assert len(list(Path("runs").glob("0*"))) == 4, "nothing is removed when one name is refused"
    assert call(capsys, "runs", "rm", "1", "3")[0] == 0, "nothing needs these"
    assert call(capsys, "runs", "rm", "2", "4")[0] == 0, "with all that needs it"
    assert list(Path("runs").iterdir()) == []
    assert "of runs rm alone" in refused(capsys, "runs", "--force")


def test_a_run_is_recorded_by_its_own_name(made: Path, at: Path, capsys: Capture, monkeypatch: Patch) -> None:
    a_run(made)
    Path("elsewhere").symlink_to("runs/0001-fedkseed-tiny")
    monkeypatch.chdir("runs/0001-fedkseed-tiny")
    whole = at / "runs" / "0001-fedkseed-tiny"
    links = {"../latest": "../0001-fedkseed-tiny", "../../elsewhere": "../../runs/0001-fedkseed-tiny"}
    for name, want in ({".": str(whole)} | links).items():
        told = ok(capsys, "compress", name, *RTN, "--out", "..")
        assert told[0]["model"] == want
        assert told[-1]["folder"].endswith("-rtn-fedkseed-tiny")


def test_plain_results_alone_are_compressed_further(three, made, at, capsys):
    a_run(made)
    assert call(capsys, "compress", "1", *RTN)[0] == 0
    assert call(capsys, "compress", three, *GKD)[0] == 0
    for subject in ("3", "latest", "runs/0003-gkd-tiny/model"):
        told = ok(capsys, "compress", subject, *RTN)
        assert told[0]["model"] == "runs/0003-gkd-tiny/model", subject
        assert not told[0]["run"]
        assert told[-1]["folder"].endswith("-rtn-gkd-tiny")
    of = {e["name"]: e["of"] for e in call(capsys, "runs")[1] if e["event"] == "compressed"}
    assert of["0004-rtn-gkd-tiny"] == "0003-gkd-tiny"
    assert "is needed by runs/0004-rtn-gkd-tiny" in refused(capsys, "runs", "rm", "3")
    ok(capsys, "eval", "4", "rows.jsonl", "--tasks", "loss")
    assert "compressed with rtn" in refused(capsys, "compress", "2", *RTN)
    assert "compressed with rtn" in refused(capsys, "compress", "runs/0004-rtn-gkd-tiny", *RTN)
    a_run(made)
    told = ok(capsys, "compress", "latest", *RTN)
    assert told[0]["model"] == "runs/0007-fedkseed-tiny", "the run is the newer one"
    shutil.rmtree("runs/0003-gkd-tiny/model")
    assert "is not finished" in refused(capsys, "compress", "3", *RTN)


HOLD = """
import sys
from pathlib import Path
from fleetune.runs import rundir
with rundir.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the folder until it is killed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], text=True, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "held\n"
        yield other


def test_a_compression_in_use_is_left_alone(three: str, at: Path, capsys: Capture) -> None:
    assert call(capsys, "compress", three, *RTN)[0] == 0
    folder = Path("runs/0001-rtn-tiny")
    before = sorted(p.name for p in folder.rglob("*"))
    with held_elsewhere(folder) as other:
        for command in (["compress", "--resume", "1"], ["runs", "rm", "1"], ["runs", "rm", "1", "--force"]):
            assert "runs/0001-rtn-tiny is in use by another process" in refused(capsys, *command)
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert call(capsys, "compress", "--resume", "1")[0] == 0
    assert sorted(p.name for p in folder.rglob("*")) == before, "the lock that the kill left is gone"
    assert call(capsys, "runs", "rm", "1")[0] == 0
    assert not folder.exists()
