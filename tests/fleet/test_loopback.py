"""A fleet on this machine, with TLS and keys: it ends in the digest of the simulation.

The devices are threads; `make faults` has the same with processes that are killed.
"""

import contextlib
import dataclasses
import importlib.util
import io
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import devices_harness
import httpx
import numpy as np
import pytest
from deploy_harness import compressed, tiny
from devices_harness import Device, entered, fates, free_port, run_in

import fleetune
from command_line import ok, refused
from fleetune import models
from fleetune.cli import flags
from fleetune.cli.main import build_parser, main
from fleetune.common.display import pip_install
from fleetune.errors import FleetError, Interrupted, UsageError
from fleetune.fleet import device as devices_module
from fleetune.fleet import keys, server, worker
from fleetune.fleet import status as fleet_status
from fleetune.fleet.audit import FILE, verify
from fleetune.fleet.keys import Place
from fleetune.fleet.remote import Pace
from fleetune.fleet.server import Served
from fleetune.fleet.worker import Brings
from fleetune.privacy import mechanism
from fleetune.runs import rundir
from fleetune.seeds import ledger as ledgers
from fleetune.tuning.prepare import prepare, rates
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.result.finished import TuneResult
from fleetune.tuning.run import resume as resuming
from fleetune.tuning.run import run as running
from heard import Heard

CLIENTS = 3
COMMON: dict[str, Any] = {**devices_harness.COMMON, "clients": CLIENTS, "rounds": 3}
WALK = {"K": 16, "tau": 2, "lr": 1e-2, "backprop": 0.5, "backprop_lr": 1e-3, "backprop_steps": 2}
FEDKSEED = {**COMMON, "method": "fedkseed", "set": WALK}
FEDIT = {**COMMON, "method": "fedit", "set": {"r": 2, "steps": 2, "dropout": 0.0, "scaffold": True}}
FEDSB = FEDIT | {"set": FEDIT["set"] | {"variant": "sb", "start": "gradient"}}
SIGNLORA = {**COMMON, "method": "signlora", "set": {"steps": 1, "r": 2, "pool": 3, "lr": 0.05}}
SIGNLORA["participation"] = 0.7  # so that some are told the news of several rounds
QUICK = Pace(grace=20, poll=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, the rows of each client, keys and certificates."""
    place = tmp_path_factory.mktemp("fleet")
    devices_harness.lay_out(place, CLIENTS)
    keys.make(place / "stranger")
    return place


@pytest.fixture
def place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return entered(folder, tmp_path, monkeypatch)


def device(port: int, number: int, **home: Any) -> Device:
    """A device that has its key and the server's certificate; `home` gives others."""
    own = {"key": Path(f"dev-{number}"), "ca": Path("certs/ca.pem"), "poll": 0.02}
    return Device(port, number, home=own | home)


def devices(port: int, count: int = CLIENTS) -> contextlib.AbstractContextManager[list[Device]]:
    return devices_harness.devices(*(device(port, c) for c in range(count)))


def split(recipe: dict[str, Any]) -> None:
    Path("recipe.toml").write_text(recipes.to_toml(recipes.make(recipe)))
    assert main(["fleet", "split", "-c", "recipe.toml", "--to", "rows", "-q"]) == 0


def served(port: int, pace: Pace = QUICK, folder: str = "keys") -> Served:
    return Served(Place("127.0.0.1", port, Path(folder), Path("certs")), pace=pace)


def serve(recipe: dict[str, Any], fleets: Served, heard: fleetune.Listener = fleetune.Silent()) -> TuneResult:  # noqa: B008
    return running.start(recipes.make(recipe), Path("real"), heard, offline=True, fleets=fleets)


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [(FEDSB | {"columns": "system='Be brief.'"}, ""), (FEDKSEED, "0,0,1"), (SIGNLORA, "")],
    ids=["fedit", "fedkseed", "signlora"],
)
def test_a_real_fleet_ends_in_the_digest_of_the_simulated_one(place, recipe, kinds, monkeypatch, capsys):
    """With `kinds`, device 1 has no memory to back-propagate, and device 2 does it instead: as the table of devices says."""
    able = lambda brings: (0,) if not kinds or "001" in brings.data else (0, 1)  # noqa: E731
    monkeypatch.setattr(worker, "fitting_kinds", lambda job, method, name, brings, base: (able(brings), base))
    simulated = fleetune.tune(recipes.make(recipe | {"kinds": kinds}), out="simulated")
    split(recipe)
    port = free_port()
    with devices(port) as joined, served(port) as fleets:
        heard = Heard()
        found = serve(recipe | {"drop": 0.9}, fleets, heard)
    said = "\n".join(heard.notes)
    assert "join NAME.invite --data ROWS.jsonl --model PATH" in said
    assert f"fleetune fleet invite NAME --port {port} --keys keys --certificate certs)" in said
    assert "drop only simulate" in said
    assert ("fleet join --train-turns, --columns system='..'" in said) == ("columns" in recipe)
    for name in ("digest", "bytes_up", "bytes_down", "tuned"):
        assert getattr(found.done, name) == getattr(simulated.done, name)
    assert [d.outcome for d in joined] == ["the run is finished"] * CLIENTS
    capsys.readouterr()
    assert main(["fleet", "devices", "latest", "--out", "real"]) == 0
    shown = capsys.readouterr()
    assert (f"--kinds {kinds}" in shown.out + shown.err) == bool(kinds)
    assert ("back-propagation" in shown.out) == bool(kinds)


def test_devices_that_hide_their_rows_do_the_steps_of_the_simulation(place, monkeypatch, capsys):
    """With all noise still, to the same bits; the server states epsilon for a row, and for all rounds."""
    monkeypatch.setattr(mechanism, "discrete_gaussian", lambda count: np.zeros(count, np.int64))
    settings = FEDKSEED["set"] | {"batch_size": 99, "backprop": 0.0}
    hidden = {"privacy": "example", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "aggregation": "mean:1"}
    recipe = FEDKSEED | hidden | {"set": settings, "keep": "best"}
    simulated = fleetune.tune(recipes.make(recipe), out="simulated")
    split(recipe)
    door = ["--port", str(port := free_port()), "--keys", "keys", "--certificate", "certs"]
    with devices(port) as joined:
        assert main(["fleet", "serve", "-c", "recipe.toml", "--out", "real", *door]) == 0
    found = fleetune.open("latest", out="real")
    head = ledgers.load(found.folder / "ledger.safetensors").head
    assert head.checks["3"] == simulated.digest
    stated = head.privacy
    assert "epsilon 8 at delta 1e-05 for adding or removing one row, after 3 rounds" in stated
    assert "noise of its own" in stated
    spent = [e["report"]["epsilon"] for e in rundir.events(found.folder) if e["event"] == "round"]
    assert spent == [8.0] * 3
    assert any("privacy: each row is hidden" in note for note in joined[0].notes)


@pytest.mark.parametrize("given", ["", 'aggregation = "mean"'], ids=["median", "mean:1"])
def test_the_rule_against_liars_is_in_the_recipe_that_is_recorded(place, given, request, capsys):
    """The simulation of that recipe ends in the same digest, though one client has far more rows than the others."""
    rule = request.node.callspec.id
    split(FEDIT)
    rows = [Path(f"rows/client-00{c}.jsonl").read_text().splitlines(keepends=True) for c in range(CLIENTS)]
    unlike = [rows[0][:1], rows[1][:1], [*rows[2], *rows[0][1:], *rows[1][1:]]]  # 1, 1 and 24 of them
    Path("clients").mkdir()
    for c, own in enumerate(unlike):
        for folder in ("clients", "rows"):
            Path(f"{folder}/client-00{c}.jsonl").write_text("".join(own))
    steps = {"set": FEDIT["set"] | {"steps": 0, "batch_size": 8, "scaffold": False}, "rounds": 1}
    written = recipes.to_toml(recipes.make(FEDIT | steps | {"data": "clients", "eval_data": "rows.jsonl"}))
    lines = [line for line in written.splitlines() if not line.startswith("aggregation")]
    Path("recipe.toml").write_text("\n".join([given, *lines]))
    port = free_port()
    door = ["--port", str(port), "--keys", "keys", "--certificate", "certs"]
    with devices(port):
        assert main(["fleet", "serve", "-c", "recipe.toml", *door, "--out", "real"]) == 0
    assert f"replies are combined by {rule}" in capsys.readouterr().err
    (run,) = fleetune.list_runs("real")
    recorded = recipes.read(run.folder / "run.toml")
    assert recorded["aggregation"] == rule
    assert fleetune.tune(recipes.make(recorded), out="simulated").done.digest == run.done.digest
    if given:
        plain = recipes.make(recorded | {"aggregation": "mean"})
        assert fleetune.tune(plain, out="simulated").done.digest != run.done.digest


def test_a_stopped_server_goes_on_with_devices_that_were_there_all_along(place, monkeypatch):
    monkeypatch.setattr(server, "PUBLISHED", 0.0)
    simulated = fleetune.tune(recipes.make(FEDIT), out="simulated")
    split(FEDIT)
    port = free_port()

    class StopAfterRound2(fleetune.Silent):
        rounds = 0

        def event(self, event: Any) -> None:
            self.rounds += event.event == "round"

        @property
        def stop_requested(self) -> bool:
            if self.rounds == 2:
                self.rounds = 0
                status_of_the_fleet("latest")
                assert main(["fleet", "stop", "latest", "--out", "real", "-q"]) == 0
            return False

    with devices(port) as joined:
        with pytest.raises(Interrupted) as stopped, served(port) as fleets:
            serve(FEDIT, fleets, StopAfterRound2())
        shown = fleet_status.look(run := run_in("real"))
        hint = str(stopped.value.hint)
        assert "fleet serve --resume" in hint
        # so that devices find it again, and are waited for as long
        assert hint.endswith(f" --port {port} --keys keys --certificate certs --grace 20")
        assert (shown.status, shown.replies["ok"]) == ("interrupted", 2 * CLIENTS)
        goes_on = Resumed()
        joined[1].leave.set()  # and one is replaced by a new process meanwhile
        joined[1].join(20)
        joined[1] = device(port, 1)
        joined[1].start()
        with served(port) as fleets:
            found = resuming.resume(run, goes_on, offline=True, fleets=fleets)
    assert found.done.digest == simulated.done.digest
    assert goes_on.rounds == {2}
    assert "resumed: it goes on at round 3 of 3" in goes_on.notes
    assert sum(" is back: client " in note for note in goes_on.notes) == CLIENTS
    assert all("the run goes on at round 3 of 3" in one.notes for one in joined)


def test_the_page_stays_after_the_end_and_tells_a_late_device_until_it_is_stopped(place, capsys):
    """Off a terminal too; the run's folder and the devices' have a log, the page's password is in none."""
    short = {**FEDKSEED, "rounds": 1, "set": {"K": 4, "tau": 1, "lr": 1e-2}}
    split(short)
    port, at = free_port(), free_port()
    late, seen = device(port, 2), list[str]()

    def watch() -> None:
        for _ in range(600):
            time.sleep(0.1)
            with contextlib.suppress(Exception):
                if fleet_status.lingers(run_in("real")):
                    break
        seen.append(httpx.get(f"http://127.0.0.1:{at}/").text)
        late.start()
        late.join(20)
        fleet_status.ask_to_stop(run_in("real"))

    beside = threading.Thread(target=watch, daemon=True)
    beside.start()
    door = ["--port", str(port), "--keys", "keys", "--certificate", "certs", "--page", str(at), "--wait", "2"]
    with devices(port, 2):
        assert main(["fleet", "serve", "-c", "recipe.toml", "--out", "real", *door]) == 0
    beside.join(20)
    assert "<title>finished" in seen[0]
    assert late.outcome == "the run is finished"
    shown = fleet_status.look(run := run_in("real"))
    assert (shown.devices[2].does, shown.status) == ("came after the end", "done")
    assert not fleet_status.lingers(run)
    assert "device dev-2 came after the end" in (run / "log.txt").read_text()
    assert "round 1 of 1: loss" in Path("state-0/log.txt").read_text()
    out, said = capsys.readouterr()
    assert f" next      fleetune eval {run}\n" in out  # no device holds rows out
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d 2 of 2 devices are ready$", said, re.M)


class Resumed(fleetune.Silent):
    """Looks, while devices are waited for, how many rounds are finished: on the bar, and as `fleet status` has it."""

    def __init__(self) -> None:
        self.rounds, self.waits, self.notes = set[int](), True, list[str]()

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        self.rounds |= {done} if what == "rounds" else set()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.waits &= not text.startswith(f"{CLIENTS} of {CLIENTS}")

    @property
    def stop_requested(self) -> bool:
        if self.waits:
            self.rounds.add(fleet_status.word_of(run_in("real"))["round"])
        return False


def status_of_the_fleet(run: str) -> None:
    """Ask for it as another process would, while the server has the folder."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["fleet", "status", run, "--out", "real"]) == 0
    assert all(f"dev-{c}" in out.getvalue() for c in range(CLIENTS))
    assert main(["fleet", "devices", run, "--out", "real"]) == 0


def test_the_door(place):
    """A stranger's key, a device without TLS, and one that trusts another server stay outside."""
    split(FEDKSEED)
    port = free_port()
    keys.make_certificate(Path("other"), ["localhost"])
    stranger, plain = device(port, 0, key=Path("stranger")), device(port, 1, ca=None)
    misled = device(port, 2, ca=Path("other/ca.pem"))
    with served(port) as fleets:
        with devices_harness.devices(stranger, plain, misled) as joined:
            for _ in range(200):
                if all(len(one.notes) > 1 for one in joined):
                    break
                time.sleep(0.05)
        assert "the server does not know this device's key: bring its .pub" in stranger.notes[1]
        assert "certificate is not trusted: " in misled.notes[1]
        assert "no server there" in plain.notes[1] or "answered" in plain.notes[1]
        assert not fleets._door.online()


def test_a_key_can_be_added_and_revoked_while_the_run_goes_on(place, monkeypatch):
    """The third device's key comes after the start; the first one's is removed after the first round."""
    monkeypatch.setattr(server, "LOOK", 0.0)
    split(FEDKSEED)
    Path("some").mkdir()
    for c in (0, 1):
        (Path("some") / f"dev-{c}.pub").write_bytes(Path(f"keys/dev-{c}.pub").read_bytes())
    port = free_port()
    notes: list[str] = []
    third = device(port, 2)

    class Watch(fleetune.Silent):
        def note(self, text: str) -> None:
            notes.append(text)
            if text.startswith("2 of 2"):
                (Path("some") / "dev-2.pub").write_bytes(Path("keys/dev-2.pub").read_bytes())
                (Path("some") / "odd.pub").write_text("no key")

            if "dev-2 may join" in text:
                third.start()

        def event(self, event: Any) -> None:
            if event.event == "round" and event.round == 1:
                (Path("some") / "odd.pub").unlink(missing_ok=True)
                (Path("some") / "dev-0.pub").unlink()

    with devices(port, 2) as joined, served(port, Pace(grace=2, poll=0.01), "some") as fleets:
        found = serve({**FEDKSEED, "clients": 2}, fleets, Watch())
        for one in (joined[0], third):
            one.leave.set()
    assert any(n.startswith("left out of the keys: some/odd.pub") for n in notes)
    assert any("dev-0 is revoked" in n for n in notes)
    assert any("dev-2 may join" in n for n in notes)
    assert any(re.match("round 2: dev-0 dropped: not there for ", n) for n in notes)
    assert any("the server has revoked this device's key" in n for n in joined[0].notes)
    replies = fates(run := run_in("real"))
    late = [e for e in replies if e["client"] == 0 and e["round"] > 1]
    assert [(e["round"], e["status"]) for e in late] == [(2, "dropped")]
    assert any(e["client"] == 2 and e["status"] == "ok" for e in replies)
    assert verify(run / FILE).bad == 0
    assert found.done.digest


def test_a_device_with_another_model_is_told_and_ends_and_so_does_the_server(place, monkeypatch, capsys):
    """No device is left that could come: every registered key has refused."""
    monkeypatch.setattr(server, "PUBLISHED", 0.0)
    split(FEDKSEED)
    models.tiny_llama(seed=1).save(Path("other"))
    Path("one").mkdir()
    Path("one/dev-0.pub").write_bytes(Path("keys/dev-0.pub").read_bytes())
    odd = device(port := free_port(), 0)
    odd.brings = Brings("rows/client-000.jsonl", "other", "cpu", 1, offline=True)
    odd.start()
    where = ["--port", str(port), "--keys", "one", "--certificate", "certs", "--out", "real", "--wait", "1"]
    assert main(["fleet", "serve", "-c", "recipe.toml", *where]) == 4
    odd.join(20)
    assert "tunes a model with digest" in str(odd.outcome)
    assert isinstance(odd.outcome, UsageError)
    said = capsys.readouterr()
    assert "device dev-0 takes no part: it has not the run's model in this revision" in said.out + said.err
    assert "no device can take part: 1 came; the last, dev-0: it has not the run's model in" in said.err
    run = run_in("real")
    assert rundir.status_of(run).startswith("failed: no device can take part")
    assert main(["fleet", "status", "latest", "--out", "real"]) == 0
    again = f"fleet serve --resume {run} --port {port} --keys one --certificate certs --wait 1"
    assert again in "".join(capsys.readouterr())
    made = (run / "run.toml").read_text()
    (run / "run.toml").write_text(made.replace('aggregation = "', 'aggregation = "median"  # "'))
    monkeypatch.setattr(prepare, "prepare", None)  # nothing is loaded
    (Path("one") / "odd.pub").write_text("no key")
    assert "median" in refused(capsys, *again.split(), "--out", "real", code=2)


@pytest.mark.usefixtures("own_cache")
def test_scales_of_a_compressed_model_are_tuned_to_the_same_digest(place, capsys):
    compressed(tiny(), Path("codes"))
    recipe = {**COMMON, "model": "codes", "method": "mezo", "train": "scales", "set": {"tau": 2, "lr": 0.05}}
    recipe |= {"aggregation": "mean:1", "rounds": 1}  # what a mean is where rows are what devices say
    split(recipe)
    port = free_port()
    joined = [device(port, number) for number in range(CLIENTS)]
    for one in joined:
        one.brings = dataclasses.replace(one.brings, model=f"copy-{one.number}.gguf")
    simulated = fleetune.tune(recipes.make(recipe), out="simulated")
    for one in joined:
        shutil.copy("codes/codes.gguf", one.brings.model)
    Path("codes/codes.gguf").unlink()
    capsys.readouterr()
    words = f"fleet serve -c recipe.toml --port {port} --keys keys --certificate certs --grace 20 --out real"
    with devices_harness.devices(*joined):
        assert main(words.split()) == 0
    assert "codes/codes.gguf, now written" in capsys.readouterr().err
    (run,) = fleetune.list_runs("real")
    assert run.done.digest == simulated.done.digest
    assert recipes.read(run.folder / "run.toml")["model"] == "codes/codes.gguf"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("serve -c recipe.toml --host 0.0.0.0", "needs TLS and registered keys"),
        ("serve -c recipe.toml --keys nowhere", "has no public keys"),
        ("serve -c recipe.toml --certificate model", "has no server.pem"),
        ("serve -c recipe.toml --port 0 --keys keys --wait 9", "9 devices, and 3 keys"),
        ("serve -c recipe.toml --grace -1", "cannot be negative"),
        ("serve more", "takes no 'more'"),
        ("serve", "fleetune fleet serve -c recipe.toml"),
        ("status", "status takes one"),
        ("eval model --rounds 3", "eval takes no rounds"),
        ("eval model --host 0.0.0.0", "needs TLS and registered keys"),
        ("eval model --wait -1", "cannot be negative"),
        ("join 127.0.0.1:1 --data rows.jsonl --held-out 1.5", "must be a whole number of rows"),
        ("join 127.0.0.1:1 --data rows.jsonl --held-out nan", "must be a whole number of rows"),
        ("join 127.0.0.1:1 --data rows.jsonl --held-out 1 --eval-data x", "both given"),
        ("join 127.0.0.1:1 --data rows.jsonl --max-load 50", "no share of the processors"),
        ("join 192.168.1.9:8470 --data rows.jsonl", "with TLS alone"),
        ("join nowhere --data rows.jsonl", "is not HOST:PORT"),
        ("join 127.0.0.1:99999 --data rows.jsonl", "is not HOST:PORT"),
        ("join 127.0.0.1:0 --data rows.jsonl", "is not HOST:PORT"),
        ("join ::1:23575 --data rows.jsonl", "[::1]:8470"),
        ("join 127.0.0.1:1", "which rows"),
        ("join 127.0.0.1:1 --data rows.jsonl --rounds 3", "rounds is the server's to say"),
        ("join 127.0.0.1:1 --data rows.jsonl --key rows.jsonl", "not an OpenSSH key"),
        ("keys new dev-0", "is there already"),
        ("keys certificate certs localhost", "is there already"),
        ("keys", "keys takes"),
        ("split -c recipe.toml", "where to"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(place, capsys, words, what):
    Path("recipe.toml").write_text(recipes.to_toml(recipes.make(FEDKSEED)))
    assert main(["fleet", *words.split()]) in (2, 4)
    assert what in capsys.readouterr().err


def test_serving_can_be_tried_without_a_device(place, capsys):
    Path("recipe.toml").write_text(recipes.to_toml(recipes.make(FEDKSEED)))
    before = sorted(Path().rglob("*"))
    door = ["--port", str(port := free_port()), "--keys", "keys", "--certificate", "certs"]
    (found,) = ok(capsys, "fleet", "serve", "-c", "recipe.toml", "--dry-run", *door)
    assert (found["clients"], found["held_out"]) == (3, 4)
    assert main(["fleet", "serve", "-c", "recipe.toml", "--dry-run", *door]) == 0
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port} · TLS, registered keys · 3 devices" in said
    assert "measures on 4 rows of rows.jsonl and uses no other; --eval-data rows.jsonl: on all" in said
    assert sorted(Path().rglob("*")) == before
    with socket.create_server(("127.0.0.1", port)):
        said = refused(capsys, "fleet", "serve", "-c", "recipe.toml", "--dry-run", *door, code=4)
    assert f"cannot listen on 127.0.0.1:{port}" in said


def test_an_evaluation_opens_the_door_of_its_run_where_no_flag_says_otherwise():
    args = build_parser("fleet").parse_args(["fleet", "eval", "latest", "--certificate", "new"])
    taken = flags.again(args, " --port 9 --keys 'my keys' --certificate certs --wait 3 --grace 20")
    assert taken == ["--port 9", "--keys 'my keys'"]
    assert (args.host, args.port, args.keys, args.certificate) == (None, 9, "my keys", "new")
    assert (args.wait, args.grace) == (None, None)  # of the run, not of what follows it
    more = flags.again(args, " --wait 3 --round-deadline 9", flags.DOOR[:7])
    assert more == ["--wait 3", "--round-deadline 9.0"]


def test_a_certificate_has_the_file_that_devices_trust_beside_it(place):
    Path("certs/ca.pem").rename("ca.pem")
    try:
        with pytest.raises(UsageError, match=r"has no ca\.pem"):
            Place(certificate=Path("certs")).check()
    finally:
        Path("ca.pem").rename("certs/ca.pem")


def test_the_line_for_devices_names_the_server_as_its_certificate_does(place):
    assert Served(Place("0.0.0.0", 8470, Path("keys"), Path("certs")), page="").line(own_model=True) == (
        "fleetune fleet join NAME.invite --data ROWS.jsonl --model PATH   "
        "(NAME.invite is made here: fleetune fleet invite NAME --host 0.0.0.0 --keys keys --certificate certs)"
    )
    keys.make_certificate(Path("both"), ["localhost", "fleet.example.org"])
    assert Place("0.0.0.0", 8470, Path("keys"), Path("both")).address() == "fleet.example.org:8470"
    assert Served(Place(certificate=Path("certs"))).line() == (
        "fleetune fleet join 127.0.0.1:8470 --data ROWS.jsonl --ca ca.pem"
    )
    assert keys.hosts_of(Path("certs/server.pem")) == ["localhost", "127.0.0.1"]
    Path("odd").mkdir()
    for name in ("server.pem", "server.key"):
        (Path("odd") / name).write_bytes(Path("certs/ca.pem").read_bytes())
    with pytest.raises(UsageError, match="no certificate of a server"):
        Served(Place("0.0.0.0", 8470, Path("keys"), Path("odd")))


def test_a_device_reads_its_rows_before_it_looks_for_a_server(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no file rows.jsonl" in refused(capsys, "fleet", "join", "127.0.0.1:1", "--data", "rows.jsonl")
    Path("rows.jsonl").write_text('{"ask": "Why?", "say": "So."}\n')
    said = refused(capsys, "fleet", "join", "127.0.0.1:1", "--data", "rows.jsonl")
    assert "rows.jsonl has the columns of no form" in said


def test_a_device_says_that_it_is_there_before_it_loads_torch(tmp_path):
    devices_harness.write_rows(str(tmp_path / "rows.jsonl"), 1, 9)
    script = (
        "import sys\n"
        "from fleetune.cli.main import main\n"
        "from fleetune.fleet import device\n"
        "device.stay = lambda *given, over, note: print('torch' in sys.modules)\n"
        "main(['fleet', 'join', '127.0.0.1:1', '--data', 'rows.jsonl'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_a_server_that_is_interrupted_at_once_names_the_command_that_goes_on(place):
    class Interrupts(fleetune.Silent):
        def note(self, text: str) -> None:
            if text.startswith("0 of 3 devices"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught, served(free_port()) as fleets:
        serve(FEDKSEED, fleets, Interrupts())
    assert caught.value.__notes__ == [f"fleetune fleet serve --resume {run_in('real')}"]


def test_a_server_says_how_long_it_will_look_for_a_rate(place, capsys, monkeypatch):
    monkeypatch.setattr(rates, "LONG", 0.0)
    Path("recipe.toml").write_text(recipes.to_toml(recipes.make({**FEDKSEED, "set": {"K": 4, "tau": 1}})))
    assert main(["fleet", "serve", "-c", "recipe.toml", "--dry-run", "--port", str(free_port())]) == 0
    said = capsys.readouterr().err
    assert re.search(
        "^finding lr on training rows: about .*; --set lr=NUMBER leaves the search out$", said, re.M
    )


@pytest.mark.parametrize("missing", ["cryptography", "uvicorn"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, missing):
    find = importlib.util.find_spec
    without = lambda name, *more: None if name == missing else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(UsageError, match=missing) as caught:
        Served(Place())
    assert pip_install("fleet") in str(caught.value.hint)


def test_a_port_in_use_and_a_second_process_of_a_device_are_refused(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = Place("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(FleetError, match="cannot listen"), Served(place):
            pass
    with devices_module._alone(Path("one")), pytest.raises(FleetError, match="another process"):
        devices_module._alone(Path("one"))
