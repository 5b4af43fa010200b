"""The command as a user meets it: help, lists, a whole run, resume, and every kind of bad input."""

import errno
import io
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import call, events, ok, refused
from fleetune import models
from fleetune.cli.main import main
from fleetune.common import files
from fleetune.runs import rundir
from fleetune.seeds import ledger as ledgers
from fleetune.tuning import methods
from fleetune.tuning.methods import fedkseed
from fleetune.tuning.recipe import recipe
from fleetune.tuning.run import describe

QUICK = ["--limit", "60", "--held-out", "8", "--max-length", "96", "--samples", "1", "--answer-tokens", "4"]
ZO = ["--method", "fedkseed", "--clients", "3", "--set", "tau=4", "--set", "K=16", "--set", "lr=1e-3"]


@pytest.mark.parametrize("error", [MemoryError(), OSError("x.so: failed to map segment from shared object")])
def test_a_lack_of_memory_is_told_as_what_does_not_fit(capsys, monkeypatch, error):
    def full(*args: Any) -> None:
        raise error

    monkeypatch.setattr("fleetune.cli.main.chosen_kernels", full)
    code, _, told = call(capsys, "methods")
    assert (code, "not enough memory" in told) == (3, True)
    monkeypatch.setattr("fleetune.cli.main.chosen_kernels", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        main(["methods"])


def test_a_method_by_the_name_of_other_tools_is_shown(capsys):
    code, told, _ = call(capsys, "methods", "lora")
    assert (code, told) == (0, call(capsys, "methods", "fedit")[1])


def test_the_header_has_no_word_that_is_as_usual():
    shown = describe.letters(methods.make("fedit", {"wire": "sign"}), "fedit")
    assert shown == "lr 0.0003 · epochs 1 · batch_size 8 · wire sign · r 16 · alpha 16 · dropout 0.05"


@pytest.mark.parametrize(
    ("has", "more"), [(True, ""), (False, ""), (True, "--dtype bf16"), (True, "--method fedkseed")]
)
def test_bf16_is_offered_where_the_processor_is_faster_in_it(tiny, at, capsys, monkeypatch, has, more):
    monkeypatch.setattr(describe, "LARGE", 1)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": has}, raising=False)
    given = "--method fedit --rounds 1 --clients 1 --set lr=1e-3 " + more
    code, _, told = call(capsys, "tune", tiny, "demo", *QUICK, *given.split())
    assert (code, "faster on this processor" in told) == (0, has and not more)


def test_every_recipe_field_is_a_flag(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{n.replace('_', '-')}" in text for n in recipe.fields() if n not in ("model", "data"))


def test_a_run_from_start_to_ledger(tiny, at, capsys, monkeypatch):
    told = ok(capsys, "tune", tiny, "demo", *ZO, *QUICK, "--rounds", "2")
    kinds = [e["event"] for e in told]
    assert kinds[0] == "start"
    assert kinds[-1] == "done"
    assert kinds.count("client") == 6
    assert kinds.count("round") == 2
    done = told[-1]
    run = Path(done["run"])
    files = "run.toml env.json metrics.jsonl ledger.safetensors eval.json samples.md report.html status"
    assert all((run / name).exists() for name in files.split())
    assert (run / "status").read_text() == "done\n"
    assert not re.search(r"(src|href)\s*=\s*['\"]?(https?:)?//", (run / "report.html").read_text())

    digests = set()
    for threads, backend in ((2, "numba"), (1, "torch")):
        monkeypatch.setenv("FLEETUNE_KERNELS", backend)
        digests.add(ok(capsys, "ledger", "replay", run, "--threads", threads)[-1]["digest"])
    ledger = ledgers.load(run / "ledger.safetensors")
    order = np.random.default_rng(0).permutation(len(ledger))
    columns = (column[order] for column in (ledger.ids, ledger.coefficients, ledger.rounds))
    ledgers.Ledger(ledger.head, *columns).save(at / "shuffled.safetensors")
    digests.add(ok(capsys, "ledger", "replay", at / "shuffled.safetensors", "--model", tiny)[-1]["digest"])
    assert digests == {done["digest"]}


def test_bad_clients_do_not_stop_a_round(tiny, at, capsys):
    weather = ["--drop", "0.3", "--stragglers", "0.5", "--deadline", "3", "--clients", "12"]
    told = ok(capsys, "tune", tiny, "demo", *ZO, *QUICK, *weather, "--rounds", "2")
    statuses = [e["status"] for e in told if e["event"] == "client"]
    assert set(statuses) == {"ok", "dropped", "late"}
    assert all(e["reason"] for e in told if e["event"] == "client" and e["status"] != "ok")


def broken(monkeypatch: pytest.MonkeyPatch, *clients: int, error: BaseException | None = None) -> None:
    """These clients' work ends in an error of their own."""
    local = fedkseed.Method.local

    def failing(self: Any, model: Any, payload: Any, batches: Any, key: int, memory: Any) -> Any:
        if batches.client in clients:
            raise error or IndexError(f"client {batches.client} is broken")
        return local(self, model, payload, batches, key, memory)

    monkeypatch.setattr(fedkseed.Method, "local", failing)


def test_an_objective_that_ends_the_process_is_an_error_of_the_recipe(tiny, at, capsys):
    (at / "now.py").write_text("import sys\ndef f(model, batch):\n    sys.exit(0)\n")
    err = refused(capsys, "tune", tiny, "demo", *ZO, *QUICK, "--set", f"objective={at}/now.py:f")
    assert "it ended the process, SystemExit: 0" in err


@pytest.mark.parametrize("value", [0, None])
def test_a_method_that_ends_the_process_is_no_success(value, tiny, at, capsys, monkeypatch):
    def ends(self: Any, model: Any, key: int) -> Any:
        raise SystemExit(value)

    monkeypatch.setattr(fedkseed.Method, "init", ends)
    code, out, err = call(capsys, "tune", tiny, "demo", *ZO, *QUICK)
    assert (code, out) == (1, "")
    assert f"the command was not finished: it ended the process, SystemExit: {value}" in err
    assert rundir.status_of(next(at.glob("runs/0*"))).startswith("failed: it ended the process")


def test_a_round_whose_only_client_fails_leaves_the_model_and_the_run_goes_on(tiny, at, capsys, monkeypatch):
    broken(monkeypatch, 1)
    args = [tiny, "demo", *ZO, *QUICK, "--participation", "0.3", "--rounds", "8", "--json"]
    code, out, _ = call(capsys, "tune", *args)
    assert code == 0
    told = [e for e in events(out) if e["event"] == "client"]
    assert {(e["client"], e["status"]) for e in told} == {(0, "ok"), (1, "failed"), (2, "ok")}
    reasons = {e["reason"].partition(" (test_tune.py:")[0] for e in told}
    assert reasons == {"", "IndexError: client 1 is broken"}
    loss = {e["round"]: e["loss"] for e in events(out) if e["event"] == "eval"}
    for e in told:
        assert (loss[e["round"]] == loss[e["round"] - 1]) == (e["status"] == "failed")

    real = rundir.RunDir.checkpoint
    stop = next(e["round"] for e in told if e["status"] == "failed")

    def checkpoint(self: rundir.RunDir, round: int, payload: Any) -> None:
        if round == stop:
            raise KeyboardInterrupt
        real(self, round, payload)

    monkeypatch.setattr(rundir.RunDir, "checkpoint", checkpoint)
    code, said, _ = call(capsys, "tune", *args, "--out", "stopped")
    assert code == 130
    assert events(said)[-1]["hint"] == "fleetune tune --resume stopped/0001-fedkseed-tiny", "stopped at once"
    monkeypatch.setattr(rundir.RunDir, "checkpoint", real)
    _, resumed, _ = call(capsys, "tune", "--resume", "latest", "--out", "stopped", "--json")
    assert events(resumed)[-1]["digest"] == events(out)[-1]["digest"]


@pytest.mark.parametrize(
    ("rounds", "said"), [(8, "3 rounds in a row; the first of round 3"), (1, "1 round in a ")]
)
def test_a_fleet_that_cannot_work_ends_the_run(tiny, at, capsys, monkeypatch, rounds, said):
    broken(monkeypatch, 0, 1, 2)
    err = refused(capsys, "tune", tiny, "demo", *ZO, *QUICK, "--rounds", rounds, code=4)
    assert f"every client failed, {said}" in err
    assert "IndexError" in err
    assert rundir.checkpoints(at / "runs" / "latest")[-1][0] == min(3, rounds) - 1
    call(capsys, "tune", "--resume", "latest")  # gets further: the same rounds do not stop it for ever
    assert rounds == 1 or rundir.checkpoints(at / "runs" / "latest")[-1][0] == 4


@pytest.fixture(scope="module")
def whole(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run that nothing stops."""
    folder = str(tmp_path_factory.mktemp("whole"))
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
        assert main(["tune", tiny, "demo", *ZO, *QUICK, "--rounds", "8", "--out", folder, "--json"]) == 0
    return str(events(out.getvalue())[-1]["digest"])


def started(tiny: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fleetune", "tune", tiny, "demo", *ZO, *QUICK, "--rounds", "8", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_round(folder: Path, least: int) -> None:
    for _ in range(6000):  # a busy machine takes its time
        found = list(folder.glob("runs/0001-*/checkpoints/round-*.ckpt"))
        if any(int(p.stem[-6:]) >= least for p in found):
            return
        time.sleep(0.05)
    raise AssertionError("the run did not start")


def test_ctrl_c_says_how_to_resume_and_the_bits_are_the_same(tiny, at, capsys, whole):
    process = started(tiny)
    wait_for_round(at, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "fleetune tune --resume runs/0001-" in err
    assert "Traceback" not in err
    assert (at / "runs" / "latest" / "status").read_text() == "interrupted\n"
    assert ok(capsys, "tune", "--resume", "latest")[-1]["digest"] == whole
    lines = [json.loads(x) for x in (at / "runs" / "latest" / "metrics.jsonl").read_text().splitlines()]
    assert [e["round"] for e in lines if e["event"] == "round"] == list(range(1, 9))


@pytest.mark.faults
def test_kill_9_then_resume_gives_the_same_bits(tiny, at, capsys, whole):
    process = started(tiny)
    wait_for_round(at, 3)
    process.kill()
    process.communicate()
    assert ok(capsys, "tune", "--resume", "latest")[-1]["digest"] == whole
    code, _, err = call(capsys, "tune", "--resume", "latest")
    assert code == 0
    assert "finished already" in err


BAD = {  # command line: exit code, words of the error
    "tune {tiny}": (2, "data is missing"),
    "tune {tiny} rowz.jsonl": (2, "rows.jsonl"),
    "tune {tiny} broken.jsonl": (2, "broken.jsonl:2"),
    "tune {tiny} demo --method fedkseeed": (2, "Did you mean 'fedkseed'"),
    "tune {tiny} demo --set K=1000": (2, "try K=512 or K=1024"),
    "tune {tiny} demo --model other": (2, "two values of model"),
    "tune rows.jsonl {tiny}": (2, "MODEL and DATA are swapped"),
    "tune -c typo.toml": (2, "Did you mean 'rounds'"),
    "tune -c rows.jsonl": (2, "is not TOML"),
    "tune -c nosuch.toml": (2, "no recipe at"),
    "tune {tiny} demo --participation 1.5": (2, "participation"),
    "tune {tiny} demo --partition dirichlet:0:category": (2, "alpha"),
    "tune {tiny} demo --partition column:nosuch": (2, "columns beside texts"),
    "tune {tiny} demo --clients 5000": (2, "no rows for a client"),
    "tune ./folder demo": (2, "config.json"),
    "tune no/such-model demo --offline": (2, "no/such-model"),
    "tune --resume 77": (2, "no run '77'"),
    "tune --resume latest --rounds 3": (2, "no run 'latest'"),
    "ledger show rows.jsonl": (1, "not a ledger"),
    "eval {tiny} rows.jsonl --tasks los": (2, "did you mean 'loss'"),
    "tune {tiny} demo --out rows.jsonl": (1, "cannot write"),
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_a_clear_error_and_leaves_nothing_behind(line, tiny, at, capsys):
    row = '{"instruction": "a", "response": "b"}\n'
    (at / "rows.jsonl").write_text(row * 40)
    (at / "broken.jsonl").write_text(row + "{not json\n")
    (at / "typo.toml").write_text('model = "x"\ndata = "y"\nroundz = 3\n')
    (at / "folder").mkdir()
    before = sorted(at.rglob("*"))
    code, text = BAD[line]
    found, out, err = call(capsys, *line.format(tiny=tiny).split())
    assert (found, out) == (code, ""), err
    assert text in err
    assert re.search(r"^error: ", err, re.MULTILINE)
    assert "Traceback" not in err
    assert sorted(p for p in at.rglob("*") if p.name != "runs") == before


@pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
def test_a_data_file_whose_name_is_not_utf_8_is_refused_before_a_folder_is_made(tiny, at, capsys):
    name = "d\udcff.jsonl"
    (at / name).write_text('{"instruction": "a", "response": "b"}\n' * 20)
    err = refused(capsys, "tune", tiny, name, *ZO, *QUICK, "--rounds", "1")
    assert "is not text in UTF-8" in err
    assert not (at / "runs").exists()


def test_a_full_disk_ends_the_run_and_loses_nothing(tiny, at, capsys, monkeypatch):
    real = files.write_atomic

    def full(path: Path, data: bytes | str, *, mode: int | None = None) -> None:
        if path.name == "round-000002.ckpt":
            raise files.storage_error(OSError(errno.ENOSPC, "No space left on device"), path)
        real(path, data, mode=mode)

    monkeypatch.setattr(files, "write_atomic", full)
    err = refused(capsys, "tune", tiny, "demo", *ZO, *QUICK, "--rounds", "3", code=1)
    assert "the disk is full" in err
    assert "free some space, then: fleetune tune --resume runs/0001" in err.replace(str(at) + "/", "")
    assert "Traceback" not in err
    monkeypatch.setattr(files, "write_atomic", real)
    resumed = ok(capsys, "tune", "--resume", "latest")[-1]["digest"]
    whole = ok(capsys, "tune", tiny, "demo", *ZO, *QUICK, "--rounds", "3", "--out", "whole")
    assert whole[-1]["digest"] == resumed


def test_a_read_only_folder_is_said_before_any_work(tiny, at, capsys, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        # root may write anywhere, so the system is asked to refuse
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(rundir.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(models, "load", refuse)
    err = refused(capsys, "tune", tiny, "demo", *ZO, code=1)
    assert "read-only" in err
    assert "can write to" in err


ODD = "m\x1b]0;title\x07\x1b[31m\nerror: all is lost\u2028"


@pytest.mark.parametrize(
    "words",
    [["patch", "apply", "{odd}.gguf", "{odd}"], ["tune", "{odd}.gguf", "demo"], ["runs", "show", "{odd}"]],
)
def test_the_name_of_a_file_drives_no_terminal(words, at, capsys):
    Path(f"{ODD}.gguf").write_bytes(b"none")
    code, out, err = call(capsys, *(word.format(odd=ODD) for word in words))
    assert code in (1, 2)
    assert not [line for line in (out + err).splitlines() if line.startswith("error: all is lost")]
    assert set("\x1b\x07\u2028") & set(out + err) == set()
    assert "\\x1b]0;title\\x07" in err


def test_the_log_of_a_name_drives_no_terminal(at):
    program = (
        "import logging, sys\nfrom fleetune.cli import main\nmain.main(['methods', '-q'])\n"
        "logging.getLogger('fleetune').warning('lost %s', sys.argv[1])"
    )
    said = subprocess.run([sys.executable, "-c", program, ODD], capture_output=True, text=True, check=True)
    assert "WARNING: lost m\\x1b]0;title\\x07\\x1b[31m\\nerror: all is lost\\u2028\n" in said.stderr
