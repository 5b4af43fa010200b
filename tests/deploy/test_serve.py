"""`fleetune serve` and `fleetune chat` as a user meets them: an engine is started, asked, and ended with the command."""

import dataclasses
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from deploy_harness import compressed, tiny
from serve_harness import little_file, lives, stand_in, starts

import fleetune
from command_line import FEW, Capture, Patch, call, refused
from fleetune import models
from fleetune.common.display import pip_install
from fleetune.deploy import export
from fleetune.deploy import serve as serving_module
from fleetune.deploy.serve import KEY, Options, Refused, Session, choose
from fleetune.errors import FleetuneError, UsageError

CHAT = ["chat", "tiny.gguf", "--threads", "1"]


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with a llama-server on the PATH."""
    stand_in(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.chdir(tmp_path)
    little_file(tmp_path / "tiny.gguf")
    return tmp_path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, model = tmp_path_factory.mktemp("models") / "plain", tiny()
    models.save(model.net, model.tokenizer, path)
    return path


def test_engines_are_told_all_but_the_key(at: Path) -> None:
    asked, file = Options("llama-server", 3, 2048, port=4711, key="secret"), Path("/models/a b.gguf")
    line = serving_module._command(file, asked)
    assert line[0] == str(at / "bin" / "llama-server")
    want = ["--model", "/models/a b.gguf", "--alias", "a b.gguf", "--host", "127.0.0.1", "--port", "4711"]
    want += ["--ctx-size", "2048", "--threads", "3"]
    assert sorted(zip(line[1::2], line[2::2], strict=True)) == sorted(zip(want[::2], want[1::2], strict=True))
    line = serving_module._command(file, dataclasses.replace(asked, engine="xllamacpp"))
    assert line[:4] == [sys.executable, "-P", "-m", "fleetune.deploy.serve"]
    assert line[4:] == ["/models/a b.gguf", "127.0.0.1", "4711", "2048", "3"]


def test_auto_takes_the_first_that_is_installed(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(at / "bin"))
    installed = {"xllamacpp"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert choose("auto") == "llama-server"
    (at / "bin" / "llama-server").unlink()
    assert choose("auto") == "xllamacpp"
    installed.clear()
    for name in ("auto", "xllamacpp"):
        with pytest.raises(UsageError, match="is installed") as refused:
            choose(name)
        assert str(refused.value.hint).startswith(pip_install("serve"))


def test_an_engine_that_ends_is_said_with_its_last_words(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (at / "bin" / "broken").touch()
    with pytest.raises(FleetuneError, match=r"has ended \(exit code 1\)") as said, fleetune.chat("tiny.gguf"):
        pass
    assert said.value.hint == "its last words: tensor 'blk.0' is missing"
    (at / "bin" / "llama-server").write_text("no program")
    with pytest.raises(FleetuneError, match="llama-server cannot be started"), fleetune.chat("tiny.gguf"):
        pass
    (at / "bin" / "llama-server").write_text("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(Session.load, "__defaults__", (0.2,))
    with pytest.raises(FleetuneError, match=r"not loaded .*tiny\.gguf in 0 s"), fleetune.chat("tiny.gguf"):
        pass


@pytest.mark.slow
def test_the_engine_of_the_wheel_serves_and_answers(plain: Path) -> None:
    pytest.importorskip("xllamacpp")
    asked: dict[str, Any] = {"engine": "xllamacpp", "threads": 1, "context": 512}
    with fleetune.serve(plain, port=0, **asked) as session:
        assert lives(session.process.pid)
    assert not lives(session.process.pid)
    with fleetune.chat(plain, max_tokens=8, **asked) as talk:
        assert talk.say("hello") == talk.turns[-1]["content"] != ""


def _hearing() -> None:
    """Signals as in a terminal, also where these tests run in the background of a script, which ignores some."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def serving(*args: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command in a process of its own, and its event `serving`."""
    command = [sys.executable, "-m", "fleetune", "serve", *args, "--port", "0", "--json"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    how: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    process = subprocess.Popen(command, preexec_fn=_hearing, **how)
    with process:
        try:
            event: dict[str, Any] = {}
            while event.get("event") != "serving":
                event = json.loads(process.stdout.readline())
            yield process, event
        finally:
            process.kill()


def ask(url: str, words: str, key: str = "") -> bytes:
    body = {"messages": [{"role": "user", "content": words}], "stream": True}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: bytes = answer.read()
        return found


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 130), (signal.SIGHUP, 130)])
def test_serve_answers_until_it_is_told_to_end_and_leaves_nothing(sent: int, code: int, at: Path) -> None:
    with serving("tiny.gguf", "--context", "512") as (process, event):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", event["url"])
        assert (event["model"], event["engine"]) == ("tiny.gguf", "llama-server")
        assert b'"content": "hello"' in ask(event["url"], "hello")
        (start,) = starts(at / "bin")
        assert (start["--ctx-size"], start["key"], "--threads" in start) == ("512", "", False)
        process.send_signal(sent)
        assert process.wait(20) == code
        assert not lives(start["pid"])


def test_serve_ends_with_an_error_when_the_engine_does(at: Path) -> None:
    with serving("tiny.gguf") as (process, _):
        os.kill(starts(at / "bin")[0]["pid"], signal.SIGKILL)
        assert process.wait(20) == 1
        assert "llama-server has ended (signal 9)" in json.loads(process.stdout.readlines()[-1])["message"]


def test_a_key_is_passed_on_and_made_off_this_machine(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fleetune.serve("tiny.gguf", port=0, key="mine") as session:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(session.url, "hello")
        assert b"hello" in ask(session.url, "hello", "mine")
    with fleetune.serve("tiny.gguf", port=0, host="0.0.0.0") as session:
        assert len(made := session.options.key or "") >= 32
        assert b"hello" in ask(f"http://127.0.0.1:{session.options.port}", "hello", made)
    monkeypatch.setenv(KEY, "of-the-environment")
    with fleetune.serve("tiny.gguf", port=0) as session:
        assert b"hello" in ask(session.url, "hello", "of-the-environment")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    with fleetune.chat("tiny.gguf") as talk:
        assert talk.say("hello") == "1:hello"
    *_, serving, chatting = starts(at / "bin")
    assert chatting["key"] not in ("", "of-the-environment")
    assert (serving["spins"], chatting["spins"]) == ("1000", "7")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nothing.gguf"], "there is no file or directory 'nothing.gguf'"),
        (["cut.gguf"], "cut.gguf is cut off: it has"),
        (["lora.gguf"], "lora.gguf is an adapter, not a model"),
        (["tiny.gguf", "--threads", "0"], "--threads 0 is below 1"),
        (["tiny.gguf", "--context", "3"], "--context 3 is below 64"),
        (["tiny.gguf", "--port", "99999"], "cannot listen on 127.0.0.1:99999"),
        (["tiny.gguf", "--engine", "xllamacpp"], "no 'xllamacpp' is installed"),
    ],
)
def test_serve_refuses_at_once(args: list, said: str, at: Path, capsys: Capture, monkeypatch: Patch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else real(name))
    Path("cut.gguf").write_bytes(Path("tiny.gguf").read_bytes()[:-1])
    little_file(Path("lora.gguf"), "adapter")
    assert said in refused(capsys, "serve", "--port", "0", *args)
    assert not (at / "bin" / "started").exists()


def served(model: object) -> dict[str, Any]:
    """How the engine is started for a model, whose file is gone afterwards where it was made for the session."""
    with fleetune.chat(model) as talk:
        assert talk.say("hello") == "1:hello"
    return starts(Path("bin"))[-1]


def test_a_plain_model_is_exported_for_the_session(at: Path, plain: Path) -> None:
    start = served(plain)
    assert (start["magic"], start["--alias"]) == ("GGUF", "plain.gguf")
    assert not Path(start["--model"]).exists()
    assert not list(plain.glob("*.gguf"))


def test_a_compressed_model_is_exported_and_an_export_that_is_there_is_taken(at: Path, plain: Path) -> None:
    folder = fleetune.compress(plain, method="rtn", settings={"group": 32, "grid": "symmetric"}).folder
    for subject in ("latest", folder / "model"):
        start = served(subject)
        assert (start["--alias"], start["magic"]) == (f"{folder.name}.gguf", "GGUF")
        assert not Path(start["--model"]).exists()
    export.write(folder / "model", "gguf", folder / "kept.gguf")
    assert served("latest")["--model"] == str((folder / "kept.gguf").resolve())


def test_codes_that_gguf_has_no_blocks_for_are_served_in_fp32(at: Path, capsys: Capture) -> None:
    compressed(tiny(), at / "four", group=4)
    code, out, err = call(capsys, "chat", str(at / "four"), "--prompt", "hello")
    assert (code, out) == (0, "1:hello\n"), err
    assert err.startswith(f"loading {at / 'four'}\n")
    assert "--to gguf:f32" in err


def test_a_finished_run_is_served_and_its_adapter_is_no_model(at: Path, plain: Path) -> None:
    fleetune.tune(plain, "demo", method="fedit", settings={"lr": 0.05}, limit=24, max_length=64, **FEW)
    start = served("latest")
    assert start["magic"] == "GGUF"
    assert start["--alias"].startswith("0001-fedit")
    fleetune.export("1", to="gguf:lora")
    assert fleetune.export("1", path="elsewhere.gguf").done.to == "gguf"  # as its name says
    assert list(Path("runs").glob("0001-*/*.gguf"))
    assert served("1")["--alias"] == start["--alias"]


def test_chat_answers_once_to_a_prompt_or_a_pipe(at: Path, capsys: Capture, monkeypatch: Patch) -> None:
    assert call(capsys, *CHAT, "--prompt", "hello")[:2] == (0, "1:hello\n")
    args = ["--system", "s", "--temperature", "1.5", "--seed", "7", "--max-tokens", "9", "--prompt", "hello"]
    assert call(capsys, *CHAT, *args)[:2] == (0, "2:hello\n")
    body = json.loads((at / "bin" / "body").read_text())
    wanted = {"temperature": 1.5, "seed": 7, "max_tokens": 9, "model": "tiny.gguf"}
    assert {key: body[key] for key in wanted} == wanted
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    assert call(capsys, *CHAT)[:2] == (0, "1:two\nlines\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    code, _, err = call(capsys, *CHAT)
    assert (code, "the prompt is empty" in err) == (2, True)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--prompt", "too long"], 1, "error: no room"),
        (["--prompt", "die"], 1, "the engine llama-server has ended (exit code 9)"),
        (["--prompt", "x", "--max-tokens", "0"], 2, "--max-tokens 0 is below 1"),
        (["--prompt", "x", "--temperature", "-1"], 2, "not in 0..2"),
    ],
)
def test_what_has_no_answer_is_an_error(args: list, code: int, said: str, at: Path, capsys: Capture) -> None:
    found, _, err = call(capsys, *CHAT, *args)
    assert (found, said in err) == (code, True), err
    assert not any(lives(start["pid"]) for start in (starts(at / "bin") if code == 1 else []))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sit at a terminal and type lines, then Ctrl-D; an exception in a line's place is raised."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def sit(*said: str | BaseException) -> None:
        lines = [*said, EOFError()]

        def type_(prompt: str = "") -> str:
            if isinstance(line := lines.pop(0), BaseException):
                raise line
            return line

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", type_)

    return sit


def test_chat_remembers_and_forgets(at: Path, capsys: Capture, typed: Callable[..., None]) -> None:
    typed("a", "", "b", "too long", "/help", "/new", "c", "/exit", "never")
    code, out, err = call(capsys, *CHAT, "--system", "s")
    assert (code, out) == (0, "2:a\n4:b\n2:c\n")
    assert err.count("/exit or Ctrl-D") == 2
    assert "the engine refuses: no room" in err
    typed("a", KeyboardInterrupt())
    assert call(capsys, *CHAT)[:2] == (0, "1:a\n\n")
    typed("a", "b")
    out = call(capsys, *CHAT, "--json")[1]
    found = [json.loads(line) for line in out.splitlines()]
    assert {e["event"] for e in found} == {"answer"}
    assert [(e["prompt"], e["text"]) for e in found] == [("a", "1:a"), ("b", "3:b")]
    assert not any(lives(start["pid"]) for start in starts(at / "bin"))


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(at: Path) -> None:
    with fleetune.chat("tiny.gguf", system="s") as talk:
        written = talk.pieces("a")
        assert next(written) == "2"
        written.close()
        assert [turn["content"] for turn in talk.turns] == ["s", "a", "2"]
        before = list(talk.turns)
        with pytest.raises(Refused):
            talk.say("too long")
        assert talk.turns == before
        talk.restart()
        assert talk.turns == [{"role": "system", "content": "s"}]
