"""A stand-in for llama-server: an executable that answers in OpenAI's form, fails and breaks off as told."""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

STAND_IN = '''#!{python}
"""It takes llama-server's flags, wants the same key, and notes how it was started."""
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
here = Path(__file__).resolve().parent
key = os.environ.get("LLAMA_API_KEY", "")
with open(flags["--model"], "rb") as model, open(here / "started", "a") as file:
    file.write(json.dumps({{**flags, "pid": os.getpid(), "key": key, "spins": os.environ["GOMP_SPINCOUNT"], "magic": model.read(4).decode()}}) + "\\n")
if (here / "broken").exists():
    sys.exit("tensor 'blk.0' is missing")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, json.dumps({{"status": "ok", "data": [{{"id": flags["--alias"]}}]}}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if key and self.headers["Authorization"] != "Bearer " + key:
            return self.reply(401, json.dumps({{"error": {{"message": "no key"}}}}))
        Path(here, "body").write_text(json.dumps(body))
        text = body["messages"][-1]["content"]
        if text == "wait":
            time.sleep(600)
        if text == "die":
            self.reply(200, 'data: {{"choices": [{{"delta": {{"content": "one"}}}}]}}\\n\\n')
            os._exit(9)
        if text == "too long":
            return self.reply(400, json.dumps({{"error": {{"message": "no room"}}}}))
        pieces = [str(len(body["messages"])), ":", text]
        if not body.get("stream"):
            return self.reply(200, json.dumps({{"choices": [{{"message": {{"content": "".join(pieces)}}}}]}}))
        events = [{{"choices": [{{"delta": {{"content": piece}}, "finish_reason": None}}]}} for piece in pieces]
        events.append({{"choices": [{{"delta": {{}}, "finish_reason": "stop"}}]}})
        self.reply(200, "".join("data: " + json.dumps(e) + "\\n\\n" for e in events) + "data: [DONE]\\n\\n")

    def reply(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()
'''


def little_file(path: Path, kind: str = "model", **split: int) -> Path:
    """A whole .gguf file with one tensor, which may be told to be a part of a model."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    for key, value in split.items():
        writer.add_uint16(f"split.{key}", value)
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
