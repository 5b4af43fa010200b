# SPDX-License-Identifier: Apache-2.0
"""`export --push` through the hub's own client, to a stand-in for the Hub on this machine.

The stand-in answers the five requests of an upload of small files.  What the real Hub does beside that (large files, quotas) is
not tested.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from fleetune import models
from fleetune.cli.main import main
from fleetune.common.events import ExportPushed
from fleetune.deploy import hub_push
from fleetune.errors import FleetuneError, UsageError
from fleetune.tuning.run.model_card import HERE


class Hub(ThreadingHTTPServer):
    """A Hub with one token that may write to `me`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Door)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def is_private(given: dict[str, Any]) -> bool:
    """Whether a request to make a repository asks for a private one, as several versions of the client write it."""
    return bool(given.get("private")) or given.get("visibility") == "private"


class Door(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        if self.headers["Authorization"] not in ("Bearer hf_good", "Bearer hf_read"):
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path != "/api/whoami-v2":
            name = self.path.removeprefix("/api/models/")
            if found := self.server.repositories.get(name):
                self.answer(200, {"id": name, "private": is_private(found), "siblings": [], "tags": []})
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
        else:
            self.answer(200, {"name": "me", "type": "user", "orgs": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"POST {self.path}")
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        if self.headers["Authorization"] != "Bearer hf_good":
            self.answer(403, {"error": "this token may only read"})
        elif self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            self.server.repositories.setdefault(name, given)
            self.answer(200, {"url": f"{self.server.url}/{name}"})
        elif self.path.startswith("/api/validate-yaml"):
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer(
                200,
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                },
            )
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.files |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            url = f"{self.server.url}/{name}/commit/{'a' * 40}"
            self.answer(200, {"success": True, "commitOid": "a" * 40, "commitUrl": url})
        else:
            self.answer(404, {"error": self.path})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # what the suite forbids
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with Hub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export with a card."""
    made = tmp_path / "hf"
    made.mkdir()
    (made / "README.md").write_text(f'---\nlicense: mit\n---\n\nload("{HERE}")\n')
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(256)))
    return made


def test_a_folder_is_pushed_whole_and_its_card_names_the_repository(hub: Hub, folder: Path) -> None:
    hub_push.check("me/otter", private=True, offline=False)
    done = hub_push.push(folder, "me/otter", private=True)
    assert (done.repository, done.private) == ("me/otter", True)
    assert done.url.endswith(f"/me/otter/commit/{'a' * 40}")
    assert is_private(hub.repositories["me/otter"])
    assert hub.files == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert b'load("me/otter")' in hub.files["README.md"]


def test_the_command_exports_then_pushes_and_says_where(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, tmp_path / "tiny")
    words = ["export", "tiny", "--to", "hf", "--path", "out", "--push", "me/otter", "--json"]
    assert main(words) == 0
    written, pushed = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (written["event"], written["path"]) == ("export", "out")
    assert set(pushed) == {"v", "event", *(f.name for f in dataclasses.fields(ExportPushed))}
    assert (pushed["event"], pushed["path"], pushed["repository"]) == ("pushed", "out", "me/otter")
    assert set(hub.files) == {p.name for p in (tmp_path / "out").iterdir()}
    assert main([*words[:5], "other", "--private"]) == 2
    assert not (tmp_path / "other").exists()


def test_a_file_is_pushed_under_its_name(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    hub_push.push(tmp_path / "small.gguf", "me/otter", private=False)
    assert hub.files == {"small.gguf": b"GGUF"}
    assert not is_private(hub.repositories["me/otter"])
    with pytest.raises(UsageError, match="public already"):
        hub_push.check("me/otter", private=True, offline=False)


def test_what_cannot_be_pushed_is_told_before_any_work(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="without the network"):
        hub_push.check("me/otter", private=False, offline=True)
    assert not hub.asked
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(FleetuneError, match="Invalid user token") as error:
        hub_push.check("me/otter", private=False, offline=False)
    assert "hf auth login" in str(error.value.hint)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FleetuneError, match="the Hub and me/otter"):
        hub_push.check("me/otter", private=False, offline=False)


def test_a_failed_push_names_the_command_that_repeats_the_upload(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    with pytest.raises(FleetuneError, match="may only read") as error:
        hub_push.push(folder, "me/otter", private=False)
    assert f"hf upload me/otter {folder}" in str(error.value.hint)
