# SPDX-License-Identifier: Apache-2.0
"""Engines: how they are started, chosen and ended, and how many threads they get."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from deploy_harness import tiny
from hypothesis import given
from hypothesis import strategies as st
from serve_harness import Upstream, little_file, lives, running, stand_in, starts

from fleetune import models
from fleetune.common.display import message_text
from fleetune.common.extras import pip_install
from fleetune.deploy import export
from fleetune.deploy.serving import engines, openai_client, threads
from fleetune.deploy.serving.engines import ENGINES, LaunchOptions
from fleetune.errors import FleetuneError, UsageError

LLAMA, XLLAMACPP, TRANSFORMERS = ENGINES
WANTED = LaunchOptions(Path("/models/a b.gguf"), 4711, 3, 2048)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return little_file(tmp_path / "tiny.gguf")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = stand_in(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(folder))
    return folder


# Command lines and choice -----------------------------------------------------------------------------


def test_llama_server_is_told_all_and_the_key_is_in_no_list_of_processes(path):
    line = LLAMA.command(WANTED)
    assert line[0] == str(path / "llama-server")
    assert dict(zip(line[1::2], line[2::2], strict=True)) == {
        "--model": "/models/a b.gguf", "--alias": "a b.gguf", "--host": "127.0.0.1", "--port": "4711",
        "--ctx-size": "2048", "--parallel": "1", "--threads": "3", "--threads-batch": "3",
    }  # fmt: skip


@pytest.mark.parametrize("engine", [XLLAMACPP, TRANSFORMERS])
def test_packages_run_in_a_python_that_reads_no_modules_from_the_folder_it_stands_in(engine):
    assert engine.command(WANTED) == [
        sys.executable, "-P", "-m", "fleetune.deploy.serving.engine_process", engine.name, "/models/a b.gguf", "4711", "3", "2048",
    ]  # fmt: skip


def test_auto_takes_the_first_that_is_installed(path, monkeypatch):
    installed = {"xllamacpp", "fastapi", "uvicorn", "openai", "pydantic", "accelerate"}
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert engines.choose("auto").name == "llama-server"
    (path / "llama-server").unlink()
    assert engines.choose("auto").name == "xllamacpp"
    installed.discard("xllamacpp")
    assert engines.choose("auto").name == "transformers"
    with pytest.raises(UsageError, match="'xllamacpp' is not installed") as refused:
        engines.choose("xllamacpp")
    assert refused.value.hint == pip_install("serve")
    installed.discard("openai")
    with pytest.raises(UsageError, match="no engine is installed"):
        engines.choose("auto")
    with pytest.raises(UsageError, match="'llama-server' is not installed") as refused:
        engines.choose("llama-server")
    assert "PATH" in str(refused.value.hint)
    with pytest.raises(UsageError, match="no engine named 'vllm'"):
        engines.choose("vllm")


# Life and death ---------------------------------------------------------------------------------------


def test_an_engine_lives_as_long_as_the_block_and_takes_its_own_key(path, gguf):
    with engines.started(LLAMA, gguf, 1, 512) as engine:
        (start,) = starts(path)
        assert engine.alive()
        assert engine.healthy()
        assert (start["--host"], start["--ctx-size"], start["magic"]) == ("127.0.0.1", "512", "GGUF")
        body = {"messages": [{"role": "user", "content": "hello"}]}
        assert "".join(openai_client.pieces(engine.address, "/v1/chat/completions", body)) == "1:hello"
        stranger = openai_client.Address(engine.address.host, engine.address.port, "guess")
        with pytest.raises(openai_client.Refused, match="no key"):
            list(openai_client.pieces(stranger, "/v1/chat/completions", body))
        pid = start["pid"]
        assert lives(pid)
    assert not lives(pid)


def test_ports_and_keys_differ(path, gguf):
    with engines.started(LLAMA, gguf, 1, 512) as a, engines.started(LLAMA, gguf, 1, 512) as b:
        assert a.address.port != b.address.port
        assert a.address.key != b.address.key
        assert len(a.address.key) >= 32


def test_an_engine_that_does_not_take_the_model_is_said_with_its_last_words(path, gguf):
    (path / "broken").touch()
    began = time.monotonic()
    with pytest.raises(FleetuneError, match=r"llama-server has ended \(exit code 1\)") as died:
        engines.started(LLAMA, gguf, 1, 512).__enter__()
    assert "tensor 'blk.0' is missing" in str(died.value.hint)
    assert time.monotonic() - began < 10


def test_an_engine_that_cannot_be_started_is_said(path, gguf):
    (path / "llama-server").write_text("#!/no/such/interpreter\n")
    with pytest.raises(FleetuneError, match="cannot be started"):
        engines.started(LLAMA, gguf, 1, 512).__enter__()


def test_an_engine_that_never_gets_ready_is_given_up(path, gguf):
    running = engines.Running(
        LLAMA, LaunchOptions(gguf, 1, 1, 512)
    )  # port 1: it may bind it, we find nothing there
    try:
        running.healthy = lambda: False  # type: ignore[method-assign]
        running.alive = lambda: True  # type: ignore[method-assign]
        with pytest.raises(FleetuneError, match=r"has not loaded .*tiny.gguf within 0 s"):
            running.wait(0.2)
    finally:
        running.stop()


def test_what_an_engine_has_started_ends_with_it_also_what_takes_no_notice(path, gguf):
    (path / "stubborn").touch()
    with engines.started(LLAMA, gguf, 1, 512) as engine:
        child = int(engine.tail().split()[1])
        assert lives(child)
    assert not _soon(lambda: lives(child))


def test_a_second_ctrl_c_while_it_ends_leaves_nothing_behind(path, gguf, monkeypatch):
    (path / "stubborn").touch()
    running = engines.Running(LLAMA, engines.LaunchOptions(gguf, engines._free_port(), 1, 512))
    running.wait()
    child, wait = int(running.tail().split()[1]), running.process.wait

    def interrupted(seconds=None):
        if seconds is not None:
            raise KeyboardInterrupt
        return wait()

    monkeypatch.setattr(running.process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.stop()
    assert not running.alive()
    assert not _soon(lambda: lives(child))


def test_of_what_an_engine_says_the_end_is_kept_and_it_never_waits_for_us(path, gguf):
    (path / "noisy").touch()  # 2 MB
    with engines.started(LLAMA, gguf, 1, 512) as engine:
        (start,) = starts(path)
        assert os.readlink(f"/proc/{start['pid']}/fd/1").startswith("pipe:"), "no file that grows"
        assert not _soon(lambda: engine.tail().splitlines()[-1:] != ["line 199999"])
        assert engine.tail().splitlines() == [f"line {i}" for i in range(199995, 200000)]
        assert len(engine._output.last) == engines.TAIL_BYTES
        engine.process.kill()
        engine.process.wait()
        assert not engine.alive()
        death = engine.exit_error()
    assert "killed by signal 9" in death.message
    assert "line 199999" in str(death.hint)
    assert engine.process.stdout.closed


def test_one_that_says_much_and_dies_is_heard_out(path, gguf):
    (path / "noisy").touch()
    (path / "broken").touch()
    with pytest.raises(FleetuneError, match="exit code 1") as died:
        engines.started(LLAMA, gguf, 1, 512).__enter__()
    told = message_text(str(died.value.hint))
    assert told.endswith("line 199999\n  tensor 'blk.0' is missing"), "lines of their own, none an escape"


def _soon(state):
    """The state, once it is false or a second has gone."""
    for _ in range(100):
        if not state():
            return False
        time.sleep(0.01)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("engine", [XLLAMACPP, TRANSFORMERS], ids=lambda engine: str(engine.name))
def test_a_real_engine_serves_what_was_exported_for_it(engine, tmp_path):
    if not engine.available():
        pytest.skip(f"{engine.name} is not installed")
    model = tiny()
    source = tmp_path / "plain"
    models.save(model.net, model.tokenizer, source)
    if engine.reads == "gguf":
        export.export(source, "gguf", tmp_path / "tiny.gguf")
        source = tmp_path / "tiny.gguf"
    with engines.started(engine, source, 1, 512) as found:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
        assert "".join(openai_client.pieces(found.address, "/v1/chat/completions", body))
        assert threads.speed(found.address) > 0
        request = urllib.request.Request(
            f"http://127.0.0.1:{found.address.port}/v1/models", headers=found.address.headers()
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert json.load(answer)["data"][0]["id"] == source.name
        pid = found.process.pid
        assert lives(pid)
    assert not lives(pid)


# The child of a package -------------------------------------------------------------------------------

XLLAMACPP_STAND_IN = """
import json, sys
class Any_:
    pass
class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = Any_(), Any_(), Any_()
def Server(params):
    def plain(value):
        return {k: plain(v) for k, v in vars(value).items()} if hasattr(value, "__dict__") else (
            sorted(value) if isinstance(value, set) else value)
    print(json.dumps(plain(params)), flush=True)
"""


def test_xllamacpp_is_set_up_and_ends_with_its_parent(tmp_path):
    (tmp_path / "xllamacpp.py").write_text(XLLAMACPP_STAND_IN)
    search = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = XLLAMACPP.command(LaunchOptions(tmp_path / "tiny.gguf", 4711, 3, 2048))
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": search, engines.KEY: "secret"},
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        params = json.loads(process.stdout.readline())
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(20) == 0
    assert params == {
        "model": {"path": str(tmp_path / "tiny.gguf")}, "model_alias": ["tiny.gguf"], "hostnames": ["127.0.0.1"],
        "port": 4711, "api_keys": ["secret"], "n_ctx": 2048, "n_parallel": 1, "cpuparams": {"n_threads": 3},
        "cpuparams_batch": {"n_threads": 3}, "ui": False, "endpoint_slots": False, "cors_origins": "", "verbosity": 2,
    }  # fmt: skip


def test_a_package_that_does_not_take_the_model_ends_with_its_own_error(tmp_path, gguf, monkeypatch):
    (tmp_path / "xllamacpp.py").write_text(
        XLLAMACPP_STAND_IN.replace(
            "    def plain", '    raise RuntimeError("no such architecture")\n    def plain'
        )
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    started = engines.started(XLLAMACPP, gguf, 1, 512)
    with pytest.raises(FleetuneError, match=r"xllamacpp has ended \(exit code 1\)") as caught, started:
        pass
    assert "no such architecture" in (caught.value.hint or "")
    assert "Fatal" not in (caught.value.hint or "")


# Asking -----------------------------------------------------------------------------------------------


def test_an_answer_is_read_piece_by_piece_and_a_break_is_no_end():
    upstream = Upstream()
    upstream.go.clear()
    body = {"messages": []}
    with running(upstream):
        written = openai_client.pieces(upstream.address, "/v1/chat/completions", body)
        assert next(written) == "Par"
        upstream.go.set()
        assert list(written) == ["is", "."]
        assert json.loads(upstream.seen[-1][3]) == {"messages": [], "stream": True}
        upstream.mode = "die"
        written = openai_client.pieces(upstream.address, "/v1/chat/completions", body)
        assert next(written) == "Par"
        with pytest.raises((OSError, openai_client.http.client.HTTPException)):
            next(written)
        upstream.mode = "refuse"
        with pytest.raises(openai_client.Refused, match="the context is full"):
            next(openai_client.pieces(upstream.address, "/v1/chat/completions", body))
        upstream.mode = "plain"
        with pytest.raises(openai_client.Refused, match="HTTP 500: Internal Server Error"):
            next(openai_client.pieces(upstream.address, "/v1/chat/completions", body))


# Threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])])  # fmt: skip
def test_counts_double_up_to_all_cores(cores, counts):
    assert threads.candidates(cores) == counts


@pytest.mark.parametrize(
    ("rates", "best", "tried"),
    [
        ({1: 10.0, 2: 19.0, 4: 30.0, 8: 25.0}, 4, 4),
        ({1: 21.0, 2: 2.5, 4: 100.0}, 1, 2),  # the busy device: stopped at the first that is slower
        ({1: 10.0, 2: 10.4, 4: 10.8}, 1, 2),  # 4 % is noise and somebody else's core
        ({1: 10.0, 2: 10.6}, 2, 2),
        ({1: 7.0}, 1, 1),
    ],
)
def test_the_count_is_raised_while_it_pays(rates, best, tried):
    asked = []

    def rate(count: int) -> float:
        asked.append(count)
        return rates[count]

    chosen, measured = threads.fastest(list(rates), rate)
    assert chosen == best
    assert asked == list(rates)[:tried]
    assert measured == {count: rates[count] for count in asked}


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=8))
def test_every_step_up_was_worth_it(speeds):
    counts = [1 << i for i in range(len(speeds))]
    chosen, measured = threads.fastest(counts, dict(zip(counts, speeds, strict=True)).__getitem__)
    climbed = [measured[count] for count in counts if count <= chosen]
    assert all(b >= threads.GAIN * a for a, b in itertools.pairwise(climbed))
    assert len(measured) in (len(climbed), len(climbed) + 1)


def test_the_speed_is_pieces_over_the_clock_and_a_slow_engine_is_not_heard_out():
    upstream = Upstream()
    upstream.answer = ["x"] * 10
    with running(upstream):
        ticks = iter([100.0, *(100.0 + 0.1 * i for i in range(1, 11)), 102.0])
        assert threads.speed(upstream.address, lambda: next(ticks)) == pytest.approx(10 / 2)
        assert json.loads(upstream.seen[-1][3])["max_tokens"] == threads.TOKENS
        ticks = iter([0.0, 1.0, 2.0, 3.5, 4.0])
        assert threads.speed(upstream.address, lambda: next(ticks)) == pytest.approx(3 / 4)


def test_only_the_cores_that_this_process_may_use_count(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert threads.cores() == 3
