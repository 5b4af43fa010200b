# SPDX-License-Identifier: Apache-2.0
"""`fleetune serve` and `fleetune chat` as a user meets them: an engine behind them, what they serve, how they end."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_harness import compressed, tiny
from serve_harness import Upstream, little_file, lives, running, stand_in, starts

from fleetune import models
from fleetune.cli import engine_flags
from fleetune.cli.commands import chat
from fleetune.cli.main import main
from fleetune.common.display import clean
from fleetune.data import Example
from fleetune.data.encode import prompt_ids
from fleetune.deploy import export
from fleetune.deploy.serving import engines, threads, torch_chat
from fleetune.deploy.serving.openai_client import Refused
from fleetune.evaluation import answers
from fleetune.evaluation.losses import context_length
from fleetune.models import Model
from fleetune.runs.listener import Silent
from fleetune.tuning import finished

CORES = threads.cores  # the tests stand in for it

PATH = os.environ["PATH"]


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with a llama-server on the PATH, and two cores."""
    stand_in(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{PATH}")
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.chdir(tmp_path)
    little_file(tmp_path / "tiny.gguf")
    return tmp_path


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


@pytest.fixture(scope="module")
def plain(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "plain"
    models.save(model.net, model.tokenizer, path)
    return path


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


# serve ------------------------------------------------------------------------------------------------


def _hearing() -> None:
    """Signals as in a terminal, also where these tests run in the background of a script, which ignores some."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def serving(*args: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command in a process of its own, and its event `serving`."""
    command = [sys.executable, "-m", "fleetune", "serve", *args, "--port", "0", "--json"]
    search = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": search},
        preexec_fn=_hearing,
    )  # fmt: skip
    with process:
        try:
            assert process.stdout is not None
            event: dict[str, Any] = {}
            while event.get("event") != "serving":
                event = json.loads(process.stdout.readline())
            yield process, event
        finally:
            process.kill()


def ask(url: str, words: str, token: str = "") -> bytes:
    body = {"messages": [{"role": "user", "content": words}], "stream": True}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: bytes = answer.read()
        return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_answers_until_it_is_told_to_end_and_leaves_nothing_behind(number, at):
    with serving("tiny.gguf", "--threads", "1", "--context", "512") as (process, event):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", event["url"])
        assert {k: event[k] for k in ("model", "engine", "threads")} == {
            "model": "tiny.gguf", "engine": "llama-server", "threads": 1,
        }  # fmt: skip
        assert "token" not in event
        assert b'"content": "hello"' in ask(event["url"], "hello")
        with urllib.request.urlopen(event["url"] + "/", timeout=20) as page:
            assert b"Fleetune chat" in page.read()
        (start,) = starts(at / "bin")
        assert start["--ctx-size"] == "512"
        assert lives(start["pid"])
        process.send_signal(number)
        assert process.wait(20) == 0
        assert not lives(start["pid"])


def test_an_engine_does_not_outlive_a_fleetune_that_is_killed(at):
    with serving("tiny.gguf", "--threads", "1") as (process, _):
        (start,) = starts(at / "bin")
        assert lives(start["pid"])
        process.kill()
        process.wait()
        end = time.monotonic() + 10
        while lives(start["pid"]) and time.monotonic() < end:
            time.sleep(0.02)
        assert not lives(start["pid"])


def test_a_signal_that_is_ignored_stays_so_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with engine_flags.exit_on_signals(0):
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_serve_ends_with_a_clear_error_when_the_engine_dies_also_in_a_request(at):
    with serving("tiny.gguf", "--threads", "1") as (process, event):
        pid = starts(at / "bin")[0]["pid"]
        waiting = subprocess.Popen(
            [sys.executable, "-c", ASK, event["url"]], stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        with waiting:
            assert waiting.stdout is not None
            assert waiting.stdout.readline() == "asking\n"
            time.sleep(0.3)
            os.kill(pid, signal.SIGKILL)
            status, body = waiting.communicate(timeout=20)[0].split(" ", 1)
        assert status == "502"
        assert json.loads(body)["error"]["code"] == "engine_down"
        assert process.wait(20) == 1
        assert process.stdout is not None
        error = json.loads(process.stdout.readlines()[-1])
        assert error["event"] == "error"
        assert "llama-server has ended (killed by signal 9)" in error["message"]


ASK = """
import json, sys, urllib.request, urllib.error
print("asking", flush=True)
body = {"messages": [{"role": "user", "content": "wait"}]}
request = urllib.request.Request(sys.argv[1] + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
try:
    urllib.request.urlopen(request, timeout=30)
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
"""


def test_serve_off_loopback_makes_a_token_and_asks_for_it(at):
    with serving("tiny.gguf", "--threads", "1", "--host", "0.0.0.0") as (_, event):
        assert len(event["token"]) >= 32
        url = f"http://127.0.0.1:{event['url'].rpartition(':')[2]}"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(url, "hello")
        assert b"hello" in ask(url, "hello", event["token"])


def test_serve_takes_a_token_from_the_environment_and_does_not_show_it(at, monkeypatch):
    monkeypatch.setenv("FLEETUNE_TOKEN", "from-the-environment")
    with serving("tiny.gguf", "--threads", "1") as (_, event):
        assert "token" not in event
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(event["url"], "hello")
        assert b"hello" in ask(event["url"], "hello", "from-the-environment")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing.gguf"], "there is no file or directory 'nothing.gguf'"),
        (["./nowhere"], "there is no file or directory './nowhere'"),
        (["text.gguf"], "text.gguf is not a GGUF file"),
        (["cut.gguf"], "cut.gguf is cut off: it has"),
        (["lora.gguf"], "lora.gguf is an adapter, not a model"),
        (["tiny.gguf", "--threads", "0"], "--threads 0 is below 1"),
        (["tiny.gguf", "--context", "3"], "--context 3 is below 64"),
        (["tiny.gguf", "--token", ""], "the token is empty"),
        (["tiny.gguf", "--token", "two words"], "without spaces"),
        (["tiny.gguf", "--port", "99999"], "there is no port 99999"),
        (["tiny.gguf", "--engine", "transformers"], "the engine 'transformers' is not installed"),
    ],
)
def test_serve_refuses_before_an_engine_is_started(args, message, at, capsys, monkeypatch):
    monkeypatch.setattr(engines, "_installed", lambda *modules: False)
    Path("text.gguf").write_text("no model")
    Path("cut.gguf").write_bytes(Path("tiny.gguf").read_bytes()[:-1])
    little_file(Path("lora.gguf"), "adapter")
    code, _, err = call(capsys, "serve", "--port", "0", *args)
    assert code == 2
    assert message in err
    assert not (at / "bin" / "started").exists()


def test_serve_says_that_a_port_is_in_use_before_an_engine_is_started(at, capsys):
    upstream = Upstream()
    with running(upstream):
        code, _, err = call(capsys, "serve", "tiny.gguf", "--port", str(upstream.server_port))
    assert code == 2
    assert f"port {upstream.server_port} is in use" in err
    assert not (at / "bin" / "started").exists()


# What is served ---------------------------------------------------------------------------------------


def test_threads_are_measured_and_the_fastest_are_kept(at, capsys):
    code, out, err = call(capsys, "chat", "tiny.gguf", "--prompt", "hello", "--json")
    assert code == 0
    assert [start["--threads"] for start in starts(at / "bin")] == ["1", "2", "1"]
    measured, answer = [json.loads(line) for line in out.splitlines()]
    assert (measured["event"], measured["chosen"]) == ("threads", 1)
    rates = measured["tokens_per_second"]
    assert rates["1"] > 1.5 * rates["2"] > 0  # the stand-in sleeps twice as long with two
    assert "measured: 2 threads" in err
    assert err.index("trying up to 2 threads") < err.index("measured: 1 thread")
    assert answer["text"] == "1:hello"
    assert not any(lives(start["pid"]) for start in starts(at / "bin"))


def test_an_engine_that_dies_while_it_is_measured_is_said(at, capsys):
    (at / "bin" / "mortal").touch()
    code, _, err = call(capsys, "chat", "tiny.gguf", "--prompt", "hello")
    assert code == 1
    assert "the engine llama-server has ended (exit code 9)" in err
    assert "out of memory" in err


def test_a_plain_model_is_exported_for_the_session(at, plain, capsys):
    assert call(capsys, "chat", str(plain), "--prompt", "hello", "--threads", "1")[:2] == (0, "1:hello\n")
    (start,) = starts(at / "bin")
    assert (start["magic"], start["--alias"]) == ("GGUF", "plain.gguf")
    assert not Path(start["--model"]).exists()  # gone with the session
    assert not list(plain.glob("*.gguf"))


def test_a_compressed_model_is_exported_and_an_export_that_is_there_is_taken(at, model, capsys):
    folder = Path("runs") / "0003-rtn-tiny"
    compressed(tiny(), folder / "model")
    work = {"model": "tiny", "run": False, "method": "rtn", "set": {}, "data": "", "text": "", "windows": 1,
            "length": 8, "eval_text": "", "seed": 1, "dtype": "fp32"}  # fmt: skip
    (folder / "compress.json").write_text(json.dumps({"v": 1, **work}))
    for subject in ("latest", "3", str(folder), str(folder / "model")):
        assert call(capsys, "chat", subject, "--prompt", "hello", "--threads", "1")[0] == 0
    seen = starts(at / "bin")
    assert {start["--alias"] for start in seen} == {"0003-rtn-tiny.gguf"}
    assert {start["magic"] for start in seen} == {"GGUF"}
    assert not any(Path(start["--model"]).exists() for start in seen)
    export.export(folder / "model", "gguf", folder / "kept.gguf")
    assert call(capsys, "chat", "latest", "--prompt", "hello", "--threads", "1")[0] == 0
    assert starts(at / "bin")[-1]["--model"] == str(folder / "kept.gguf")


def test_codes_that_gguf_has_no_blocks_for_are_served_in_fp32(at, capsys):
    compressed(tiny(), at / "four", group=4)
    code, out, err = call(capsys, "chat", str(at / "four"), "--prompt", "hello", "--threads", "1")
    assert (code, out) == (0, "1:hello\n"), err
    assert "GGUF has no blocks that hold these codes exactly" in err
    assert "to keep it: fleetune export" in err
    assert "--to gguf:f32" in err


def test_a_file_that_gets_no_template_from_an_engine_is_said(at, capsys):
    raw = Path("tiny.gguf").read_bytes()
    Path("mute.gguf").write_bytes(raw.replace(b"tokenizer.chat_template", b"tokenizer.chat_templatf"))
    for name, said in (("tiny.gguf", False), ("mute.gguf", True)):
        code, _, err = call(capsys, "chat", name, "--prompt", "hello", "--threads", "1")
        assert (code, "has no chat template" in err) == (0, said)


def test_a_finished_run_is_served_and_asked_as_it_was_tuned(at, plain, capsys):
    tune = [
        "tune",
        str(plain),
        "demo",
        "--method",
        "fedit",
        "--clients",
        "2",
        "--rounds",
        "1",
        "--limit",
        "24",
    ]
    tune += [
        "--held-out",
        "4",
        "--max-length",
        "64",
        "--samples",
        "1",
        "--answer-tokens",
        "4",
        "--set",
        "lr=0.05",
    ]
    assert call(capsys, *tune)[0] == 0
    for subject in ("latest", "1"):
        assert call(capsys, "chat", subject, "--prompt", "hello", "--threads", "1")[:2] == (0, "1:hello\n")
    start = starts(at / "bin")[-1]
    assert start["magic"] == "GGUF"
    assert start["--alias"].startswith("0001-fedit")
    assert (
        call(capsys, "export", "1", "--to", "gguf:lora")[0] == 0
    )  # lies in the run's folder, and is no model
    assert list(Path("runs").glob("0001-*/*.gguf"))
    assert call(capsys, "chat", "1", "--prompt", "hello", "--threads", "1")[0] == 0
    assert starts(at / "bin")[-1]["--alias"] == start["--alias"]
    args = ["--engine", "torch", "--threads", "1", "--prompt", "hello", "--max-tokens", "12"]
    code, told, _ = call(capsys, "chat", "latest", *args)
    (run,) = Path("runs").glob("0001-*")
    (wanted,) = answers.generate(
        finished.load(run, device="cpu"), [Example((("user", "hello"),), "", {})], max_new_tokens=12
    )
    assert (code, told) == (0, clean(wanted) + "\n")
    assert call(capsys, "chat", str(plain), *args)[1] != told


def test_a_number_without_a_run_is_no_model(at, capsys):
    code, _, err = call(capsys, "serve", "7", "--port", "0", "--threads", "1")
    assert code == 2
    assert "no run '7'" in err


# chat -------------------------------------------------------------------------------------------------

CHAT = ["chat", "tiny.gguf", "--threads", "1"]


def test_chat_answers_once_to_a_prompt_or_a_pipe(at, capsys, monkeypatch):
    assert call(capsys, *CHAT, "--prompt", "hello")[:2] == (0, "1:hello\n")
    assert call(capsys, *CHAT, "--prompt", "hello", "--system", "Be short.")[:2] == (0, "2:hello\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    assert call(capsys, *CHAT)[:2] == (0, "1:two\nlines\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    code, _, err = call(capsys, *CHAT)
    assert (code, "the prompt is empty" in err) == (2, True)


def test_an_engine_is_told_the_seed_and_the_other_numbers(at, capsys):
    args = ["--temperature", "1.5", "--seed", "7", "--max-tokens", "9", "--prompt", "hello"]
    assert call(capsys, *CHAT, *args)[0] == 0
    found = json.loads((at / "bin" / "body").read_text())
    assert {key: found[key] for key in ("temperature", "seed", "max_tokens")} == {
        "temperature": 1.5, "seed": 7, "max_tokens": 9,
    }  # fmt: skip


def test_chat_ends_with_the_engines_refusal(at, capsys):
    code, _, err = call(capsys, *CHAT, "--prompt", "too long")
    assert (code, "error: no room" in err) == (1, True)


class Terminal(io.StringIO):
    """A standard input that is a terminal, at which lines are typed; an exception in a line's place is raised."""

    def __init__(self, *said: str | BaseException) -> None:
        super().__init__()
        self.said = list(said)

    def isatty(self) -> bool:
        return True

    def type(self, prompt: str = "") -> str:
        next_ = self.said.pop(0) if self.said else EOFError()
        if isinstance(next_, BaseException):
            raise next_
        return next_


@pytest.fixture
def terminal(monkeypatch):
    def sit(*said: str | BaseException) -> Terminal:
        made = Terminal(*said)
        monkeypatch.setattr(sys, "stdin", made)
        monkeypatch.setattr("builtins.input", made.type)
        return made

    return sit


def test_chat_remembers_and_forgets(at, capsys, terminal):
    terminal("a", "", "b", "/help", "/new", "c", "/exit", "never")
    code, out, err = call(capsys, *CHAT, "--system", "s")
    assert (code, out) == (0, "2:a\n4:b\n2:c\n")
    assert err.count("/exit or Ctrl-D") == 2
    terminal("a")  # then Ctrl-D
    assert call(capsys, *CHAT)[:2] == (0, "1:a\n\n")
    terminal("a", KeyboardInterrupt())
    assert call(capsys, *CHAT)[:2] == (0, "1:a\n\n")
    assert not any(lives(start["pid"]) for start in starts(at / "bin"))


def test_a_conversation_in_json_is_an_event_a_turn_and_nothing_else(at, capsys, terminal, monkeypatch):
    prompts = []
    made = terminal("a", "too long", "b", "/exit")
    real = made.type
    monkeypatch.setattr("builtins.input", lambda prompt="": prompts.append(prompt) or real())
    code, out, err = call(capsys, *CHAT, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert [(e["event"], e["prompt"], e["text"]) for e in found] == [
        ("answer", "a", "1:a"),
        ("answer", "b", "3:b"),
    ]
    assert all(0 <= e["seconds"] < 60 for e in found)
    assert (code, prompts) == (0, [""] * 4)  # `input` writes its prompt to stdout
    assert err.count("> ") == 4


def test_what_the_engine_refuses_is_left_out_of_the_conversation(at, capsys, terminal):
    terminal("a", "too long", "b")
    code, out, err = call(capsys, *CHAT)
    assert (code, out) == (0, "1:a\n\n3:b\n\n")
    assert "the engine refuses: no room" in err


def test_ctrl_c_stops_an_answer_and_keeps_what_came(capsys):
    closed = []

    def answer(turns):
        try:
            yield "one"
            raise KeyboardInterrupt
        finally:
            closed.append(len(turns))

    from fleetune.cli.console import Ui

    turns = chat._exchange(Ui(), answer, [{"role": "user", "content": "count"}])
    assert turns[1:] == [{"role": "assistant", "content": "one"}]
    assert capsys.readouterr().out == "one (stopped)\n"
    assert closed == [1]


def test_chat_that_is_terminated_leaves_no_engine_behind(at):
    command = [sys.executable, "-m", "fleetune", *CHAT, "--prompt", "wait"]
    search = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": search}) as process:
        end = time.monotonic() + 20
        while not (at / "bin" / "asked").exists() and time.monotonic() < end:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(20) == 143
    assert not lives(starts(at / "bin")[0]["pid"])


def test_chat_ends_when_the_engine_does(at, capsys, terminal, monkeypatch):
    made = terminal("a", "b")
    real = made.type

    def type_(prompt: str = "") -> str:
        if len(made.said) == 1:
            os.kill(starts(at / "bin")[0]["pid"], signal.SIGKILL)
        return real(prompt)

    monkeypatch.setattr("builtins.input", type_)
    code, out, err = call(capsys, *CHAT)
    assert (code, out) == (1, "1:a\n")
    assert "the engine llama-server has ended (killed by signal 9)" in err


# torch ------------------------------------------------------------------------------------------------


def test_torch_answers_as_eval_does(at, plain, model, capsys, monkeypatch):
    example = Example((("system", "Be short."), ("user", "hello")), "", {})
    (wanted,) = answers.generate(model, [example], max_new_tokens=12)
    monkeypatch.setenv("PATH", "")  # no engine is installed
    monkeypatch.setattr(engines, "_installed", lambda *modules: False)
    args = ["chat", str(plain), "--prompt", "hello", "--system", "Be short.", "--max-tokens", "12"]
    code, out, err = call(capsys, *args, "--threads", "1")
    assert (code, out) == (0, clean(wanted) + "\n")
    assert len(wanted) > 3
    assert "no engine is installed, so torch answers, which is slower" in err
    code, out, _ = call(capsys, *args, "--threads", "1", "--json")
    assert json.loads(out)["text"] == wanted
    code, out, err = call(capsys, *args)
    assert (code, out) == (0, clean(wanted) + "\n")
    assert "measured: 1 thread, " in err


def test_measuring_threads_is_bounded_in_time(model, monkeypatch):
    """Threads that wait for each other may take seconds a token."""
    ids = [np.arange(5, 9, dtype=np.int32)]
    how = {"temperature": 1.0, "max_new_tokens": 16, "seed": 0}
    (whole,) = answers.sample_from_ids(model, ids, **how)
    (cut,) = answers.sample_from_ids(model, ids, **how, seconds=0.0)
    assert len(whole) > 2
    assert cut.tolist() == whole[:1].tolist()
    given = []
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(answers, "sample_from_ids", lambda *a, **k: given.append(k.get("seconds")) or [whole])
    torch_chat.use_threads(model, None, Silent())
    assert given[1] == threads.SECONDS


@pytest.mark.parametrize(("asked", "most"), [("1", 1), ("999", 999), ("0", 999), ("many", 999), ("", 999)])
def test_threads_are_no_more_than_the_environment_allows(asked, most, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    found = CORES()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert found == min(most, CORES())


def test_torch_cuts_no_conversation_and_refuses_one_without_room_for_an_answer(model):
    longest = context_length(model)
    few, many = ([{"role": "user", "content": "ab " * n}] for n in (longest // 5, longest))
    ids = prompt_ids(Example((("user", few[0]["content"]),), "", {}), model.tokenizer, longest)
    assert longest // 2 < len(ids) < longest
    (wanted,) = answers.generate_from_ids(model, [ids], max_new_tokens=longest - len(ids))
    assert torch_chat.generate(model, few, temperature=0, max_tokens=longest, seed=0) == wanted
    with pytest.raises(Refused, match=rf"tokens, the model is made for {longest:,}"):
        torch_chat.generate(model, many, temperature=0, max_tokens=1, seed=0)


def test_torch_refuses_a_long_prompt_before_it_measures_threads(at, plain, capsys):
    code, _, err = call(capsys, "chat", str(plain), "--engine", "torch", "--prompt", "ab " * 2000)
    assert code == 1
    assert "tokens, the model is made for 1,024" in err
    assert "try: ask something shorter" in err
    assert "measured" not in err


def test_torch_draws_with_its_seed_above_temperature_0(at, plain, capsys):
    args = [
        "chat",
        str(plain),
        "--engine",
        "torch",
        "--threads",
        "1",
        "--prompt",
        "hello",
        "--max-tokens",
        "12",
    ]
    found = [call(capsys, *args, "--temperature", "1.5", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert found[0] == found[1] != found[2]


def test_torch_answers_from_a_gguf_and_a_compressed_model(at, model, capsys, monkeypatch):
    monkeypatch.setenv("FLEETUNE_HOME", str(at / "cache"))
    on_grid = tiny()
    compressed(on_grid, Path("small"))
    export.export(Path("small"), "gguf", Path("small.gguf"))
    (wanted,) = answers.generate(on_grid, [Example((("user", "hello"),), "", {})], max_new_tokens=8)
    args = ["--engine", "torch", "--threads", "1", "--prompt", "hello", "--max-tokens", "8"]
    assert call(capsys, "chat", "small", *args)[:2] == (0, clean(wanted) + "\n")
    assert (
        call(capsys, "chat", "small.gguf", *args)[0] == 0
    )  # its embedding is rounded to 8 bits, so another text


def test_torch_says_that_an_encoder_does_not_write(at, capsys):
    encoder = models.tiny_bert()
    models.save(encoder.net, encoder.tokenizer, Path("encoder"))
    code, _, err = call(capsys, "chat", "encoder", "--engine", "torch", "--threads", "1", "--prompt", "hello")
    assert code == 2
    assert "encoder" in err


@pytest.mark.parametrize(("args", "message"), [(["--max-tokens", "0"], "below 1"), (["--temperature", "-1"], "not in 0..2"), (["--temperature", "nan"], "not in 0..2")])  # fmt: skip
def test_chat_refuses_numbers_that_mean_nothing(args, message, at, capsys):
    code, _, err = call(capsys, *CHAT, "--prompt", "hello", *args)
    assert (code, message in err) == (2, True)
    assert not (at / "bin" / "started").exists()
