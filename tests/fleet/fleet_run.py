"""The folder of a real fleet's run as its server leaves it, without a server."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetune.common import files
from fleetune.common.events import ClientReply, RoundDone, TuneStart, as_dict

EVIL = "<img src=x onerror=window.hit=1>"
NAMES = ("bakery", "dialysis-ward", EVIL)
DOES = ("at work", "ready", "away")


def client(round: int, client: int, status: str = "ok", reason: str = "", **more: Any) -> dict[str, Any]:
    """What becomes of a reply, as a line of metrics.jsonl."""
    loss = 4.0 - 0.1 * round + 0.01 * client if status == "ok" else None
    sent = 110 if status in ("ok", "refused") else 0
    said = {"n": 13, "loss": loss, "status": status, "reason": reason}
    cost = {"bytes_up": sent, "bytes_down": 88, "seconds": 1.5, "rss": 10**8}
    return as_dict(ClientReply(round=round, client=client, **said, **cost)) | more


def done(round: int, accepted: int = 3) -> list[dict[str, Any]]:
    """A round that is finished and measured."""
    cost = {"bytes_up": 330, "bytes_down": 264, "bytes_total": 594 * round, "seconds": 2.5, "rss": 10**8}
    whole = RoundDone(round=round, clients=3, accepted=accepted, **cost)
    return [as_dict(whole), {"event": "eval", "round": round, "loss": 4.0 - 0.2 * round}]


BASE = {"model": "tiny", "digest": "ab" * 32, "params": 28576, "trained": 28576}
ROWS = {"clients": 3, "partition": "iid", "column": None, "rows_per_client": [13, 13, 13], "held_out": 8}
BEGUN = as_dict(TuneStart(method="fedkseed", rounds=8, **BASE, **ROWS))
START = [BEGUN, {"event": "eval", "round": 0, "loss": 4.0}]
TWO_ROUNDS = [
    *START,
    *(client(1, c) for c in range(3)),
    *done(1),
    client(2, 0),
    client(2, 1),
    client(2, 2, "dropped", "not there for 60 s"),
    client(2, 1, "refused", f"it goes 9 times as far {EVIL}"),
    *done(2, accepted=1),
]


def write(folder: Path, events: Sequence[Mapping[str, Any]] = TWO_ROUNDS, *, said: float = 0.0) -> Path:
    """Make the folder; its server's last word is `said` seconds old."""
    folder.mkdir(exist_ok=True)
    (folder / "run.toml").write_text('model = "tiny"\ndata = "rows.jsonl"\nmethod = "fedkseed"\nrounds = 8\n')
    (folder / "status").write_text("running\n")
    lines = [json.dumps({"v": 1, "t": 1.75e9, **event}) + "\n" for event in events]
    (folder / "metrics.jsonl").write_text("".join(lines))
    word(folder, said=said)
    return folder


def word(folder: Path, *, said: float = 0.0, **more: Any) -> None:
    """Write the server's last word."""
    devices = [{"name": n, "client": c, "does": d} for c, (n, d) in enumerate(zip(NAMES, DOES, strict=True))]
    here = {"session": "5e55", "pid": 4711, "machine": "box", "rss": 5 * 10**8, "address": "0.0.0.0:8470"}
    content = {"t": time.time() - said, "round": 3, "rounds": 8, "devices": devices, **here, **more}
    (folder / "fleet.json").write_text(files.json_text(content))
