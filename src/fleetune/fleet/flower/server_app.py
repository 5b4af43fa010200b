"""Run a recipe as a ServerApp: on the SuperNodes of a stock SuperLink, or on the nodes of Flower's simulation.

Flower keeps nothing of a run that stops; a new `flwr run` with `resume` goes on with its folder.
"""

from __future__ import annotations

import logging
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from google.protobuf.message import DecodeError

from fleetune.common.display import counted, show
from fleetune.common.events import Event, RoundEvaluated, TuneDone
from fleetune.errors import MessageError, RecipeError, UsageError
from fleetune.fleet.audit import Audit
from fleetune.fleet.flower.client_app import RUN, check_recipe, pack, unpack
from fleetune.fleet.keys import fingerprint
from fleetune.fleet.link import TOO_LARGE
from fleetune.fleet.orders import job_of, terms_of
from fleetune.fleet.remote import Pace, RemoteFleet
from fleetune.fleet.table import Devices
from fleetune.runs import rundir
from fleetune.runs.listener import Listener, Silent
from fleetune.tuning.prepare import private
from fleetune.tuning.prepare.prepare import check, check_aggregation
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.defaults import about_rule, for_devices
from fleetune.tuning.rounds.fleets import Fleet, wanted
from fleetune.tuning.run import resume as resuming
from fleetune.tuning.run import run as running

if TYPE_CHECKING:
    from fleetune.tuning.prepare.prepare import TuneJob
    from fleetune.tuning.run.run import Step

log = logging.getLogger("flwr")  # what it says is in `flwr log`

POLL: Final = 0.5  # seconds between two looks at the SuperLink
SIMULATED_POLL: Final = 0.2  # or at the clients of a simulation, which answer through this process
PATIENCE: Final = 300.0  # seconds in which they all say who they are, and one more for each
# Codes of Flower's errors (`flwr.app.Error.code`) after which an order is given again: message, reply or node is unavailable,
# or the process of the app has died
LOST: Final = (3, 4, 5, 8)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume what the run-config names."""
    config = context.run_config
    for name in ("grace", "round-deadline", "wait"):
        if float(config[name]) < 0:
            raise UsageError(f"{name}={config[name]} in the run-config cannot be negative")
    poll = SIMULATED_POLL if config["simulate"] else POLL
    pace = Pace(grace=float(config["grace"]), deadline=float(config["round-deadline"]), poll=poll)
    kind = Simulation if config["simulate"] else SuperNodes
    fleets = kind(grid, context.run_id, int(config["wait"]), pace, bool(config["offline"]))
    recipe, resume, out = str(config["recipe"]), str(config["resume"]), Path(str(config["out"]))
    if bool(recipe) == bool(resume):
        raise UsageError(
            "a run needs a recipe, or the name of a run to go on with, and not both: "
            "--run-config \"recipe='/path/recipe.toml'\" or \"resume='latest'\""
        )
    if resume:
        found = resuming.resume(rundir.find(resume, out), Said(), offline=fleets.offline, fleets=fleets)
    else:
        found = running.start(
            fleets.settled(values_from(recipe)), out, Said(), offline=fleets.offline, fleets=fleets
        )
    log.info("the run is finished: %s", found.folder)


def values_from(text: str) -> dict[str, Any]:
    """Return the recipe's keys in a file with this path, or, if the text has several lines, in the text; RecipeError."""
    try:
        return tomllib.loads(text) if "\n" in text.strip() else recipes.read(Path(text))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError([f"the recipe in the run-config is not TOML: {error}"]) from error


class Said(Silent):
    """Say what happens in Flower's log."""

    def header(self, title: str, rows: Any) -> None:
        """Say what is about to run."""
        log.info("%s", title)
        for label, value in rows:
            log.info(" %-8s %s", label, value)

    def note(self, text: str) -> None:
        """Say a remark."""
        log.info("%s", text)

    def event(self, event: Event) -> None:
        """Say the loss after a round, and at the end where the result is."""
        if isinstance(event, RoundEvaluated) and event.loss is not None:
            log.info("round %d: val loss %s", event.round, show("loss", event.loss))
        if isinstance(event, TuneDone):
            log.info("result %s, digest %s", event.result, event.digest)


@dataclass
class SuperNodes:
    """The SuperNodes of a Flower run as a fleet."""

    grid: Grid
    run_id: int
    wait: int  # SuperNodes before the first round; 0: the recipe's clients
    pace: Pace
    offline: bool = False
    simulated = False

    def settled(self, values: Mapping[str, Any]) -> recipes.Recipe:
        """Return the recipe of these keys as SuperNodes run it."""
        recipe = recipes.make(values)
        entry, _ = check(recipe)
        return for_devices(recipe, self.wait or recipe.clients or entry.clients, values)

    def count(self, job: TuneJob) -> int:
        """Return how many SuperNodes the first round waits for."""
        return self.wait or job.recipe.clients or job.entry.clients

    def about(self, job: TuneJob) -> str:
        """Return whose they are, and how many are waited for."""
        return f"SuperNodes of Flower's run {self.run_id} · {counted(self.count(job), 'device')}"

    def make(self, job: TuneJob, run: rundir.RunDir, listener: Listener, step: Step) -> Fleet:
        """Return the fleet when enough SuperNodes are ready; those are numbered in the order of their names."""
        check_aggregation(job.recipe, job.method, self.count(job))
        listener.note(about_rule(job.recipe, self.count(job)))
        return self._gathered(GridLink(self.grid), job, run, listener)

    def _gathered(self, link: GridLink, job: TuneJob, run: rundir.RunDir, listener: Listener) -> RemoteFleet:
        listener.note(f"waiting for {self.count(job)} SuperNodes")
        while len(link.online()) < self.count(job):
            time.sleep(self.pace.poll)
        devices = Devices(run.path)
        devices.register(link.in_order())
        fleet = RemoteFleet(
            link,
            devices,
            job_of(job.recipe, devices.run, job.model.digest, **terms_of(job.recipe, private.sealed_of(job))),
            job.recipe.seed,
            self.pace,
            note=listener.note,
            audit=Audit(run.path).write,
            kinds=wanted(job.method, job.recipe.kinds),
            apart=job.recipe.privacy in private.BY_CLIENT,
        )
        fleet.wait_for(self.count(job))
        return fleet


class Simulation(SuperNodes):
    """The nodes of Flower's simulation engine as the recipe's clients, each the one with the number of its partition."""

    simulated = True

    def settled(self, values: Mapping[str, Any]) -> recipes.Recipe:
        """Return the recipe of these keys as it stands, since no client of a simulation lies; UsageError as `check_recipe`."""
        recipe = recipes.make(values)
        check_recipe(recipe)
        if recipe.privacy == "example":
            raise UsageError("Flower's simulation does not hide rows", hint="fleetune tune --privacy example")
        return recipe

    def count(self, job: TuneJob) -> int:
        """Return how many clients the rows are divided among; UsageError for another number of nodes."""
        clients, nodes = len(job.rows), len(list(self.grid.get_node_ids()))
        if nodes > clients or (self.wait and self.wait != clients):
            raise UsageError(
                f"the simulation has {nodes} SuperNodes, and the recipe {counted(clients, 'client')}",
                hint=f'--federation-config "num-supernodes={clients}"',
            )
        return clients

    def about(self, job: TuneJob) -> str:
        """Return where, and how many there are."""
        return f"Flower's simulation · {counted(len(job.rows), 'client')}"

    def make(self, job: TuneJob, run: rundir.RunDir, listener: Listener, step: Step) -> Fleet:
        """Return the fleet when every client has said who it is."""
        link = Partitions(self.grid)
        while len(list(self.grid.get_node_ids())) < self.count(job):
            time.sleep(self.pace.poll)
        link.ask(run.path.absolute(), offline=self.offline)
        return self._gathered(link, job, run, listener)


class Node(NamedTuple):
    """A node of the Grid."""

    id: int
    name: str  # "" for none
    since: str  # when it came in


class GridLink:
    """A `Link` over the Grid of a ServerApp.

    A SuperNode is known by its public key, which `Grid.get_nodes` states; by its number where it has none.
    """

    at_once: ClassVar[int] = 1  # answers that are pulled together

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._room: dict[str, int] = {}  # bytes that the answer to an order may have
        self._nodes: dict[str, Node] = {}  # by hash of the key, of those that were ever there

    def online(self) -> Mapping[str, str]:
        """Return the nodes that are there now, each with the time at which it came in."""
        here = self._here()
        self._nodes |= here
        return {key: f"{node.id} {node.since}" for key, node in here.items()}

    def _here(self) -> dict[str, Node]:
        return {
            fingerprint(info.public_key or str(info.node_id).encode()): Node(
                info.node_id, info.name, info.last_activated_at
            )
            for info in self.grid.get_nodes()
        }

    def in_order(self) -> list[tuple[str, str]]:
        """Return (key, name) of all that were ever there: by name, and those without one by their number."""
        found = sorted(self._nodes.items(), key=lambda item: (item[1].name, item[1].id))
        return [(key, self.name(key)) for key, _ in found]

    def name(self, key: str) -> str:
        """Return the name under which a SuperNode was registered, or its number."""
        node = self._nodes.get(key)
        return key[:8] if node is None else node.name or str(node.id)

    def push(self, key: str, data: bytes, common: int, room: int) -> str | None:
        """Queue an order for a SuperNode; its last `common` bytes are stored once for all orders that end with them."""
        if (node := self._nodes.get(key)) is None:
            return None
        (number,) = self.grid.push_messages([Message(pack(data, common), node.id, "train")])
        if number:
            self._room[number] = room
        return number or None

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield the answers that have come; None where the SuperNode has gone before it answered.

        What a SuperNode sends can be such that Flower cannot read it, nor what comes with it: then all of these have failed.
        """
        ordered = sorted(numbers)
        for first in range(0, len(ordered), self.at_once):
            part = ordered[first : first + self.at_once]
            try:
                found = [
                    (r.metadata.reply_to_message_id, _answer_in(r)) for r in self.grid.pull_messages(part)
                ]
            except (MessageError, DecodeError, ValueError, TypeError, AttributeError, LookupError) as error:
                log.warning("%s", error)
                found = [(number, b"") for number in part]
            for number, data in found:
                room = self._room.pop(number, 0)
                yield number, TOO_LARGE if data and len(data) > room else data

    def drop(self, numbers: set[str]) -> None:
        """Do nothing: a SuperNode may still work on orders that nobody waits for any longer."""


class Partitions(GridLink):
    """A `Link` to the clients of a simulation, which are known by the numbers of their partitions: also by a resumed run."""

    at_once = 256  # of this machine's own processes

    def ask(self, run: Path, *, offline: bool) -> None:
        """Tell every node the folder of the run, and hear which client it is; UsageError where they are not all clients."""
        said = RecordDict({RUN: ConfigRecord({"folder": str(run), "offline": offline})})
        nodes = list(self.grid.get_node_ids())
        asked = [Message(said, node, "query") for node in nodes]
        replies = list(self.grid.send_and_receive(asked, timeout=PATIENCE + len(nodes)))
        for reply in replies:
            if reply.has_error():
                raise UsageError(f"the ClientApp failed: {reply.error.reason}")
            if RUN in reply.content:
                client = int(reply.content[RUN]["client"])  # type: ignore[arg-type]
                node = Node(reply.metadata.src_node_id, f"client {client:06d}", "")
                self._nodes[fingerprint(node.name.encode())] = node
        if sorted(node.name for node in self._nodes.values()) != [
            f"client {c:06d}" for c in range(len(nodes))
        ]:
            raise UsageError(
                f"of {len(nodes)} SuperNodes {len(self._nodes)} are clients of a simulation",
                hint="real ones are served with simulate=false",
            )

    def _here(self) -> dict[str, Node]:
        return self._nodes


def _answer_in(reply: Message) -> bytes | None:
    """Return the bytes of a reply: None where it was lost, b"" where the log says why there is none."""
    if not reply.has_error():
        return unpack(reply.content)
    if reply.error.code in LOST:
        return None
    log.warning("the ClientApp failed: %s; is this Fleetune installed on the device?", reply.error.reason)
    return b""
