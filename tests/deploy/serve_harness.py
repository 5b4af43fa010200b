# SPDX-License-Identifier: Apache-2.0
"""An engine to stand behind the door: a real HTTP server that streams, fails and breaks off as told; and a client."""

from __future__ import annotations

import http.client
import json
import select
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from fleetune.deploy.serving.engine_site import EngineSite
from fleetune.deploy.serving.front import Front
from fleetune.deploy.serving.openai_client import Address

KEY = "engine-key"


class Upstream(ThreadingHTTPServer):
    """Answers in OpenAI's form; what it was asked is in `seen`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answer = ["Par", "is", "."]
        self.mode = "answer"  # or: die (in the middle), fall (before the answer), refuse, plain, tools, wait (for `go`)
        self.go = threading.Event()  # set: the pieces after the first may come
        self.gone = (
            threading.Event()
        )  # set: a client went away in the middle of a stream, or before its answer
        self.go.set()

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.server_port, KEY)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    server: Upstream
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._see(b"")
        found = {"/health": {"status": "ok"}, "/v1/models": {"object": "list", "data": [{"id": "tiny.gguf"}]}}
        self._reply(200, json.dumps(found[self.path.partition("?")[0]]).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._see(body)
        if self.server.mode == "fall":
            self._reset()
        elif self.server.mode == "refuse":
            error = {
                "error": {"message": "the context is full", "type": "invalid_request_error", "code": 400}
            }
            self._reply(400, json.dumps(error).encode())
        elif self.server.mode == "tools":
            self._reply(500, b'{"error": {"message": "Failed to parse tools: 5", "code": 500}}')
        elif self.server.mode == "wait" and not self._may_answer():
            self.server.gone.set()
            self.close_connection = True
        elif self.server.mode == "plain":
            self._reply(500, b"Internal Server Error", "text/plain")
        elif json.loads(body).get("stream"):
            self._stream("chat" in self.path)
        else:
            message = {"role": "assistant", "content": "".join(self.server.answer)}
            self._reply(
                200, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
            )

    def _may_answer(self) -> bool:
        """Wait for `go`; False when the client goes away before."""
        while not self.server.go.wait(0.02):
            ready = select.select([self.connection], [], [], 0)[0]
            if ready and not self.connection.recv(1, socket.MSG_PEEK):
                return False
        return True

    def _see(self, body: bytes) -> None:
        self.server.seen.append((self.command, self.path, dict(self.headers), body))

    def _reply(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i, piece in enumerate(self.server.answer):
            choice: dict[str, Any] = {"delta": {"content": piece}} if chat else {"text": piece}
            try:
                self._event({"choices": [{**choice, "finish_reason": None}]})
            except OSError:
                self.server.gone.set()
                raise
            self.server.go.wait(20)
            if i == 0 and self.server.mode == "die":
                self._reset()
                return
        self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self._event(None)
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, event: dict[str, Any] | None) -> None:
        data = b"data: %b\n\n" % (b"[DONE]" if event is None else json.dumps(event).encode())
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _reset(self) -> None:
        """End the connection as a killed process does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    """A server that serves while the block runs."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def door(upstream: Upstream, token: str = "", host: str = "127.0.0.1") -> Iterator[Front]:
    """The front before an upstream, both running."""
    site = EngineSite()
    site.attach(upstream.address, lambda: True)
    front = Front(host, 0, token, site)
    with running(upstream), running(front):
        yield front


def ask(
    front: Front, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own; header names have _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", front.server_port, timeout=20)
    try:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            given.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, given)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        connection.close()


def raw(front: Front, text: bytes, *, ends: bool = True) -> bytes:
    """What comes back for bytes that are sent as they are, up to the end of the connection; `ends`: nothing more is sent."""
    with socket.create_connection(("127.0.0.1", front.server_port), timeout=20) as connection:
        connection.sendall(text)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        found = b""
        while piece := connection.recv(1 << 16):
            found += piece
    return found


def error_of(body: bytes) -> dict[str, Any]:
    """The error in a body of OpenAI's form."""
    found: dict[str, Any] = json.loads(body)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


STAND_IN = '''#!{python}
"""A llama-server to start: it takes the same flags, wants the same key, and notes how it was started."""
import json, os, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, "started"), "a") as file:
    with open(flags["--model"], "rb") as model:
        magic = model.read(4).decode()
    file.write(json.dumps({{**flags, "pid": os.getpid(), "magic": magic}}) + "\\n")
if os.path.exists(os.path.join(here, "noisy")):
    print("\\n".join(f"line {{i}}" for i in range(200000)), flush=True)
if os.path.exists(os.path.join(here, "broken")):
    sys.exit("tensor 'blk.0' is missing")
if os.path.exists(os.path.join(here, "stubborn")):
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    print("child", subprocess.Popen([sys.executable, "-c", child]).pid, flush=True)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, "application/json", json.dumps({{"status": "ok", "data": [{{"id": flags["--alias"]}}]}}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer " + os.environ["LLAMA_API_KEY"]:
            return self.reply(401, "application/json", json.dumps({{"error": {{"message": "no key"}}}}))
        if os.path.exists(os.path.join(here, "mortal")) and "messages" not in body:
            print("out of memory", flush=True)
            os._exit(9)
        if "messages" in body:
            Path(here, "body").write_text(json.dumps(body))
        words = body["messages"] if "messages" in body else [{{"content": "x"}}] * 8
        if words[-1]["content"] == "wait":
            open(os.path.join(here, "asked"), "w").close()
            time.sleep(600)
        if words[-1]["content"] == "too long":
            return self.reply(400, "application/json", json.dumps({{"error": {{"message": "no room"}}}}))
        pieces = [str(len(words)), ":", words[-1]["content"]] if "messages" in body else ["x"] * 8
        events = []
        for piece in pieces:
            time.sleep(0 if "messages" in body else 0.005 * int(flags["--threads"]))  # more threads are slower
            events.append({{"choices": [{{"text": piece, "delta": {{"content": piece}}, "finish_reason": None}}]}})
        events.append({{"choices": [{{"text": "", "delta": {{}}, "finish_reason": "stop"}}]}})
        self.reply(200, "text/event-stream", "".join("data: " + json.dumps(e) + "\\n\\n" for e in events))

    def reply(self, status, kind, text):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()
'''


def little_file(path: Path, kind: str = "model") -> Path:
    """A whole .gguf file with one tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stand_in(folder: Path) -> Path:
    """A folder for the PATH with an executable `llama-server` in it."""
    folder.mkdir(exist_ok=True)
    file = folder / "llama-server"
    file.write_text(STAND_IN.format(python=sys.executable))
    file.chmod(0o755)
    return folder


def starts(folder: Path) -> list[dict[str, Any]]:
    """How the stand-in was started, each time: its flags, its pid, and the first bytes of the model."""
    return [json.loads(line) for line in (folder / "started").read_text().splitlines()]


def lives(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
