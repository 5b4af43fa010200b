"""Answer orders as a ClientApp: on a SuperNode, which starts a new process for every message, or in a simulation."""

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fleetune.common.files import lock
from fleetune.common.memory import usable_memory
from fleetune.common.settings import parse_bytes
from fleetune.errors import FAULTS, FleetuneError, UsageError, fault
from fleetune.fleet.flower import partition
from fleetune.fleet.flower.records import pack, unpack
from fleetune.fleet.orders import Declined, Order, Reply, reason_of
from fleetune.fleet.worker import Brings, Worker

log = logging.getLogger("flwr")  # what it says is in the SuperNode's output

JOB: Final = "fleetune-job"  # records in the context: the job
RUN: Final = "fleetune-run"  # and the folder of a simulation's run

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
        found[RUN] = ConfigRecord({"client": partition.number_of(context.node_config)})
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
        return Reply(what, order.nonce, order.round, code=reason_of(error, usable_memory())).encode()


def _worker_of(context: Context) -> Worker:
    """Return who does the work of a node: a simulation's client, or the SuperNode's device."""
    if RUN not in context.state:
        return _worker(*brought(context.node_config, context.node_id))
    said = context.state[RUN]
    return partition.clients(Path(str(said["folder"])), bool(said["offline"])).worker(
        partition.number_of(context.node_config)
    )


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
