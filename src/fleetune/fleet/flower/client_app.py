"""Answer orders as a ClientApp: on a SuperNode, which starts a new process for every message, or in a simulation.

In a simulation the node with a partition's number has the rows of the client with this number.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fleetune.common.files import lock
from fleetune.common.memory import usable_memory
from fleetune.common.settings import parse_bytes
from fleetune.data import Example
from fleetune.data.encode import encode_rows
from fleetune.errors import FAULTS, FleetuneError, MessageError, UsageError, fault
from fleetune.fleet.brings import Brings
from fleetune.fleet.orders import Declined, DeviceReply, Order, reason_of
from fleetune.fleet.worker import Worker
from fleetune.tuning import methods
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.result import foundations
from fleetune.tuning.rounds.local_work import Memories

log = logging.getLogger("flwr")  # what it says is in the SuperNode's output

JOB: Final = "fleetune-job"  # records in the context: the job
RUN: Final = "fleetune-run"  # and the folder of a simulation's run

NUMBER: Final = "partition-id"  # in a node's config: Flower's simulation gives every node one, from 0
FOLDER: Final = "flower"  # in a run's: what its clients keep
ONE_PROCESS: Final = ("drop", "stragglers", "deadline", "over_selection")  # options of a recipe
PIECE: Final = 1 << 20  # bytes of a record

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one order."""
    return Message(pack(answer(unpack(message.content), context)), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Keep the folder of a simulation's run, and answer which client of it this node is; nothing where it is none."""
    found = RecordDict()
    with contextlib.suppress(Declined):
        found[RUN] = ConfigRecord({"client": number_of(context.node_config)})
        context.state[RUN] = message.content[RUN]
    return Message(found, reply_to=message)


def answer(data: bytes, context: Context) -> bytes:
    """Return the answer to an order; what is wrong with this device is the answer too."""
    order = Order.decode(data)
    try:
        worker = _worker_of(context)
        with _alone(worker.state):
            if order.what == "job":
                context.state[JOB] = ConfigRecord({"order": data})
            elif order.what == "work" and JOB in context.state:
                # what the job needs is loaded where this process has not
                worker.answer(context.state[JOB]["order"])  # type: ignore[arg-type]
                if worker.error is not None:
                    raise worker.error
            return worker.answer(data)
    except FAULTS as error:
        log.error("%s", error.message if isinstance(error, FleetuneError) else fault(error))
        what: Literal["refused", "failed"] = "refused" if order.what == "job" else "failed"
        return DeviceReply(what, order.nonce, order.round, code=reason_of(error, usable_memory())).encode()


def _worker_of(context: Context) -> Worker:
    """Return who does the work of a node: a simulation's client, or the SuperNode's device."""
    if RUN not in context.state:
        return _worker(*brought(context.node_config, context.node_id))
    said = context.state[RUN]
    return clients(Path(str(said["folder"])), bool(said["offline"])).worker(number_of(context.node_config))


def brought(config: Mapping[str, Any], node: int) -> tuple[Brings, Path]:
    """Return what the SuperNode's --node-config says that the device brings, and the device's folder.

    Declined without rows, UsageError for a value that is none.  Other names are those of other apps.
    """
    config = {name.replace("_", "-"): value for name, value in config.items()}
    data = str(config.get("data", ""))
    if config.get("epsilon") and "state" not in config:
        raise UsageError(
            "a SuperNode with an epsilon needs a folder that keeps the account, whatever its number: state=DIR"
        )
    if not data:
        raise Declined("no-data")
    threads = config.get("threads", 0)
    if type(threads) is not int or threads < 0:
        raise UsageError(f"threads={threads!r} in the SuperNode's --node-config is no number of threads")
    memory = parse_bytes(str(config["ram"])) if "ram" in config else 0
    brings = Brings(
        data,
        str(config.get("model", "")),
        str(config.get("device", "auto")),
        threads,
        memory or 0,
        least=config.get("smallest-sum", 0),
        epsilon=config.get("epsilon", 0),
        delta=config.get("delta", 1e-5),
    )
    return brings, Path(str(config.get("state", Path("fleetune-device", str(node)))))


@functools.lru_cache(maxsize=1)
def _worker(brings: Brings, state: Path) -> Worker:
    return Worker(brings, state, note=log.info)


@contextlib.contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Wait until no other process is this device: one of a killed SuperNode works on to its end."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state / ".lock").open("a") as file:
        lock(file.fileno(), wait=True)
        yield


def pack(data: bytes, common: int = 0) -> RecordDict:
    """Return the bytes as records of at most `PIECE`; the last `common` bytes begin a record of their own.

    Flower stores equal records of different messages once.  Within a message a number keeps them apart.
    """
    cut = len(data) - common
    starts = sorted({*range(0, max(1, cut), PIECE), *range(cut, len(data), PIECE)})
    ends = [*starts[1:], len(data)]
    return RecordDict(
        {
            str(i): ConfigRecord({"n": i, "data": data[start:end]})
            for i, (start, end) in enumerate(zip(starts, ends, strict=True))
        }
    )


def unpack(content: RecordDict) -> bytes:
    """Return the bytes of records; MessageError for records of another kind."""
    try:
        parts = [content[str(i)]["data"] for i in range(len(content))]
    except (KeyError, TypeError, IndexError) as error:
        raise MessageError(f"the message is not in pieces as agreed ({error!r})") from error
    if not all(type(part) is bytes for part in parts):
        raise MessageError("the message is not in pieces of bytes")
    return b"".join(parts)  # type: ignore[arg-type]


def check_recipe(recipe: recipes.Recipe) -> None:
    """Raise UsageError for what only `fleetune tune` simulates."""
    usual = recipes.fields()
    if odd := [name for name in ONE_PROCESS if getattr(recipe, name) != usual[name][1]]:
        raise UsageError(
            f"{', '.join(odd)} of the recipe: who fails or is late is simulated in one process alone",
            hint="leave it out, or run fleetune tune",
        )


def number_of(config: Mapping[str, Any]) -> int:
    """Return the number of a node's partition; Declined for a node that has rows of its own, or no number."""
    number = config.get(NUMBER)
    if type(number) is not int or "data" in config:
        raise Declined("no-data")
    return number


@dataclass(frozen=True)
class Partition(Brings):
    """What a simulated client brings: the rows that the recipe gives it."""

    clients: Callable[[int], Sequence[Example]] = lambda number: ()
    number: int = 0

    def divided(self, note: Callable[[str], None] = log.info) -> tuple[Sequence[Example], Sequence[Example]]:
        """Return (training rows, no held-out rows)."""
        return self.clients(self.number), []


class Clients:
    """The clients of a run that this process has been."""

    def __init__(self, run: Path, *, offline: bool = False) -> None:
        self.run, self.offline, self.recipe = run, offline, foundations.recipe_of(run)
        self.parts = prepare.split(self.recipe, methods.entry(self.recipe.method), offline=offline)
        self._workers: dict[int, Worker] = {}

    def rows(self, number: int) -> Sequence[Example]:
        """Return the rows of a client; Declined where the recipe has none of this number."""
        if not 0 <= number < len(self.parts.clients):
            raise Declined("no-data")
        return [self.parts.examples[i] for i in self.parts.clients[number].tolist()]

    def worker(self, number: int) -> Worker:
        """Return a client's worker; the model that another has loaded is its own as well."""
        if (worker := self._workers.get(number)) is None:
            worker = Worker(
                self._brings(self.recipe, number), self.run / FOLDER / f"{number:06d}", note=log.info
            )
            self._workers[number] = worker
        if worker.loaded is None and (other := next((w for w in self._workers.values() if w.loaded), None)):
            assert other.loaded is not None
            job, model = other.loaded.job, other.loaded.model
            rows, _ = encode_rows(model, self.rows(number), job.max_length)
            worker.loaded = replace(other.loaded, rows=rows, memories=Memories(worker.own.run(job.run)))
        return worker

    def _brings(self, recipe: recipes.Recipe, number: int) -> Partition:
        return Partition(
            recipe.data,
            recipe.model,
            recipe.device,
            recipe.threads,
            parse_bytes(recipe.ram or None) or 0,
            self.offline,
            base=recipe.base,
            clients=self.rows,
            number=number,
        )


@functools.lru_cache(maxsize=1)
def clients(run: Path, offline: bool) -> Clients:
    """Return the clients of a run; a process keeps those of one."""
    return Clients(run, offline=offline)
