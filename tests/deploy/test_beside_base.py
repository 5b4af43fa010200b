# SPDX-License-Identifier: Apache-2.0
"""Two models behind one endpoint: a request goes to the one that it names; and what the base of a subject is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serve_harness import Upstream, ask, door, little_file, lives, running, stand_in, starts

from fleetune import api
from fleetune.cli.commands import chat
from fleetune.cli.main import build_parser
from fleetune.common.display import human_bytes
from fleetune.deploy.serving import session
from fleetune.deploy.serving.engine_site import EngineSite
from fleetune.deploy.serving.front import Front, listening
from fleetune.errors import UsageError
from fleetune.runs.listener import Silent
from fleetune.subject import Compressed, Plain, Run
from fleetune.tuning import recipe as recipes

CHAT = "/v1/chat/completions"


@contextmanager
def pair(tuned: Upstream, base: Upstream, token: str = "") -> Iterator[Front]:
    """A front before two engines."""
    site = EngineSite()
    site.beside(base.address, ("tiny.gguf", "base.gguf"))
    site.attach(tuned.address, lambda: True)
    with running(tuned), running(base), listening("127.0.0.1", 0, token, site) as front:
        yield front


def said(front: Front, body: object) -> str:
    status, _, answer = ask(front, "POST", CHAT, json.dumps(body).encode())
    assert status == 200
    return str(json.loads(answer)["choices"][0]["message"]["content"])


def test_a_request_goes_to_the_model_that_it_names() -> None:
    tuned, base = Upstream(), Upstream()
    base.answer = ["of ", "the base"]
    messages = [{"role": "user", "content": "hello"}]
    with pair(tuned, base) as front:
        assert said(front, {"model": "tiny.gguf", "messages": messages}) == "Paris."
        assert said(front, {"model": "base.gguf", "messages": messages}) == "of the base"
        assert said(front, {"messages": messages}) == "Paris."
        assert said(front, {"model": ["base.gguf"], "messages": messages}) == "Paris."
        assert [len(u.seen) for u in (tuned, base)] == [3, 1]
        _, _, listed = ask(front, "GET", "/v1/models")
    data = json.loads(listed)["data"]
    assert [(entry["id"], entry.get("fleetune")) for entry in data] == [
        ("tiny.gguf", None),
        ("base.gguf", "base"),
    ]


def test_the_names_of_both_need_the_token_too() -> None:
    with pair(Upstream(), Upstream(), "secret") as front:
        assert ask(front, "GET", "/v1/models")[0] == 401
        assert ask(front, "GET", "/v1/models", Authorization="Bearer secret")[0] == 200


def test_one_model_alone_is_listed_by_its_engine() -> None:
    upstream = Upstream()
    with door(upstream) as front:
        assert json.loads(ask(front, "GET", "/v1/models")[2])["data"] == [{"id": "tiny.gguf"}]
    assert [path for _, path, _, _ in upstream.seen] == ["/v1/models"]


def test_the_base_of_a_run_is_its_model(tmp_path: Path) -> None:
    run = tmp_path / "0001-fedit-m"
    run.mkdir()
    (run / "run.toml").write_text(recipes.to_toml(recipes.make({"model": "some/model", "data": "demo"})))
    assert session.base_of(Run(run)) == Plain("some/model")
    for subject in (Plain("some/model"), Compressed(None, tmp_path)):
        with pytest.raises(UsageError, match="was not made of another model"):
            session.base_of(subject)


def test_temperature_and_length_are_the_same_on_the_page_and_in_the_terminal() -> None:
    page = EngineSite().page.decode()
    assert "{{" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    parser = build_parser("chat")
    given = parser.parse_args(["chat", "m"])
    values = dict(re.findall(r'<input id="(\w+)" type="number"[^>]* value="([^"]*)"', page))
    assert {n: float(v) for n, v in values.items()} == {
        "temperature": given.temperature,
        "tokens": given.max_tokens,
    }
    assert chat.TEMPERATURE == 0


def test_the_page_makes_no_markup_of_text() -> None:
    script = re.findall(r"<script>(.*?)</script>", EngineSite().page.decode(), re.DOTALL)
    assert len(script) == 1
    assert "const markdown" in script[0]
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert word not in script[0], word


def a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was exported to a file, made of a base that is one; a llama-server stands on the PATH."""
    stand_in(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    run = tmp_path / "runs" / "0001-fedit-m"
    run.mkdir(parents=True)
    for file in (tmp_path / "base.gguf", run / "tuned.gguf"):
        little_file(file)
    recipe = recipes.make({"model": str(tmp_path / "base.gguf"), "data": "demo"})
    (run / "run.toml").write_text(recipes.to_toml(recipe))
    return run


class Heard(Silent):
    """Keep what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_both_engines_run_and_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, heard = a_run(tmp_path, monkeypatch), Heard()
    with api.serve(run, threads=1, port=0, beside_base=True, listener=heard) as opened:
        assert (opened.started.model, opened.started.base) == ("tuned.gguf", "base.gguf")
        own, base = starts(tmp_path / "bin")
        assert (own["--alias"], base["--alias"], base["--threads"]) == ("tuned.gguf", "base.gguf", "1")
        for model in ("tuned.gguf", "base.gguf"):
            body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "stream": True}
            assert b"hello" in ask(opened.front, "POST", CHAT, json.dumps(body).encode())[2]
            assert json.loads((tmp_path / "bin" / "body").read_text())["model"] == model
        assert opened.ended() is None
        assert ask(opened.front, "GET", "/health")[0] == 200
        assert opened.base is not None
        os.kill(base["pid"], 9)
        opened.base.process.wait(20)
        assert opened.ended() is opened.base
        assert ask(opened.front, "GET", "/health")[0] == 503
    assert not lives(own["pid"])
    size = human_bytes((tmp_path / "base.gguf").stat().st_size)
    assert any(f"about {size} more memory" in note for note in heard.notes)


def test_a_run_alone_starts_one_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path, monkeypatch)
    with api.serve(run, threads=1, port=0) as opened:
        assert opened.started.base is None
    assert len(starts(tmp_path / "bin")) == 1


def test_what_has_no_base_is_refused_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run(tmp_path, monkeypatch)
    with pytest.raises(UsageError, match="was not made of another model"), api.serve(
        str(tmp_path / "base.gguf"), port=0, beside_base=True
    ):  # fmt: skip
        pass
    assert not (tmp_path / "bin" / "started").exists()
