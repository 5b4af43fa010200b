"""A server that lies: it writes, reads and removes nothing on a device, fills no memory, and reads no row."""

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices_harness import RECIPES, Device, Wire, devices, door, entered, free_port
from torch.nn.modules.module import register_module_forward_pre_hook

import fleetune
from fleetune import adapters, data, models, subject
from fleetune.common import sums
from fleetune.common.hearing import hearing
from fleetune.common.memory import peak_rss, release_memory, rss
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.experts import parameters_of
from fleetune.compression.layerwise.federated import from_lower_triangle
from fleetune.data import Encoded
from fleetune.data.encode import digest, encode_rows
from fleetune.errors import DataError, Interrupted, LedgerError, MessageError, StorageError
from fleetune.fleet import calibration_device, eval_device, eval_server, result
from fleetune.fleet.calibration_device import Calibration
from fleetune.fleet.device_state import MARK, DeviceState
from fleetune.fleet.door import Door
from fleetune.fleet.orders import Declined, DeviceReply, Job, Order
from fleetune.fleet.worker import Brings, Worker
from fleetune.runs.listener import Silent
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.view import View
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode
from fleetune.tuning.methods import _zeroth, mezo
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.run import run as running

RUN = "d" * 32
SET = {"r": 2, "steps": 1, "dropout": 0.0}
ADAPTER = Path("adapter-5")  # as `saved` names it
SCAFFOLD = {**SET, "scaffold": True}
WORDS = ("wolpertinger", "seropositive", "quokkahaus", "Obersulm")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows whose words are found nowhere else."""
    place = tmp_path_factory.mktemp("hostile")
    models.tiny_llama(layers=2).save(place / "model")
    for c in range(2):
        said = [f"{WORDS[i % 4]} {i} {WORDS[(i + 1) % 4]} {c}" for i in range(12)]
        rows = [{"instruction": f"who is patient {c} {i}?", "response": s} for i, s in enumerate(said)]
        (place / f"rows-{c}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return entered(made, tmp_path, monkeypatch)


@functools.cache
def base_digest(dtype: str = "fp32") -> str:
    return models.load("model", device="cpu", dtype=dtype).digest


def encoded(client: int = 0) -> list[Encoded]:
    return encode_rows(models.load("model", device="cpu"), data.read(f"rows-{client}.jsonl"), 48)[0]


def job(**changes: Any) -> dict[str, Any]:
    """A job as a server may send it, with fields that `Job` would not let it have."""
    whole = Job(RUN, "fedit", SET, "tiny", base_digest(), "fp32", 48, (), 3)
    return {**json.loads(whole.to_json()), **changes}


def worker(**more: Any) -> Worker:
    return Worker(Brings("rows-0.jsonl", "model", "cpu", 1, offline=True, **more), Path("state"))


def ask(device: Worker, what: str, body: bytes, round: int = 0) -> DeviceReply:
    return DeviceReply.decode(device.answer(Order(what, round, body=body).encode()))


def take(device: Worker, **changes: Any) -> DeviceReply:
    return ask(device, "job", json.dumps(job(**changes)).encode())


def ready(task: str = "tune", **changes: Any) -> Worker:
    """A device that has taken a job of a task, which is about the result that `saved` saves."""
    device = worker(**{"eval": {"held_out": 4}, "calibrate": {"calibrate": True}}.get(task, {}))
    if task != "tune" and not changes.keys() & {"result", "method"}:
        changes["result"] = result.digest_of(ADAPTER if ADAPTER.exists() else saved())
    assert take(device, task=task, **changes).what == "ready"
    return device


def body(scalars: Mapping[str, Any], arrays: Mapping[str, Any] | None = None, round: int = 0) -> bytes:
    return encode(Message(round, bytes(8), Payload(dict(arrays or {}), dict(scalars))))


def sent_by(name: str, settings: dict[str, Any], round: int = 1) -> bytes:
    """What the server of a method sends at its start."""
    model, method = models.load("model", device="cpu"), methods.make(name, settings)
    return encode(Message(round, bytes(8), method.broadcast(method.init(model, 5))))


def files(**scalars: bytes) -> bytes:
    return body({result.FILE + n: b for n, b in scalars.items()})


def saved(seed: int = 5) -> Path:
    """A result to be measured: the start of an adapter by its seed."""
    model, folder = models.load("model", device="cpu"), Path(f"adapter-{seed}")
    methods.make("fedit", SET).init(model, seed)
    fleetune.adapters.save(model, folder)
    return folder


def brought(**more: Any) -> bytes:
    """An order's body that brings the result, and scalars."""
    return body(more | result.packed(ADAPTER))


# Files ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("run", ["x/../../victim", "../victim", "/victim", "x\0", "", f"{RUN}/..", "D" * 32])
def test_the_name_of_a_run_leads_nowhere(place, run):
    victim = place / "victim" / "result"
    victim.mkdir(parents=True)
    (victim / "precious.txt").write_text("mine")
    before = sorted(place.rglob("*"))
    device = worker(held_out=4, calibrate=True)
    for task in ("eval", "calibrate", "tune"):
        assert take(device, run=run, task=task, result="e" * 64).code == "order"
        for what in ("eval", "begin", "block"):
            assert ask(device, what, files(**{"evil.py": b"import os"})).code == "no-job"
        device.answer(Order("end").encode())
    assert [p for p in sorted(place.rglob("*")) if "state" not in p.parts] == before
    assert (victim / "precious.txt").read_text() == "mine"


def test_a_folder_of_the_run_that_leads_elsewhere_or_was_not_made_here_is_left_alone(place):
    victim = place / "victim"
    (victim / "result").mkdir(parents=True)
    (victim / "result" / "precious.txt").write_text("mine")
    device = worker(held_out=4)
    Path("state").mkdir()
    (Path("state") / f"run-{RUN}").symlink_to(victim)
    assert take(device, task="eval", result="e" * 64).code == "storage"
    assert "leads out of" in device.ended
    (Path("state") / f"run-{RUN}").unlink()
    ours = Path("state") / f"run-{RUN}" / "result"
    ours.mkdir(parents=True)
    (ours / "precious.txt").write_text("mine")
    assert take(device, task="eval", result="e" * 64).what == "ready"
    assert ask(device, "eval", files(**{"module.json": b"{}"})).code == "storage"
    assert [p.name for p in ours.iterdir()] == ["precious.txt"]
    assert [p.name for p in (victim / "result").iterdir()] == ["precious.txt"]


def test_a_folder_is_emptied_where_this_device_made_it(tmp_path):
    own = DeviceState(tmp_path / "state")
    folder = own.renewed(own.run(RUN) / "result")
    (folder / "old").write_text("x")
    own.renewed(folder)
    assert [p.name for p in folder.iterdir()] == [MARK]
    own.remove(folder)
    assert not folder.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"on": 1, "blocks": {}, "rows": [], "known": []}'])
def test_what_was_noted_and_is_damaged_allows_nothing_and_is_named(tmp_path, text):
    own, job = DeviceState(tmp_path), Job(RUN, "fedit", {}, "m", "b" * 64, "fp32", 8, (), 0, "eval", "c" * 64)
    (tmp_path / "secret").write_bytes(bytes(32))
    for name, call in (
        ("calibrated.json", lambda: own.allow_calibration("r", job, 1, 8, note=False)),
        ("calibrated.json", lambda: own.allow_block(0, "m")),
        ("measured.json", lambda: own.allow_measurement("r", job)),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(StorageError) as caught:
            call()
        assert name in str(caught.value.hint)


# Memory -----------------------------------------------------------------------------------------------
def lora(rank: int, columns: int = 1) -> bytes:
    arrays = {
        f"model.layers.0.self_attn.q_proj.lora_{which}.weight": np.zeros((rank, columns), np.float32)
        for which in "AB"
    }
    return body({"seed": 1}, arrays, 1)


def pool(arrays: dict[str, np.ndarray], **scalars: Any) -> bytes:
    """Sums of the steps over a pool of seeds, as a zeroth-order method sends them."""
    return body({"run_key": 1, "law": "hashed", **scalars}, arrays, 1)


MEZO = {"method": "mezo", "set": {"tau": 1, "K": 16}}
PRO = {"method": "fedkseed", "set": {"tau": 1, "K": 16, "pro": True}}
CHANCES = {"a": np.zeros((1, 16), np.int8), "p": np.ones(1 << 22, np.float32)}
BOMBS: dict[str, tuple[dict[str, Any], bytes]] = {
    "an adapter of another rank": ({}, lora(10**6)),
    "no arrays": ({}, body({"seed": 1}, {}, 1)),
    "sums of another pool": (MEZO, pool({"a": np.zeros((1, 1 << 22), np.int8)}, grid=1e-9, step=0)),
    "many pools": (MEZO, pool({"a": np.ones((1 << 18, 16), np.int8)}, grid=1e-9, step=0)),
    "probabilities of another pool": (PRO, pool(CHANCES, grid=float(np.float32(3e-7) / np.float32(256)))),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_message_larger_than_the_job_is_refused_before_it_is_taken(place, kind):
    changes, body = BOMBS[kind]
    device = ready(**changes)
    before, began = rss(), time.process_time()
    assert ask(device, "work", body, 1).code == "order"
    assert rss() - before < 64 << 20
    assert time.process_time() - began < 5


@pytest.mark.parametrize("r", [10**7, 3])
def test_an_adapter_that_states_another_size_than_its_tensors_is_refused(place, r):
    config = saved() / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": r}))
    sums.write(ADAPTER)
    device, before = ready("eval"), rss()
    assert ask(device, "eval", brought()).code == "model"
    assert rss() - before < 64 << 20


def test_work_that_would_take_more_memory_than_the_device_gives_ends(place, monkeypatch):
    device = worker(memory=rss() + (64 << 20))
    assert take(device).what == "ready"
    taken: list[int] = []

    def greedy(*args: object) -> bytes:
        hoard = []
        for _ in range(64):
            hoard.append(torch.ones(1 << 24))  # 64 MB
            taken.append(1)
        return b""

    monkeypatch.setattr("fleetune.fleet.worker.work", greedy)
    assert ask(device, "work", body({}, round=1), 1).reason.startswith("the work does not fit the")
    assert len(taken) < 16
    torch.ones(1 << 26)  # afterwards there is no bound


def test_a_device_remembers_few_rounds_and_one_client(place, monkeypatch):
    """A server that never lets it forget, or gives it other numbers, does not fill its disk."""
    monkeypatch.setattr("fleetune.fleet.worker.MEMORIES", 3)
    device, kept = ready(set=SCAFFOLD), (-1, 0)
    for round in range(1, 9):
        sent = sent_by("fedit", SCAFFOLD, round)
        reply = DeviceReply.decode(device.answer(Order("work", round, 4, 7, sent, kept).encode()))
        assert reply.what == "done"
        kept = reply.kept
    rounds = sorted(int(p.name[-11:-5]) for p in Path("state").glob("run-*/client-*"))
    assert rounds == [4, 5, 6, 7, 8]
    other = Order("work", 9, 5, 7, sent_by("fedit", SCAFFOLD, 9))
    assert DeviceReply.decode(device.answer(other.encode())).code == "order"
    assert {p.name[:13] for p in Path("state").glob("run-*/client-*")} == {"client-000004"}


# What a device has agreed to --------------------------------------------------------------------------
def test_a_device_does_the_orders_of_the_task_that_it_joined_for(place):
    device = worker()
    assert take(device, task="eval", result="e" * 64).code == "no-evaluation"
    assert take(device, task="calibrate", result="e" * 64).code == "no-calibration"
    assert take(device).what == "ready"
    for what in ("eval", "begin", "block"):
        assert ask(device, what, b"").code == "order"
    both = worker(held_out=4, calibrate=True)
    assert take(both, task="eval", result="e" * 64).what == "ready"
    assert ask(both, "begin", b"").code == "order"
    assert take(both, task="calibrate", result="e" * 64).what == "ready"
    assert ask(both, "eval", b"").code == "order"
    assert ask(both, "work", b"", 1).code == "order"


# Rows -------------------------------------------------------------------------------------------------
def sums_of(device: Worker, windows: int, length: int) -> np.ndarray | str:
    """What a server gets of block 0's first input when it asks for so many windows; or the code of the refusal."""
    begun = ask(device, "begin", brought(windows=windows, length=length))
    if begun.what != "done":
        return begun.code
    answer = decode(ask(device, "block", b"").body).payload
    (name,) = [n for n in answer.arrays if n.endswith(("q_proj", "k_proj"))]
    return from_lower_triangle(torch.from_numpy(answer.array(name).copy()), 32).numpy()


def tokens_in(more: np.ndarray, less: np.ndarray) -> list[int]:
    """The token by which two sums differ, by what each token of the vocabulary would add."""
    net = models.load("model", device="cpu").net
    with torch.inference_mode():
        x = net.model.layers[0].input_layernorm(net.get_input_embeddings().weight).numpy().astype(np.float64)
    distances = [np.abs(more - less - 2 * np.outer(v, v)).max() for v in x]
    return [int(np.argmin(distances))]


@pytest.mark.parametrize("guarded", [False, True])
def test_tokens_are_read_out_of_two_sums_where_a_device_lets_them(place, monkeypatch, guarded):
    ids = np.concatenate([row.ids for row in encoded()])
    if not guarded:
        monkeypatch.setattr(Calibration, "least_tokens", lambda self: 1)
        monkeypatch.setattr(DeviceState, "allow_calibration", lambda self, *asked, note: None)
        found: list[int] = []
        before = np.zeros((32, 32))
        for n in range(1, 9):
            now = sums_of(ready("calibrate"), n, 1)
            assert isinstance(now, np.ndarray)
            found += tokens_in(now, before)
            before = now
        assert found == ids[:8].tolist()
        return
    for n in (1, 2, 60, 143):
        assert sums_of(ready("calibrate"), n, 1) == "few-tokens 144"
    first = sums_of(ready("calibrate"), 150, 1)
    assert isinstance(first, np.ndarray)
    for n, length in ((151, 1), (149, 1), (75, 2), (10, 16)):
        assert sums_of(ready("calibrate"), n, length) == "calibrated 150 1"
    again = sums_of(ready("calibrate"), 150, 1)
    assert (again == first).all()  # the same sums tell nothing more


def test_a_digest_that_leaves_a_device_confirms_no_guess(place):
    told = [take(Worker(worker().brings, Path(name))).body for name in ("a", "a", "b")]
    digests = [json.loads(body)["rows_digest"] for body in told]
    assert digests[0] == digests[1] != digests[2]
    assert digest([encoded()]) not in digests
    assert (Path("a") / "secret").stat().st_mode & 0o777 == 0o600


@contextlib.contextmanager
def watched(port: int) -> Iterator[bytearray]:
    """Two devices at a server, through wires on which what they send is written down."""
    relays = [Wire(port) for _ in range(2)]
    sent = bytearray()
    joined = [Device(r.port, c, data=f"rows-{c}.jsonl", held_out=4) for c, r in enumerate(relays)]
    try:
        with devices(*joined):
            yield sent
    finally:
        for relay in relays:
            relay.close()
            sent += relay.sent


def shapes_of(ids: list[int]) -> Iterator[bytes]:
    """The ways in which a run of tokens may be written."""
    for dtype in ("<u2", "<i4", "<i8", ">i4"):
        yield np.array(ids).astype(dtype).tobytes()
    yield json.dumps(ids)[1:-1].encode()
    yield json.dumps(ids, separators=(",", ":"))[1:-1].encode()


def test_no_byte_that_leaves_a_device_is_of_its_rows(place, monkeypatch):
    """In joining, training, evaluating, calibrating and failing: neither words, nor tokens, nor an unkeyed digest."""
    monkeypatch.setattr(Door, "_is_called", lambda self, address: True)  # the wire has ports of its own
    recipe = {**RECIPES["adapter"], "data": "rows-0.jsonl", "clients": 2}
    streams: dict[str, bytearray] = {}

    def trained(out: str) -> Path:
        port = free_port()
        with door(port) as served, watched(port) as sent:
            streams[out] = sent
            running.start(recipes.make(recipe), Path(out), Silent(), offline=True, fleets=served)
        return Path(out, "latest").resolve()

    run = trained("training")
    port = free_port()
    with door(port) as served, watched(port) as sent:
        eval_server.evaluate(subject.open(str(run)), served, Silent(), offline=True)
    streams["evaluating"] = sent
    port, small = free_port(), {"windows": 10, "length": 32, "settings": {"group": 8}}
    with door(port) as served, watched(port) as sent:
        fleetune.compress(run, calibrate="fleet", served=served, out="c", **small)
    streams["calibrating"] = sent

    def failing(*args: object) -> bytes:
        raise DataError(f"the answer '{' '.join(WORDS)}' is not one of the label words")

    monkeypatch.setattr("fleetune.fleet.worker.work", failing)
    with contextlib.suppress(fleetune.errors.FleetError):
        trained("failing")
    assert b"rows" in streams["failing"]  # the code is there, the words are not
    for what, sent in streams.items():
        assert len(sent) > 2000, what
        low = bytes(sent).lower()
        assert not [w for w in WORDS if w.lower().encode() in low], what
        for rows in (encoded(0), encoded(1)):
            assert digest([rows]).encode() not in sent
            for row in rows:
                runs = [row.ids[i : i + 6].tolist() for i in range(0, len(row.ids) - 6, 3)]
                assert not any(shape in sent for ids in runs for shape in shapes_of(ids)), what


# What an attacker has found since -----------------------------------------------------------------------
def test_a_calibration_that_was_begun_in_one_job_is_checked_again_in_another(place):
    """The rows are cut by the job's max_length, so the windows of the same order may be others."""
    saved()
    device, asked = ready("calibrate", result="e" * 64), brought(windows=800, length=1)
    assert ask(device, "begin", asked).code == "order"  # it is another result than the job's
    stated = result.digest_of(ADAPTER)
    few = "few-tokens"
    for max_length, code in ((2, few), (3, few), (48, ""), (47, "calibrated"), (2, few)):
        assert take(device, task="calibrate", result=stated, max_length=max_length).what == "ready"
        assert ask(device, "begin", asked).code.partition(" ")[0] == code


def test_results_are_measured_a_few_times_and_to_a_few_digits(place, monkeypatch):
    monkeypatch.setattr("fleetune.fleet.device_state.MOST_MEASUREMENTS", 2)
    codes = []
    for seed in (10, 20, 30, 10):
        adapter = saved(seed)
        device = ready("eval", result=result.digest_of(adapter))
        reply = ask(device, "eval", body(result.packed(adapter)))
        codes.append(reply.code)
        if not reply.code:
            told = decode(reply.body).payload.scalars
            mean = float(told["tuned"]) / float(told["tokens"])
            assert abs(mean * 1e3 - round(mean * 1e3)) < 1e-6
    assert codes == ["", "", "measured 2", ""]
    assert not list(Path("state").glob("run-*/result"))


def test_a_model_made_for_it_tells_no_large_number(place, monkeypatch):
    """A loss of any size would hold several tokens: a mean is at most twice that of a guess."""
    losses = np.array([1e6, 2e6]), np.array([3, 4])
    monkeypatch.setattr(eval_device, "all_row_losses", lambda *asked: losses)
    told = decode(ask(ready("eval"), "eval", brought()).body).payload.scalars
    most = 2 * math.log(models.load_config("model").vocab_size)
    assert float(told["tuned"]) / float(told["tokens"]) == pytest.approx(most, abs=1e-3)


@pytest.mark.parametrize(("task", "what"), [("eval", "eval"), ("calibrate", "begin")])
def test_a_file_whose_head_is_large_is_not_read_and_nothing_is_left(task, what, place):
    """The reader of safetensors ends the process where memory is short."""
    files = {"file adapter_model.safetensors": (1 << 21).to_bytes(8, "little") + b"{" * (1 << 21)}
    more = {"windows": 150, "length": 1} if what == "begin" else {}
    assert ask(ready(task, result="e" * 64), what, body({**files, **more})).code == "order"
    assert not [p for p in Path("state").glob("run-*/*") if p.name in ("result", "calibration")]


def test_a_message_of_another_round_than_its_order_leaves_nothing(place):
    device = ready(set=SCAFFOLD)
    for round in (-10, 0, 2):
        assert ask(device, "work", sent_by("fedit", SCAFFOLD, round), 1).code == "order"
    assert not list(Path("state").glob("run-*/client-*"))


def test_folders_of_many_runs_fill_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("fleetune.fleet.device_state.RUNS", 3)
    own = DeviceState(tmp_path)
    for i in range(3):
        own.renewed(own.run(f"{i:032x}") / "result")
    own.run(f"{1:032x}")
    with pytest.raises(StorageError, match=r"3 runs have left folders .* in no other until some are removed"):
        own.run(f"{3:032x}")


@pytest.mark.parametrize("byte", [b"\x80", b"\x90"], ids=["maps", "lists"])
def test_nested_nothing_takes_no_memory(byte):
    tree = b"\xdc\x00\x08" + byte * 8
    for _ in range(6):
        tree = b"\xdc\x00\x08" + tree * 8  # 2 million of them
    body = b"\x94\x01\xc4\x00\x81\xa1a" + tree + b"\x80"
    data = b"FT1" + zlib.crc32(body).to_bytes(4, "little") + body
    before = rss()
    with pytest.raises(MessageError, match="more maps or lists"):
        decode(data)
    assert rss() - before < 64 << 20


def test_a_model_that_anybody_put_on_the_hub_is_not_fetched_for_a_server(place):
    device = Worker(Brings("rows-0.jsonl", "", "cpu", 1, offline=True), Path("state"))
    assert take(device, model="somebody/model-with-a-template").code == "model"
    assert "it is no built-in model" in device.ended


def measured(**changes: Any) -> str:
    """The code of a device's answer, which was started anew, to the order to measure the base as a job has it."""
    device = worker(held_out=4)
    assert take(device, task="eval", **changes).what == "ready"
    return ask(device, "eval", body({})).code


def test_held_out_rows_are_measured_at_one_length_and_few_times_whatever_a_server_chooses(place, monkeypatch):
    """Cut to 2, 3, 4 .. tokens, the base alone tells the rows token by token."""
    monkeypatch.setattr("fleetune.fleet.device_state.MOST_MEASUREMENTS", 3)
    assert measured(method="") == ""
    for length in (2, 3, 47, 49):
        assert measured(method="", max_length=length) == "measured-at 48"
    assert [measured(set={**SET, "r": r}) for r in (2, 3, 4)] == ["", "", "measured 3"]
    assert measured(method="") == ""  # known, so it tells nothing more
    monkeypatch.setattr("fleetune.fleet.device_state.MOST_MEASUREMENTS", 9)
    own, job_ = DeviceState(Path("state")), Job.from_json(json.dumps(job(method="", task="eval")))
    own.allow_measurement("rows", dataclasses.replace(job_, labels=("a", "b")))
    with pytest.raises(Declined, match="no other labels"):
        own.allow_measurement("rows", dataclasses.replace(job_, labels=("b", "a")))


def test_every_file_of_an_adapter_is_in_the_list_that_the_job_states(place):
    """Else one digest would stand for as many results as a server likes."""
    saved()
    listed = ADAPTER / "SHA256SUMS"
    listed.write_text("".join(x for x in listed.read_text().splitlines(True) if "safetensors" not in x))
    assert ask(ready("eval"), "eval", brought()).code == "order"


def test_windows_go_through_one_compressed_form_of_each_block(place):
    """Behind weights of the server's choice the sums of the same tokens are others, as many as it likes."""
    block = driver.linears_of(models.load("model", device="cpu"))[0][1]
    weights = {name: p.detach().numpy() for name, p in parameters_of(block, ()).items()}
    grids = json.dumps(dict.fromkeys(weights))

    def behind(times: float) -> DeviceReply:
        device = ready("calibrate")
        sums_of(device, 150, 1)
        arrays = {name: w * np.float32(times) for name, w in weights.items()}
        return ask(device, "block", body({"grids": grids}, arrays, 1), 1)

    first = behind(1.0)
    assert first.what == "done"
    device, begun = ready("calibrate"), {"windows": 150, "length": 1, **result.packed(ADAPTER)}
    for arrays, more in (({}, {"x": 1}), ({}, {"file x": b""}), ({"x": np.zeros(1)}, {})):
        assert ask(device, "begin", body({**begun, **more}, arrays)).code == "order"
    own = DeviceState(Path("state"))
    own.remove(own.run(RUN) / "calibration")  # the same compression from its beginning
    assert behind(1.0).body == first.body
    own.remove(own.run(RUN) / "calibration")
    assert behind(2.0).code == "calibrated 150 1"


@pytest.mark.parametrize("text", ["a" * (1 << 25), "a" * (1 << 25) + "\U0001f600"], ids=["narrow", "wide"])
def test_a_long_text_is_refused_before_it_is_taken(place, text):
    device, end = worker(), decode(Order("end").encode()).payload.scalars
    long = body({**end, "reason": text})
    whole = Order("job", body=text.encode()).encode()
    release_memory()
    before = rss()
    with pytest.raises(MessageError, match="malformed"):
        device.answer(long)
    assert DeviceReply.decode(device.answer(whole)).code == "order"
    assert peak_rss() - before < 1.5 * len(text)  # of the job, its bytes


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel bounds it there")
def test_an_order_is_read_in_the_memory_that_the_device_gives(place):
    data = Order("work", 1, body=bytes(1 << 28)).encode()
    device = worker(memory=1 << 20)
    with pytest.raises(MessageError, match="does not fit this device's memory"):
        device.answer(data)


def test_a_digest_of_rows_tells_nothing_of_what_a_server_chooses(place):
    """Equal digests would say that no row is longer, or that none has one of two swapped labels."""
    device = worker(held_out=4)
    told = [json.loads(take(device, max_length=n).body) for n in (4000, 4001, 4000)]
    for digests in ("rows_digest", "held_out_digest"):
        a, b, again = (one[digests] for one in told)
        assert a == again != b


def test_a_device_hears_that_it_shall_stop_in_a_measurement_of_curvature(place):
    settings = {"tokens": 2, "batch_size": 1, "steps": 1, "lanczos": 30, "curvature_rows": 1}
    device = ready(method="fedpeptao", set=settings)
    stops_at(device, 19, "work", sent_by("fedpeptao", settings), 1)


@pytest.mark.parametrize(("law", "most"), [("rademacher", 1 << 15), ("hashed", 1 << 12)])
def test_a_ledger_is_replayed_in_the_passes_of_any_run_and_a_stop_is_heard(tmp_path, law, most):
    model = models.tiny_llama()
    head = mezo.Method(law=law, K=4, lr=1e-3, eps=1e-3).empty(model, 5).head

    def saved(passes: int, stated: bool = False) -> Path:
        ids = np.arange(1, passes + 1, dtype=np.uint64) << np.uint64(32)
        ones = np.ones(passes, np.int32)
        ledger = Ledger(head, ids, ones, ones.astype(np.uint32))
        (ledger.with_check(1, "0" * 64) if stated else ledger).save(tmp_path / "ledger")
        return tmp_path / "ledger"

    with pytest.raises(LedgerError, match=f"takes {most + 1:,} passes over the weights, {most:,} at most"):
        result.put_on(model, saved(most + 1))

    def stop() -> None:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted), hearing(stop):
        result.put_on(model, saved(40, stated=True))
    with pytest.raises(LedgerError, match="states no digest"):
        result.put_on(model, saved(40))


def heard_of(device: Worker, what: str, content: bytes, round: int = 0) -> int:
    """How often a device may stop in an order, of whose blocks of a model none runs unheard; the last of them is a stop."""
    heard, ran = list[int](), list[int]()
    before = register_module_forward_pre_hook(
        lambda module, args: ran.append(len(heard)) if type(module).__name__.endswith("Layer") else None
    )
    with before:
        device.on_step = lambda client, number: heard.append(number)
        assert ask(device, what, content, round).what in ("done", "ready")
    assert ran == sorted(set(ran))
    assert 0 < len(ran) <= len(heard)
    return len(heard)


def stops_at(device: Worker, number: int, what: str, content: bytes, round: int = 0) -> None:
    left = iter(range(number))

    def step(client: int, step: int) -> None:
        if next(left, None) is None:
            raise Interrupted("stopped")

    device.on_step = step
    with pytest.raises(Interrupted):
        ask(device, what, content, round)


FORWARD: dict[str, Any] = {"r": 2, "P": 1, "batch_size": 2}


@pytest.mark.parametrize("objective", ["loss", "accuracy", "rouge_l"])
def test_a_stop_is_heard_before_each_block_of_a_model_whatever_the_objective(place, objective):
    settings = FORWARD | {"objective": objective}
    device, sent = ready(method="fwdllm", set=settings), sent_by("fwdllm", settings)
    count = heard_of(device, "work", sent, 1)
    (Path("state") / "answer").unlink()
    for number in (0, count // 3):
        stops_at(device, number, "work", sent, 1)


def test_the_last_move_of_many_directions_is_made_in_pieces_that_hear_a_stop(place, monkeypatch):
    device, moved = ready(method="fwdllm", set=FORWARD), list[int]()
    place_, heard = View.place, list[int]()

    def place_and_count(view: View, passes: Any) -> None:
        place_(view, passes)
        moved.append(len(heard))

    monkeypatch.setattr(View, "place", place_and_count)
    device.on_step = lambda client, number: heard.append(1)
    assert ask(device, "work", sent_by("fwdllm", FORWARD), 1).what == "done"
    assert device.loaded is not None
    assert len(heard) - moved[-1] >= len(adapters.export(device.loaded.model))


def test_a_stop_is_heard_between_the_rows_of_an_evaluation(place):
    assert heard_of(ready("eval", method=""), "eval", body({})) >= 4


def test_a_stop_is_heard_between_the_windows_of_a_calibration(place):
    saved()
    begin = brought(windows=1 << 30, length=4)
    stops_at(ready("calibrate"), 3, "begin", begin)
    device = ready("calibrate")
    assert device.loaded is not None
    windows = sum(len(row.ids) for row in device.loaded.rows) // 4  # as many as there are tokens for
    assert heard_of(device, "begin", begin) >= windows
    assert decode(ask(device, "begin", begin).body).payload.int("windows") == windows
    assert heard_of(device, "block", b"") == windows
    stops_at(device, windows // 2, "block", b"", 0)


def test_a_device_has_so_many_windows_at_most(place, monkeypatch):
    monkeypatch.setattr(calibration_device, "MOST", 200)
    device = ready("calibrate")
    began = ask(device, "begin", brought(windows=400, length=1))
    assert decode(began.body).payload.int("windows") == 200
    assert decode(ask(device, "block", b"").body).payload.int("tokens") == 200


def test_a_stop_is_heard_while_rows_are_read_and_encoded(place, monkeypatch):
    monkeypatch.setattr("fleetune.data.encode.CHUNK", 4)
    content, device, heard = json.dumps(job()).encode(), worker(), list[str]()
    device.on_step = lambda client, number: heard.append(traceback.extract_stack(limit=5)[0].name)
    assert ask(device, "job", content).what == "ready"
    assert heard.count("_collect") == 12
    assert heard.count("_chunks") == 12 // 4
    for number in range(0, len(heard), 3):
        stops_at(worker(), number, "job", content)


def test_a_servers_last_words_are_one_line(place):
    device = worker()
    whole = decode(Order("end", reason="over").encode()).payload.scalars
    for words in ("over\n  error: run this", "over\x1b[2J", "over\u200f", "o" * 1001):
        with pytest.raises(MessageError, match=r"malformed|reason = "):
            device.answer(encode(Message(0, bytes(16), Payload({}, {**whole, "reason": words}))))
    device.answer(Order("end", reason=f"over{80 * ' '}connected{2 * chr(0x3000)}to").encode())
    assert device.ended == "over connected to"


def test_sums_are_over_the_same_windows_of_one_model_whatever_a_job_says(place):
    """Behind weights that were placed, or in another type, they would be other sums of the same tokens."""
    device, stated = ready("calibrate"), result.digest_of(ADAPTER)
    whole = sum(len(row.ids) for row in encoded())

    def begin(windows: int) -> str:
        return ask(device, "begin", brought(windows=windows, length=1)).code

    def block(number: int, order: bytes = b"") -> DeviceReply:
        return ask(device, "block", order, number)

    assert begin(whole) == ""
    first = block(0).body
    dense = driver.linears_of(models.load("model", device="cpu"))[0][1]
    weights = {n: 5 * p.detach().numpy() for n, p in parameters_of(dense, ()).items()}
    order = body({"grids": json.dumps(dict.fromkeys(weights))}, weights, 1)
    behind = block(1, order).body
    assert begin(whole + 1) == ""  # as many windows as before: all of them
    assert block(0).code == "order"  # it stands in front of block 1
    assert block(1, order).body == behind
    DeviceState(Path("state")).remove(Path("state") / f"run-{RUN}" / "calibration")
    assert begin(whole) == "order"  # its model is no longer the one that it began with
    for dtype in ("bf16", "fp16"):
        changed = {"base": base_digest(dtype), "dtype": dtype}
        assert take(device, task="calibrate", result=stated, **changed).what == "ready"
        assert begin(whole) == f"calibrated {whole} 1"
    assert take(device, task="calibrate", result=stated).what == "ready"
    assert begin(whole) == ""
    assert block(0).body == first


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sums_are_made_in_any_type(place, dtype):
    device = ready("calibrate", base=base_digest(dtype), dtype=dtype)
    assert ask(device, "begin", brought(windows=150, length=1)).what == "done"
    assert ask(device, "block", b"").what == "done"


def test_a_device_makes_a_bounded_number_of_passes_in_all_forwards(place, monkeypatch):
    """They are made anew in each forward."""
    monkeypatch.setattr(_zeroth, "MOST_SWEEPS", 75)
    device, K = worker(), 4
    for law, tau, code in (("gaussian", 3, ""), ("gaussian", 16, "settings"), ("rademacher", 16, "settings")):
        settings = {"K": K, "law": law, "lr": 1e-6, "eps": 1e-3, "batch_size": 1, "tau": tau}
        assert take(device, method="mezo", set=settings).what == "ready"
        told = {"run_key": 7, "law": law, "grid": _zeroth.grid_of(1e-6), "step": 0}
        assert ask(device, "work", body(told, {"a": np.ones((1, K), np.int32)}, 1), 1).code == code
