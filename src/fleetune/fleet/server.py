"""Run a recipe on real devices: the same rounds as in a simulated fleet, in the same kind of folder."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleetune.common.display import counted, quoted
from fleetune.common.files import PRIVATE, json_text, write_atomic
from fleetune.common.memory import rss
from fleetune.data.columns import sentence
from fleetune.errors import FleetError, Interrupted, UsageError
from fleetune.fleet import keys as keyring
from fleetune.fleet import status
from fleetune.fleet.audit import Audit
from fleetune.fleet.door import Door
from fleetune.fleet.http_server import Address
from fleetune.fleet.orders import Job, is_path, job_of, terms_of
from fleetune.fleet.remote import SHOWN, Pace, RemoteFleet
from fleetune.fleet.table import Devices
from fleetune.runs import rundir
from fleetune.runs.listener import Listener
from fleetune.tuning.prepare import prepare, private
from fleetune.tuning.recipe import defaults
from fleetune.tuning.recipe.recipe import Recipe
from fleetune.tuning.result import foundations
from fleetune.tuning.rounds.fleets import ONE, Fleet, Wanted, wanted

if TYPE_CHECKING:
    from fleetune.fleet.page import LivePage
    from fleetune.tuning.prepare.prepare import TuneJob
    from fleetune.tuning.run.run import Step

SIMULATED: Final = ("drop", "stragglers", "deadline")  # options of a recipe that real devices do not follow
PUBLISHED: Final = 1.0  # seconds between two words to `fleet status`
LOOK: Final = 2.0  # seconds between two looks at the folder of keys
KEPT: Final = {  # what a stop leaves, by task
    "tune": "; finished rounds are kept",
    "calibrate": "; finished blocks are kept",
    "eval": "; nothing was measured",
}
AGAIN: Final = {  # what goes on after a stop, by task
    "tune": "fleetune fleet serve --resume",
    "calibrate": "fleetune compress --resume",
}
REFUSALS: Final = 60.0  # seconds between two entries of what the door refused
AWAY: Final = {  # of refusals, those that a person can mend
    401: "it states a key that was revoked",
    403: "it states a key that is in no .pub file of --keys, or has not signed with it",
    409: "a device with this key is here already: an invite is for one device",
    421: "it calls this server by a name that the certificate does not have, or trusts another ca.pem",
}


@dataclass
class Served:
    """Real devices, which join at `place`; use it in a `with` block, which opens and closes the door."""

    place: keyring.Place
    wait: int = 0  # devices before the first round; 0: the recipe's clients, or all whose keys are here
    pace: Pace = field(default_factory=Pace)
    simulated: bool = False
    session: str = field(init=False, default_factory=lambda: secrets.token_hex(16))  # of this process
    farewell: str = "the run is finished"  # what devices are told at the end
    page: str | None = None  # where the fleet is shown in a browser: [HOST:]PORT, "" for the usual
    patience: float = 0.0  # seconds that devices have to come, where some suffice; 0: no end
    more: str = ""  # that devices need beside their rows, for the command that is shown
    _count: int = field(init=False, default=0)  # of devices, that the first round waits for
    _done: int = field(init=False, default=0)  # rounds that were finished before
    _keys: list[keyring.PublicKey] | None = field(init=False)
    _fleet: RemoteFleet | None = field(init=False, default=None)
    _next_look: float = field(init=False, default=0.0)  # at the folder of keys
    _next_word: float = field(init=False, default=0.0)  # to `fleet status`
    _next_refusals: float = field(init=False, default=0.0)  # to the log
    _turned: dict[str, set[str]] = field(init=False, default_factory=dict)  # away last, by reason
    _complaint: str = field(init=False, default="")
    _looking: threading.Lock = field(init=False, default_factory=threading.Lock)  # at the folder of keys
    _files: Mapping[str, bytes] = field(init=False)  # of the keys, when all of them were read
    _news: list[str] = field(init=False, default_factory=list)  # of the keys, not told yet
    _page: LivePage | None = field(init=False, default=None)
    _lingers: bool = field(init=False, default=False)  # whether the page outlives the run

    def __post_init__(self) -> None:
        self._keys = self.place.check()
        self._files = _files(self.place.keys)

    def __enter__(self) -> Served:
        certificate = self.place.certificate
        files = (certificate / "server.pem", certificate / "server.key") if certificate else (None, None)
        address = Address(self.place.host, self.place.port, *files)
        self._door = Door(address, self._keys, self._read_keys_again)
        if self.page is not None:
            from fleetune.fleet import page

            self._page = page.LivePage(page.place(self.page, address), os.environ.get("FLEETUNE_PASSWORD"))
            self._page.open()
        self._door.open()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._end()
        self._door.close()
        if self._page is not None:
            self._page.close()

    def _end(self) -> bool:
        """Tell devices that it is over, and `fleet status` what they did; tell whether `fleet stop` was called."""
        if self._fleet is None:
            return False
        self._fleet.end(self.farewell)
        return self._publish(self._fleet.devices.file.parent)

    def linger(self, note: Callable[[str], None]) -> None:
        """Show the page of a finished run on, if there is one, until `fleet stop` or an interrupt; devices are told the end."""
        if self._page is None or self._fleet is None:
            return
        self._lingers, run = True, quoted(self._page.run)
        note(f"finished; {self._page.url} stays until Ctrl-C, SIGTERM or: fleetune fleet stop {run}")
        try:
            while not self._end():
                time.sleep(PUBLISHED / 4)
        finally:
            self._lingers, self._next_word = False, 0.0

    def settled(self, recipe: Recipe, named: Collection[str]) -> Recipe:
        """Return the recipe as these devices run it; it names the options `named` itself."""
        entry, _ = prepare.check(recipe)
        return defaults.for_devices(recipe, self.wanted(recipe.clients, entry.clients), named)

    def check(self, path: Path) -> None:
        """Raise FleetError or RecipeError where so few devices cannot go on with a run, before anything is loaded."""
        recipe = foundations.recipe_of(path)
        entry, method = prepare.check(recipe)
        prepare.check_aggregation(recipe, method, self.wanted(recipe.clients, entry.clients))

    def count(self, job: TuneJob) -> int:
        """Return how many devices the first round waits for; FleetError when fewer can come."""
        return self.wanted(job.recipe.clients, job.entry.clients)

    def wanted(self, usual: int, otherwise: int = 1) -> int:
        """Return how many devices to wait for: `--wait`, or `usual`, or all whose keys are here, or `otherwise`.

        FleetError when fewer can come.
        """
        registered = len(self._keys) if self._keys is not None else 0
        wanted = self.wait or usual or registered or otherwise
        if self._keys is not None:
            check_count(wanted, registered)
        return wanted

    def flags(self) -> str:
        """Return the flags that open the same door again, with the same pace, each with a space before it."""
        usual = Pace()
        given: list[tuple[str, float | None, float | None]] = [
            ("--wait", self.wait, 0),
            ("--grace", self.pace.grace, usual.grace),
            ("--round-deadline", self.pace.deadline, usual.deadline),
        ]
        pace = "".join(f" {flag} {value:g}" for flag, value, other in given if value != other)
        page = "" if self.page is None else f" --page {quoted(self.page)}" if self.page else " --page"
        return self.place.flags() + pace + page

    def about(self, job: TuneJob) -> str:
        """Return where, and how many are waited for."""
        return self.where(self.count(job))

    def where(self, count: int) -> str:
        """Return where devices join, and how many are waited for."""
        way = "TLS" if self.place.certificate else "plain HTTP"
        door = "registered keys" if self._keys is not None else "any key"
        return f"{self.place.host}:{self.place.port} · {way}, {door} · {counted(count, 'device')}"

    def make(self, job: TuneJob, run: rundir.RunDir, listener: Listener, step: Step) -> Fleet:
        """Return the fleet when enough devices are ready."""
        count = self.count(job)
        prepare.check_aggregation(job.recipe, job.method, count)
        listener.note(defaults.about_rule(job.recipe, count))
        if not job.recipe.eval_every:
            listener.note("no round is evaluated, so the last one is kept: --eval-every 1 keeps the best")
        if simulated := [name for name in SIMULATED if getattr(job.recipe, name)]:
            listener.note(f"{', '.join(simulated)} only simulate; for real devices: --round-deadline SECONDS")
        if job.recipe.train_turns == "all" or sentence(job.recipe.columns) is not None:
            listener.note(
                "a device says so of its rows: fleet join --train-turns, --columns system='..'; those of fleet split are so"
            )
        devices = Devices(run.path)
        terms = terms_of(job.recipe, private.sealed_of(job))
        told = job_of(job.recipe, devices.run, job.model.digest, **terms)
        self._done = max((round for round, _ in rundir.checkpoints(run.path)), default=0)
        if 0 < self._done < job.recipe.rounds:
            listener.note(f"resumed: it goes on at round {self._done + 1} of {job.recipe.rounds}")
        kinds = wanted(job.method, job.recipe.kinds)
        apart = job.recipe.privacy in private.BY_CLIENT
        return self.gather(run.path, devices, told, job.recipe.seed, count, listener, kinds, apart)

    def gather(
        self,
        folder: Path,
        devices: Devices,
        job: Job,
        seed: int,
        count: int,
        listener: Listener,
        kinds: Wanted = ONE,
        apart: bool = False,
    ) -> RemoteFleet:
        """Return the fleet for a job when `count` devices are ready; what they do is written into `folder`."""
        devices.register([(k.fingerprint, k.name) for k in self._keys or []])
        listener.note(f"on each device: {self.line(is_path(job.model) or Path(job.model).exists())}")
        if self._page is not None:
            self._page.run = folder
            asks = self._page.password if "FLEETUNE_PASSWORD" not in os.environ else ""
            listener.note(f"page: {self._page.url}")
            if asks:  # log.txt need not know it
                getattr(listener, "inner", listener).note(f"the page's password, of any name: {asks}")

        audit = Audit(folder)

        def look() -> None:
            self._read_keys_again()
            while self._news:
                devices.register([(k.fingerprint, k.name) for k in self._keys or []])
                listener.note(self._news.pop(0))
            self._log_refusals(audit, listener.note)
            if self._publish(folder) or listener.stop_requested:
                hint = f"{AGAIN[job.task]} {folder}{self.flags()}" if job.task in AGAIN else None
                raise Interrupted(f"stopped while waiting for devices{KEPT[job.task]}", hint=hint)

        self._fleet = RemoteFleet(
            self._door,
            devices,
            job,
            seed,
            self.pace,
            look=look,
            note=listener.note,
            audit=audit.write,
            kinds=kinds,
            apart=apart,
        )
        self._count, self._fleet.next = count, self._done and self._done + 1
        self._fleet.wait_for(count, self.patience and (self.pace.deadline or self.patience))
        return self._fleet

    def _read_keys_again(self) -> None:
        """Let in devices whose keys were added to the folder, and throw out those whose keys were removed; from any thread.

        A file that is no key is left out; where none is one, or two are the same, those of gone or changed files are thrown out.
        """
        folder = self.place.keys
        if folder is None or time.monotonic() < self._next_look:
            return
        with self._looking:
            self._next_look = time.monotonic() + LOOK
            files, complaint = _files(folder), ""
            try:
                (found, wrong), self._files = keyring.registered(folder), files
                complaint = "; ".join(f"left out of the keys: {text}" for text in wrong)
            except UsageError as error:
                complaint = f"no key is added: {error.message}"
                found = [k for k in self._keys or [] if files.get(k.name) == self._files.get(k.name, b"")]
            if complaint not in ("", self._complaint):
                self._news.append(complaint)
            self._complaint = complaint
            before, now, self._keys = set(self._keys or []), set(found), found
            if before == now:
                return
            self._door.admit(found)
            changed = [f"{k.name} may join" for k in now - before]
            changed += [f"{k.name} is revoked" for k in before - now]
            self._news.append(f"keys: {', '.join(sorted(changed))}")
            if self._fleet is not None and not self._fleet.round and len(found) < self._count:
                self._news.append(
                    f"the run waits for {self._count} devices, and {len(found)} keys are left: stop it, and go on with "
                    f"--wait {max(1, len(found))}"
                )

    def _log_refusals(self, audit: Audit, note: Callable[[str], None]) -> None:
        """Write down which requests the door has refused: how many of each status, path and claimed key; say who, by reason."""
        if time.monotonic() < self._next_refusals or not (taken := self._door.refusals.taken()):
            return
        self._next_refusals, who = time.monotonic() + REFUSALS, dict[str, set[str]]()
        names = {k.fingerprint: k.name for k in self._keys or []}
        for (answered, path, key), count in sorted(taken.items()):
            audit.write(
                "turned away", status=answered, path=path, device=key, name=names.get(key, ""), requests=count
            )
            if answered in AWAY and path != "/fleet/exchange":
                who.setdefault(AWAY[answered], set()).add(self._door.name(key) or "one without a key")
        before, self._turned = self._turned, who
        for why, names_of in who.items():
            if names_of - before.get(why, set()):  # a device tries again for ever
                shown, more = ", ".join(sorted(names_of)[:SHOWN]), " .." * (len(names_of) > SHOWN)
                note(f"turned away: {shown}{more}: {why}")

    def _publish(self, folder: Path) -> bool:
        """Write down what the devices do, for `fleetune fleet status`; tell whether `fleetune fleet stop` was called."""
        if self._fleet is None or time.monotonic() < self._next_word:
            return False
        self._next_word = time.monotonic() + PUBLISHED
        job = self._fleet.job
        doing = [{"name": name, "client": client, "does": does} for name, client, does in self._fleet.doing()]
        content = {
            "t": round(time.time(), 1),
            "session": self.session,
            "pid": os.getpid(),
            "machine": platform.node(),
            "rss": rss(),
            "address": f"{self.place.host}:{self.place.port}",
            "flags": self.flags(),
            "lingers": self._lingers,
            "round": job.rounds if job.task == "eval" else self._fleet.round or self._done,
            "rounds": job.rounds,
            "waits": self._fleet.waits * (not self._fleet.round),
            "measures": any(device.held_out for device in self._fleet.told.values()),
            "devices": doing,
        }
        write_atomic(folder / status.FILE, json_text(content), mode=PRIVATE)
        return status.take_stop(folder, self.session)

    def line(self, own_model: bool = False) -> str:
        """Return the command for a device, which has to bring its own copy of the model or not."""
        server = self.place.address() if self._keys is None else f"NAME{keyring.INVITE}"
        words = f"fleetune fleet join {server} --data ROWS.jsonl{self.more}{' --model PATH' * own_model}"
        if self._keys is None:
            return words + " --ca ca.pem" * bool(self.place.certificate)
        return f"{words}   ({server} is made here: fleetune fleet invite NAME{self.place.flags()})"


def _files(folder: Path | None) -> dict[str, bytes]:
    """Return the files of a folder of keys that can be read, by the keys' names."""
    found = {}
    for path in folder.glob("*.pub") if folder is not None else ():
        with contextlib.suppress(OSError):
            found[path.stem] = path.read_bytes()
    return found


def check_count(wanted: int, registered: int) -> None:
    """FleetError when more devices are waited for than may come in."""
    if registered < wanted:
        raise FleetError(
            f"the run waits for {wanted} devices, and {registered} keys are registered",
            hint=f"bring the others' .pub files into the folder of keys, or wait for fewer: --wait {registered}",
        )
