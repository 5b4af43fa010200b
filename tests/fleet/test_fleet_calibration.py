"""Devices calibrate a compression: the artefact is that of the simulated clients, and nobody who lies or leaves stops it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices_harness import Device, Direct, Door, devices, direct, free_port, numbered, simulated, worker

import fleetune
from command_line import refused
from fleetune.cli.main import main
from fleetune.compression.layerwise.federated import check_sums, on_grid
from fleetune.errors import DataError, FleetError, Interrupted, MessageError, UsageError
from fleetune.fleet import calibration_server
from fleetune.fleet.audit import FILE, verify
from fleetune.fleet.orders import Device as Told
from fleetune.fleet.orders import DeviceReply, Order
from fleetune.fleet.table import Devices
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode
from heard import Heard

OPTIONS: dict[str, Any] = {"settings": {"group": 8}, "windows": 10, "length": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Heard]:
    """A run, and what its simulated clients' calibration said; devices are numbered."""
    place, heard = tmp_path_factory.mktemp("calibration"), Heard()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run = simulated("adapter")
        fleetune.compress(run, calibrate="clients", out="simulated", listener=heard, **OPTIONS)
    return place, heard


@pytest.fixture
def place(made: tuple[Path, Heard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in made[0].iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "runs").unlink()
    shutil.copytree(made[0] / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def want(made: tuple[Path, Heard]) -> Heard:
    return made[1]


def compressed(link: Direct, heard: Heard, **more: Any) -> Any:
    served: Any = Door(link)
    return fleetune.compress("latest", calibrate="fleet", served=served, listener=heard, **OPTIONS | more)


def resumed(link: Direct, heard: Heard) -> Any:
    served: Any = Door(link)
    return fleetune.resume_compression("latest", served=served, listener=heard)


def digest(heard: Heard) -> str:
    return str(heard.of("done")[-1].digest)


REPLY = ("block", "client", "status", "bytes_up", "bytes_down")


def replies(heard: Heard) -> list[tuple[Any, ...]]:
    return [tuple(getattr(e, n) for n in REPLY) for e in heard.of("client")]


def test_over_the_network_the_artefact_is_that_of_the_simulated_clients(place, want, capsys):
    numbered(Path("runs/latest").resolve())
    port = free_port()
    small = ["--set", "group=8", "--windows", "10", "--length", "32", "--wait", "2", "--port", str(port)]
    with devices(*(Device(port, c) for c in (1, 0))) as joined:
        assert main(["compress", "latest", "--calibrate", "fleet", *small, "--json"]) == 0
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    done = events[-1]
    assert done["digest"] == digest(want)
    told = [tuple(e[n] for n in REPLY) for e in events if e["event"] == "client"]
    assert told == replies(want)
    assert "treat them as private data" in err
    assert [str(d.outcome) for d in joined] == ["the compression is finished"] * 2
    assert not list(Path().glob("state-*/run-*/calibration"))
    folder = Path(done["folder"])
    assert not (folder / "parts").exists()
    assert [m.name for m in Devices(folder).members] == ["device-0", "device-1"]


def test_no_more_answers_are_on_their_way_than_memory_is_meant_for(place, want, monkeypatch):
    monkeypatch.setattr(calibration_server, "ON_THE_WAY", 1)
    link, heard = direct(), Heard()
    seen: list[int] = []
    link.change = lambda key, order, reply: seen.append(len(link.queue)) or reply  # type: ignore[func-returns-value]
    compressed(link, heard)
    assert (digest(heard), replies(heard)) == (digest(want), replies(want))
    assert seen[-4:] == [0] * 4  # of the blocks: whoever answers, nobody else was asked meanwhile


@pytest.mark.parametrize("answered", [False, True], ids=["before its work", "after its work"])
def test_a_device_that_is_killed_goes_on_from_its_disk(place, want, answered):
    link, heard = direct(), Heard()

    before = Path("states-before")

    def change(key: str, order: Order, reply: bytes) -> bytes | None:
        if (key, order.what, order.round) == ("k1", "block", 0):
            (states,) = Path("direct-1").glob("run-*/calibration/states-0000*")
            shutil.copy(states, before)
        if (key, order.what, order.round, link.marks["k1"]) != ("k1", "block", 1, 0):
            return reply
        if not answered:
            (states,) = Path("direct-1").glob("run-*/calibration/states-0001*")
            before.rename(states.with_name("states-0000.safetensors"))
            states.unlink()
        Path("direct-1/answer").unlink()
        link.marks["k1"], link.workers["k1"] = 1, worker(1)
        return None

    link.change = change
    compressed(link, heard)
    assert link.marks["k1"] == 1
    assert digest(heard) == digest(want)
    assert replies(heard) == replies(want)


def test_a_stopped_compression_goes_on_with_the_same_devices(place, want, capsys):
    stopped = Heard(lambda heard: len(heard.of("block")) == 1)
    with pytest.raises(Interrupted) as caught:
        compressed(direct(), stopped)
    assert "fleetune compress --resume runs/0002" in str(caught.value.hint)
    heard = Heard()
    with pytest.raises(UsageError, match="a place where devices join"):
        fleetune.resume_compression("latest")
    resumed(direct(), heard)  # new processes on the devices too
    assert digest(heard) == digest(want)
    assert {e.block for e in heard.of("client")} == {1}
    folder = Path(heard.of("done")[0].folder)
    assert verify(folder / FILE).bad == 0
    taken = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    assert [(e["block"], e["client"]) for e in taken if e["what"] == "ok"] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert main(["fleet", "audit", str(folder), "-q"]) == 0
    assert "was calibrated by devices" in refused(capsys, "measure", str(folder), "--kept-gain")


def spoilt(kind: str, reply: bytes) -> bytes:
    """The answer of a device that lies about its sums."""
    whole = DeviceReply.decode(reply)
    if kind == "fails":
        return DeviceReply("failed", whole.nonce, whole.round, code="storage").encode()
    message = decode(whole.body)
    arrays, scalars = message.payload.arrays, message.payload.scalars
    other = max(n for n in arrays if "o_proj" in n)
    scalars = {n: (other if "k_proj" in n else v) for n, v in scalars.items()}
    body = encode(Message(message.round, message.base, Payload(arrays, scalars)))
    return DeviceReply("done", whole.nonce, whole.round, body).encode()


LIES = {
    "says that others share an input": "not about the layers of the block",
    "fails": "its disk takes no more",
}


@pytest.mark.parametrize("kind", LIES)
def test_a_device_that_lies_is_left_out_and_the_others_go_on(place, kind, monkeypatch):
    monkeypatch.setattr(calibration_server, "ON_THE_WAY", 1)  # the liar answers first
    link, heard = direct(), Heard()
    link.change = lambda key, order, reply: (
        spoilt(kind, reply) if (key, order.what, order.round) == ("k0", "block", 0) else reply
    )
    compressed(link, heard)
    assert [r[:3] for r in replies(heard)] == [(0, 0, "refused"), (0, 1, "ok"), (1, 1, "ok")]
    assert LIES[kind] in heard.of("client")[0].reason
    assert any("block 1: client 0 is left out" in n and LIES[kind] in n for n in heard.notes)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, ""),
        ({1: 2.5}, "'x' is no sum of x x\\^T: row 1 makes it not positive semidefinite"),
        ({4: -2.5}, "row 2 makes it not positive semidefinite"),
        ({0: 0}, "row 1 makes it not positive semidefinite"),
        ({0: -1}, "1 sums of squares below zero"),
        ({0: np.inf}, "1 values that are not finite"),
        ({2: 1e12}, "holds a mean square of 5e\\+10, agreed was 4.29e\\+09"),
    ],
)
def test_sums_that_no_inputs_have_are_refused(change, what):
    """The triangle of three inputs; at 0, 2 and 5 are their squares."""
    x = np.array([[1, 1, 0.5], [1, 1, 1], [1, -1, 1], [1, 1, 2]], np.float32)
    sums = (x.T @ x)[np.tril_indices(3)]
    for at, value in change.items():
        sums[at] = value if abs(value) != 2.5 else value * sums.max()
    if not what:
        assert check_sums("x", sums, 3, 10) == pytest.approx((x**2).sum() / 3 / 20)
        return
    with pytest.raises(MessageError, match=what):
        check_sums("x", sums, 3, 10)


def test_without_any_device_it_stops_and_stays_stopped(place):
    link = direct()
    link.change = lambda key, order, reply: b"?" if order.what == "block" else reply
    with pytest.raises(FleetError, match="no device is left in block 0"):
        compressed(link, Heard())
    with pytest.raises(UsageError, match="all devices that began this compression were left out"):
        resumed(direct(), Heard())


def test_a_device_with_too_little_text_takes_no_part(place):
    Path("short.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    link, heard = direct(), Heard()
    link.workers["k0"] = worker(0, data="short.jsonl")
    compressed(link, heard)
    assert {r[1] for r in replies(heard)} == {1}
    assert any("device-k0 is left out: sums over" in n for n in heard.notes)
    link.workers |= {f"k{c}": worker(c, data="short.jsonl") for c in range(2)}
    with pytest.raises(DataError, match="no device can calibrate on windows of 32 tokens"):
        compressed(Direct(link.workers), Heard())


def test_what_is_agreed_is_bounded_by_the_rows(place):
    told, base = Told(2, "a" * 64, 1, 1, "0"), bytes(8)

    def share(windows: object) -> int:
        scalars: Any = {"windows": windows}
        message = encode(Message(0, base, Payload({}, scalars)))
        return calibration_server._windows(message, told, {"windows": 9, "length": 32}, 48, base)

    assert share(3) == 3  # two rows of 48 tokens
    for odd in (0, 4, True, 1.0, -1):
        with pytest.raises(MessageError):
            share(odd)


FLEET = ("--calibrate", "fleet", "--port", "0")  # any free port
BAD = {
    "a plain model": (["model", *FLEET], "only a run has clients"),
    "a door for nobody": (["latest", "--port", "1"], "--port is for devices that join"),
    "a door for clients": (["latest", "--calibrate", "clients", "--keys", "x"], "--keys is for devices"),
    "no calibration": (["latest", *FLEET, "--method", "rtn", "--set", "group=8"], "is not calibrated"),
    "long windows": (["latest", *FLEET, "--length", "99999", "--set", "group=8"], "longer than the model's"),
    "an open door": (["latest", *FLEET[:2], "--host", "0.0.0.0"], "needs TLS and registered keys"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_before_any_device_joins(place, case, capsys):
    words, what = BAD[case]
    assert what in refused(capsys, "compress", *words)
    assert len(list(Path("runs").iterdir())) == 2


def test_a_dry_run_needs_no_device(place, capsys):
    small = ["--set", "group=8", "--length", "32"]
    assert main(["compress", "latest", "--calibrate", "fleet", *small, "--dry-run"]) == 0
    assert "training rows of the devices that join" in capsys.readouterr().err


@pytest.mark.slow
def test_a_ledger_is_replayed_as_the_server_replays_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    simulated("ledger")
    want, heard = Heard(), Heard()
    fleetune.compress(Path("runs/latest"), calibrate="clients", out="simulated", listener=want, **OPTIONS)
    compressed(direct(), heard)
    assert (digest(heard), replies(heard)) == (digest(want), replies(want))


def test_of_a_sealed_run_the_server_sees_sums_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are bit for bit those of the simulated clients, on a grid; with too few devices there is none."""
    monkeypatch.chdir(tmp_path)
    run = simulated("ledger", layers=1, rows=60, clients=3, privacy="sealed")
    want, heard, seen = Heard(), Heard(), list[dict[str, np.ndarray]]()
    fleetune.compress(run, calibrate="clients", out="simulated", listener=want, **OPTIONS | {"windows": 15})
    link = Direct({f"k{c}": worker(c) for c in range(3)})

    jobs = list[bytes]()

    def look(key: str, order: Order, reply: bytes) -> bytes:
        if order.what == "job":
            jobs.append(order.encode())
        if order.what == "block":
            seen.append(dict(decode(DeviceReply.decode(reply).body).payload.arrays))
        return reply

    link.change = look
    compressed(link, heard, windows=15)
    assert digest(heard) == digest(want)
    assert seen == [{}] * 3
    with pytest.raises(DataError, match="it has calibrated one compression"):
        compressed(Direct(link.workers), Heard(), windows=15)  # of other members, it would show one device's
    for noted in tmp_path.rglob("calibrated.json"):
        noted.unlink()

    link = Direct({f"k{c}": worker(c) for c in range(3)})
    link.change = lambda key, order, reply: (
        spoilt("fails", reply) if (key, order.what) == ("k0", "masked") else reply
    )
    with pytest.raises(FleetError, match="block 0 has no secure sum: 2 clients are left, and 3 are needed"):
        compressed(link, Heard(), windows=15)
    heard = Heard()
    with pytest.raises(FleetError, match="block 0 has no secure sum") as again:
        resumed(Direct(link.workers), heard)
    assert "none masks a block twice" in str(again.value.hint)
    assert not heard.of("client")  # nobody is asked again, or left out
    reply = DeviceReply.decode(worker(2, least=4).answer(jobs[0]))
    assert (reply.what, reply.code) == ("refused", "no-sum 4")


def test_integers_of_sums_that_could_not_be_added_are_refused() -> None:
    assert on_grid("x", np.array([1.5, -0.25], np.float32), 3).tolist() == [3 << 19, -(1 << 18)]
    for odd in (np.nan, np.inf, 2.0**42):
        with pytest.raises(MessageError, match="too large for a secure sum of 3 devices"):
            on_grid("x", np.array([odd], np.float32), 3)
