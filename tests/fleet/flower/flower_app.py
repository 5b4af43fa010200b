"""A recipe, and a grid whose nodes are contexts in this process."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Context, Error, Message, RecordDict

from fleetune.fleet.flower import client_app, server_app
from fleetune.runs import rundir

CLIENTS = 3
RECIPE = """\
model = "model"
data = "rows.jsonl"
method = "fedkseed"
partition = "dirichlet:0.5:kind"
clients = 3
rounds = 2
held_out = 4
eval_rows = 4
samples = 0
max_length = 48
device = "cpu"
threads = 1
[set]
K = 16
tau = 2
lr = 1e-2
"""
CONFIG: dict[str, Any] = {"recipe": "recipe.toml", "resume": "", "out": "real", "simulate": False}
CONFIG |= {"offline": True, "wait": 0, "grace": 20.0, "round-deadline": 0.0}


class GridHere:
    """A grid that calls the ClientApp itself, each message in a process of its own; nodes have the numbers given."""

    def __init__(self, numbers: Iterable[int], configs: Iterable[dict[str, Any]]) -> None:
        self.contexts = {
            number: Context(0, number, {**config}, RecordDict(), {})
            for number, config in zip(numbers, configs, strict=True)
        }
        self.replies: dict[str, Message] = {}
        self.pushed = self.stop_after = 0
        self.errors: list[int] = []  # codes of the next replies

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def get_nodes(self) -> Iterable[SimpleNamespace]:
        """What Flower states of nodes: here the names are in the order of the clients, the numbers are not."""
        named = [(node, f"edge-{c}", f"key {c}".encode(), "then") for c, node in enumerate(self.contexts)]
        stated = ("node_id", "name", "public_key", "last_activated_at")
        return [SimpleNamespace(**dict(zip(stated, node, strict=True))) for node in named]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        numbers = []
        for message in messages:
            self.pushed += 1
            if self.pushed == self.stop_after:
                raise KeyboardInterrupt
            number = f"message {self.pushed}"
            message.metadata.__dict__["_message_id"] = number
            client_app._worker.cache_clear()  # a new process
            self.replies[number] = self._answer(message, self.contexts[message.metadata.dst_node_id])
            numbers.append(number)
        return numbers

    def _answer(self, message: Message, context: Context) -> Message:
        if self.errors:
            return Message(Error(self.errors.pop(0), "because"), reply_to=message)
        return client_app.app(message, context)

    def pull_messages(self, numbers: Iterable[str]) -> Iterator[Message]:
        yield from [self.replies.pop(n) for n in numbers if n in self.replies]

    def send_and_receive(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        return self.pull_messages(self.push_messages(messages))


def run(grid: GridHere, **config: Any) -> None:
    """Run the ServerApp with a run-config."""
    server_app.main(grid, Context(1, 0, {}, RecordDict(), {**CONFIG, **config}))  # type: ignore[arg-type]


def digest_of(out: str | Path) -> str:
    """The digest that the one run in a folder has ended in."""
    (found,) = (p for p in Path(out).iterdir() if not p.is_symlink())
    return str([e for e in rundir.events(found) if e["event"] == "done"][-1]["digest"])
