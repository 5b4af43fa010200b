"""A device: it answers as a simulated client would, once for each order, and runs nothing that a server sends."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_harness import compressed, tiny
from devices_harness import write_rows
from pydantic import ValidationError

from fleetune import data, models
from fleetune.common.display import human_bytes
from fleetune.data import Batches, Encoded
from fleetune.data.encode import encode_rows
from fleetune.deploy.export import write as export
from fleetune.errors import FitError, FleetError, MessageError
from fleetune.evaluation.losses import pad_id
from fleetune.fleet.link import BURST, REST
from fleetune.fleet.orders import NOTHING_KEPT, REFUSED, Device, DeviceReply, Hidden, Job, Order, Secure
from fleetune.fleet.worker import ANSWER, Brings, Worker, fitting_kinds
from fleetune.models import loading
from fleetune.models.cache.cache import BLOCKS
from fleetune.models.shapes import Shape, shape_of
from fleetune.planning import device_cost
from fleetune.planning.plan import Workload
from fleetune.privacy import mechanism
from fleetune.privacy.mechanism import Privacy
from fleetune.privacy.secagg import SEALED as SHARES
from fleetune.privacy.secagg import Party
from fleetune.seeds.noise import derive
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode
from fleetune.tuning.rounds.local_work import Memories, work
from fleetune.tuning.rounds.sealed import ANNOUNCED

SET = {"r": 2, "steps": 2, "dropout": 0.0, "scaffold": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    models.tiny_llama(layers=2).save(folder / "model")
    write_rows(str(folder / "rows.jsonl"), 1, 13)
    return folder


@pytest.fixture(scope="module")
def job() -> Job:
    return Job("d" * 32, "fedit", SET, "tiny", models.tiny_llama(layers=2).digest, "fp32", 48, (), 3)


@pytest.fixture
def worker(place: Path, tmp_path: Path) -> Iterator[Worker]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield make_worker(place, tmp_path)
    torch.set_num_threads(threads)


def make_worker(place: Path, state: Path, **more: object) -> Worker:
    brings = Brings(str(place / "rows.jsonl"), str(place / "model"), "cpu")
    return Worker(dataclasses.replace(brings, **more), state)  # type: ignore[arg-type]


def take(worker: Worker, job: Job) -> DeviceReply:
    return DeviceReply.decode(worker.answer(Order("job", body=job.to_json().encode()).encode()))


@functools.cache
def start(place: Path) -> Payload:
    """What a method sends at its start."""
    method = methods.make("fedit", SET)
    return method.broadcast(method.init(loaded(place)[0], 5))


def message(place: Path, job: Job, round: int) -> bytes:
    """What the server of a run at its start sends."""
    return encode(Message(round, bytes.fromhex(job.base)[:8], start(place)))


def trained(worker: Worker, place: Path, job: Job, round: int, key: int = 7) -> DeviceReply:
    return DeviceReply.decode(
        worker.answer(Order("work", round, 0, key, message(place, job, round)).encode())
    )


def loaded(place: Path) -> tuple[models.Model, list[Encoded]]:
    model = models.load(str(place / "model"), device="cpu")
    return model, encode_rows(model, data.read(str(place / "rows.jsonl")), 48)[0]


def needs(shape: Shape, method: str, settings: dict[str, Any], batch: int) -> Iterator[int]:
    """The memory that a method's steps take with the base in memory, and in its file."""
    for base in ("memory", "mapped"):
        work, footprint = Workload(batch, 48, base=base), methods.make(method, settings).footprint(shape)
        yield sum(device_cost.memory(shape, work, footprint).values())


def test_its_reply_is_that_of_a_simulated_client(place, worker, job):
    told = take(worker, job)
    assert told.what == "ready"
    device = Device.from_json(told.body)
    assert (device.rows, device.threads) == (12, 1)  # one thread for so small a model, as in a simulated run
    assert device.memory > 1 << 28
    key, sent = derive(42, "local", 1, 3), message(place, job, 1)
    reply = DeviceReply.decode(worker.answer(Order("work", 1, 3, key, sent).encode()))
    method, memories = methods.make("fedit", SET), Memories()
    model, rows = loaded(place)
    batches = Batches(rows, pad_id(model), key, "cpu", 3)
    assert reply.body == work(method, model, batches, key, decode(sent), memories, lambda client, step: None)
    assert reply.kept == memories.kept()[3]
    assert reply.kept[0] == 1


def test_an_order_that_comes_again_is_answered_from_the_disk(place, tmp_path, worker, job):
    take(worker, job)
    order = Order("work", 1, 0, 7, message(place, job, 1)).encode()
    first = worker.answer(order)
    assert (tmp_path / ANSWER).stat().st_mode & 0o777 == 0o600
    fresh = make_worker(place, tmp_path)  # killed and started again; it has not even loaded the model
    assert fresh.answer(order) == first
    (tmp_path / ANSWER).unlink()
    take(fresh, job)
    again = DeviceReply.decode(fresh.answer(order))
    assert (again.body, again.kept) == (DeviceReply.decode(first).body, DeviceReply.decode(first).kept)


def test_an_order_is_gone_from_memory_when_its_work_begins(place, worker, job, monkeypatch):
    take(worker, job)
    data, left = bytearray(Order("work", 1, 0, 7, message(place, job, 1)).encode()), []
    monkeypatch.setattr(worker, "on_step", lambda client, step: left.append(len(data)))
    assert DeviceReply.decode(worker.answer(data)).what == "done"
    assert left
    assert not any(left)


def test_its_memory_follows_the_servers_word(place, tmp_path, worker, job):
    """A server that goes on from an earlier round gets what it would have got then."""
    take(worker, job)

    def step(round: int, kept: tuple[int, int], oldest: int = 0) -> DeviceReply:
        order = Order("work", round, 0, 100 + round, message(place, job, round), kept, oldest)
        return DeviceReply.decode(worker.answer(order.encode()))

    first = step(1, NOTHING_KEPT)
    second = step(2, first.kept)
    third = step(3, second.kept)
    assert [r.what for r in (first, second, third)] == ["done"] * 3
    back = step(3, second.kept)
    assert (back.body, back.kept) == (third.body, third.kept)
    assert step(2, first.kept).body == second.body
    assert step(3, second.kept, oldest=3).body == third.body
    files = sorted(p.name for p in (tmp_path / f"run-{job.run}").iterdir())
    assert files == ["client-000000.round-000002.ckpt", "client-000000.round-000003.ckpt"]
    lost = step(4, (1, first.kept[1]))
    assert lost.what == "failed"
    assert lost.code == "remembers 1"
    assert step(4, (3, 12345)).what == "failed"


def test_a_server_whose_orders_fail_at_once_fills_no_console(worker, job, caplog, monkeypatch):
    now = [1e6]
    monkeypatch.setattr("fleetune.fleet.link.time.monotonic", lambda: now[0])
    take(worker, job)
    for round in range(1, 200):
        worker.answer(Order("work", round, 0, 7, b"rubbish").encode())
    assert caplog.text.count("failed") == BURST
    now[0] += REST
    worker.answer(Order("work", 200, 0, 7, b"rubbish").encode())
    assert caplog.text.count("failed") == BURST + 1
    assert "(179 more lines like it were left out)" in caplog.text


def test_long_work_says_that_it_goes_on(place, worker, job, monkeypatch):
    notes = list[str]()
    worker.note = notes.append
    monkeypatch.setattr("fleetune.fleet.worker.SILENT", 0.0)
    take(worker, job)
    trained(worker, place, job, 1)
    assert [n.partition(":")[0] for n in notes] == [
        "loading goes on",
        "base in memory",
        "round 1 goes on",
        "round 1 of 3",
    ]


@pytest.mark.parametrize("body", [b"", b"rubbish", encode(Message(1, bytes(8), methods.Payload()))])
def test_a_message_that_is_none_fails_the_round_and_no_more(place, worker, job, body):
    take(worker, job)
    reply = DeviceReply.decode(worker.answer(Order("work", 1, 0, 7, body).encode()))
    assert reply.what == "failed"
    assert reply.reason
    good = trained(worker, place, job, 1)
    assert good.what == "done"
    assert decode(good.body).round == 1


CURVATURE = {"steps": 1, "batch_size": 1, "lanczos": 300, "curvature_rows": 400}
ALL_ANSWERS = {"P": 1, "batch_size": 161, "objective": "accuracy"}
MANY_TRIES = {"P": 200, "batch_size": 8, "objective": "rouge_l"}
BACKWARD = {"backprop": 0.5, "backprop_steps": 10**9}


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ({"base": "0" * 64}, "model", "the run tunes a model with digest 0000"),
        ({"method": "nothing"}, "settings", "nothing"),
        ({"set": {"r": 0}}, "settings", "r = 0"),
        ({"method": "fedkseed", "set": {"objective": "os:system"}}, "fault", "a function of the server's"),
        ({"set": {"steps": 10**9}}, "work 8000000000 25600", "asked for 8,000,000,000 rows' work in a round"),
        ({"set": {"epochs": 10**9}}, "work 16000000000 25600", "does 25,600 at most"),
        ({"method": "mezo", "set": {"tau": 10**9}}, "work 16000000000 25600", "does 25,600 at most"),
        ({"method": "fedpeptao", "set": CURVATURE}, "work 240001 25600", "asked for 240,001 rows' work"),
        ({"method": "fwdllm", "set": ALL_ANSWERS}, "work 25921 25600", "at most"),  # 161 answers of 161 rows
        ({"method": "fwdllm", "set": MANY_TRIES}, "work 27200 25600", "at most"),
        ({"method": "fedkseed", "set": BACKWARD}, "work 1000000000 25600", "at most"),
    ],
)
def test_a_job_that_it_cannot_do_is_refused_before_any_work(worker, job, change, code, reason):
    reply = take(worker, dataclasses.replace(job, **change))  # type: ignore[arg-type]
    assert (reply.what, reply.code) == ("refused", code)
    assert reason in worker.error.message == worker.ended


@pytest.mark.parametrize(
    ("method", "settings"),
    [("fedit", SET), *(("fedpetuning", {"module": module}) for module in ("adapter", "bitfit", "full"))],
)
def test_a_device_short_of_memory_refuses_to_load(place, tmp_path, job, monkeypatch, method, settings):
    worker = make_worker(place, tmp_path, memory=1 << 20)
    monkeypatch.setattr(models, "load", None)
    reply = take(worker, dataclasses.replace(job, method=method, set=settings))
    assert reply.code == "memory 1"
    assert isinstance(worker.error, FitError)
    assert f"{method} on this model takes about" in worker.error.message
    assert "this device has 1.0 MB" in worker.error.message


def test_scales_are_counted_with_the_base_in_its_file(place, tmp_path, job, monkeypatch):
    settings = {"module": "scales", "batch_size": 2}
    scales = dataclasses.replace(job, method="fedpetuning", set=settings, train="scales")
    shape = shape_of(models.load_config(str(place / "model")))._replace(params=1 << 30)
    monkeypatch.setattr("fleetune.fleet.worker.shape_of", lambda config: shape)
    memory, mapped = needs(shape, "fedpetuning", settings, 2)
    assert mapped < memory
    method = methods.make("fedpetuning", settings)
    brings = make_worker(place, tmp_path, memory=mapped).brings
    assert fitting_kinds(scales, method, str(place / "model"), brings, BLOCKS) == ((0,), BLOCKS)
    short = dataclasses.replace(brings, memory=mapped - 1)
    with pytest.raises(FitError):
        fitting_kinds(scales, method, str(place / "model"), short, BLOCKS)


def test_a_base_that_fits_only_in_its_file_is_left_there_which_is_told(place, tmp_path, job, monkeypatch):
    shape = shape_of(models.load_config(str(place / "model")))._replace(params=1 << 28)
    monkeypatch.setattr("fleetune.fleet.worker.shape_of", lambda config: shape)
    memory, mapped = needs(shape, "fedit", SET, 8)
    assert mapped < memory

    def told(ram: int, job: Job = job, **more: object) -> tuple[list[str], DeviceReply]:
        notes: list[str] = []
        worker = make_worker(place, tmp_path, memory=ram, **more)
        worker.note = notes.append
        return notes, take(worker, job)

    assert told(memory)[0] == ["base in memory"]
    notes, reply = told(memory - 1)
    assert notes == ["base mapped: the weights stay in their file"]
    assert (reply.what, Device.from_json(reply.body).memory) == ("ready", memory - 1)
    assert told(mapped - 1)[1].what == told(memory - 1, base="memory")[1].what == "refused"
    measures, half = dataclasses.replace(job, task="eval"), 8 * models.load(str(place / "model")).n_params
    assert told(half, measures, held_out=4)[0] == ["base in memory"]
    assert told(half - 9, measures, held_out=4)[0] == notes


def test_a_device_without_a_stated_memory_has_what_its_container_allows(place, tmp_path, job, monkeypatch):
    monkeypatch.setattr(loading, "usable_memory", lambda: 1 << 20)
    device = make_worker(place, tmp_path)
    assert take(device, job).what == "refused"
    assert "this device has 1.0 MB" in device.ended
    monkeypatch.setattr(loading, "usable_memory", lambda: 3 << 30)
    assert Device.from_json(take(make_worker(place, tmp_path), job).body).memory == 3 << 30


def test_it_says_which_kinds_of_work_fit_it_and_does_the_one_that_it_is_sent(place, tmp_path, job):
    mixed = {"K": 16, "tau": 2, "backprop": 0.5, "backprop_steps": 1, "batch_size": 4}
    run, method = dataclasses.replace(job, method="fedkseed", set=mixed), methods.make("fedkseed", mixed)
    shape = shape_of(models.load_config(str(place / "model")))
    workload = Workload(batch=4, length=48)
    forward, back = (sum(device_cost.memory(shape, workload, f).values()) for f in method.footprints(shape))
    assert forward < back
    worker = make_worker(place, tmp_path, memory=back - 1)
    told = Device.from_json(take(worker, run).body)
    assert told.kinds == (0,)
    assert (told.memory, told.speed > 0) == (back - 1, True)
    small = make_worker(place, tmp_path, memory=forward - 1)
    assert take(small, run).code == f"memory {(forward - 1) // 10**6}"
    assert f"takes about {human_bytes(forward)}" in small.ended
    both = make_worker(place, tmp_path, memory=back)
    assert Device.from_json(take(both, run).body).kinds == (0, 1)
    state = method.init(loaded(place)[0], 5)
    for client in (0, 1):  # the number of the client says nothing
        for (sent, spec), key in zip(method.kinds(state), (7, 8), strict=True):
            order = Order("work", 1, client, key, encode(Message(1, bytes.fromhex(job.base)[:8], sent)))
            reply = DeviceReply.decode(both.answer(order.encode()))
            assert decode(reply.body).payload.arrays.keys() == spec.arrays.keys()


def test_it_declines_while_there_is_a_reason_and_works_afterwards(place, tmp_path, job):
    reasons = ["battery", ""]
    worker = make_worker(place, tmp_path)
    worker.declines = lambda: reasons.pop(0)
    take(worker, job)
    order = Order("work", 1, 0, 7, message(place, job, 1)).encode()
    first = DeviceReply.decode(worker.answer(order))
    assert (first.what, first.code, first.round) == ("declined", "battery", 1)
    assert not (tmp_path / ANSWER).exists()
    done = worker.answer(order)
    assert DeviceReply.decode(done).what == "done"
    assert worker.answer(order) == done  # from the disk: it is not asked whether it would


def test_a_folder_of_the_servers_is_not_looked_for_on_the_device(place, tmp_path, job, monkeypatch):
    worker = make_worker(place, tmp_path, model="")
    monkeypatch.chdir(place)  # which has a folder "model"
    monkeypatch.setattr(models, "load", None)
    monkeypatch.setattr(models, "load_config", None)
    odd = "../model a/b/c ~/.bashrc ~/nothing model . a\\b x.gguf"
    for name in (str(place / "model"), *odd.split()):
        assert take(worker, dataclasses.replace(job, model=name)).code == "model"
        assert "which a device does not fetch by itself" in worker.ended


def test_the_end_of_a_run_is_heard(worker):
    DeviceReply.decode(worker.answer(Order("end", reason="the run is finished").encode()))
    assert worker.ended == "the run is finished"
    assert worker.error is None


def test_a_device_that_is_refused_ends_with_an_error(worker):
    worker.answer(Order("end", body=REFUSED, reason="it brings other rows").encode())
    assert isinstance(worker.error, FleetError)
    assert "it brings other rows" in worker.error.message


def test_a_run_of_blocks_maps_the_devices_file_and_one_without_any_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "cache"))
    compressed(tiny(), tmp_path / "codes")
    export(tmp_path / "codes", "gguf", tmp_path / "m.gguf")
    digest = models.load(str(tmp_path / "m.gguf"), device="cpu").digest
    settings = {"tau": 2, "K": 16, "lr": 0.05, "eps": 0.01}
    job = Job("e" * 32, "mezo", settings, "m.gguf", digest, "fp32", 48, (), 3, train="scales")
    worker = make_worker(place, tmp_path / "a", model=str(tmp_path / "m.gguf"))
    assert take(worker, job).what == "ready"
    server = models.load(str(tmp_path / "m.gguf"), device="cpu", base="mapped")
    server.trains = "scales"
    method = methods.make("mezo", settings)
    body = encode(Message(1, bytes.fromhex(digest)[:8], method.broadcast(method.init(server, 5))))
    assert DeviceReply.decode(worker.answer(Order("work", 1, 0, 3, body).encode())).what == "done"
    plain = models.load(str(place / "model"), device="cpu").digest
    other = make_worker(place, tmp_path / "b")
    assert take(other, dataclasses.replace(job, base=plain)).what == "refused"
    assert "no scales" in other.ended


def test_a_built_in_objective_may_have_its_argument(worker, job):
    settings = {"K": 16, "tau": 2, "batch_size": 1, "objective": "rouge_l:8"}
    assert take(worker, dataclasses.replace(job, method="fedkseed", set=settings)).what == "ready"


# Secure sums --------------------------------------------------------------------------------------------
SUM = Secure(4, 3, 1e3, 0.0)


def summed(job: Job, **more: float) -> Job:
    settings = {name: value for name, value in SET.items() if name != "scaffold"}
    return dataclasses.replace(job, set=settings, secure=dataclasses.replace(SUM, **more))


def ask(worker: Worker, what: str, arrays: dict[str, np.ndarray], round: int = 1) -> DeviceReply:
    body = encode(Message(round, b"", Payload(arrays)))
    return DeviceReply.decode(worker.answer(Order(what, round, 0, body=body).encode()))  # type: ignore[arg-type]


BEGIN = {"attempt": np.arange(16, dtype=np.uint8)}


def test_its_reply_to_a_secure_sum_never_leaves_it(place, worker, job):
    job, worker.note = summed(job), (notes := list[str]()).append
    assert take(worker, job).what == "ready"
    reply = trained(worker, place, job, 1)
    said = decode(reply.body).payload
    assert (reply.what, said.arrays, said.scalars) == ("done", {}, {})
    assert [note for note in notes if "round 1" in note and "to send" not in note] == notes[-1:]
    announced = ask(worker, "keys", BEGIN)
    others = {v: Party(v, 3, 4, b"", b"").keys().ljust(ANNOUNCED, b"\0") for v in (1, 2, 3)}
    told = np.array(sorted(others), np.uint32)

    def table(parts: dict[int, bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(parts[v] for v in sorted(parts)), np.uint8).reshape(len(parts), -1)

    shared = ask(worker, "shares", {"of": told, "rows": table(others)})
    assert announced.what == shared.what == "done"
    # the server says that nobody else has shared
    few = {"of": told[:1], "rows": np.zeros((1, SHARES), np.uint8)}
    assert ask(worker, "masked", few).code == "order"
    alone = {"of": np.array([0], np.uint32)}
    assert ask(worker, "reveal", alone).code == "order"
    again = make_worker(place, worker.state)  # it is restarted, and is still in the sum
    take(again, job)
    assert ask(again, "keys", BEGIN).body == announced.body


def test_an_open_run_has_no_sums_to_ask_for(worker, job):
    take(worker, job)
    assert ask(worker, "keys", BEGIN).code == "order"


@pytest.mark.parametrize(
    ("brings", "sum", "code"),
    [
        ({"least": 3}, None, "no-sum 3"),
        ({"least": 5}, SUM, "no-sum 5"),
        ({"epsilon": 8.0}, SUM, "no-noise"),
        ({"epsilon": 8.0}, None, "no-noise"),
    ],
)
def test_a_device_takes_part_in_the_sums_that_it_was_told_alone(place, tmp_path, job, brings, sum, code):
    declined = take(make_worker(place, tmp_path, **brings), dataclasses.replace(summed(job), secure=sum))
    assert (declined.what, declined.code) == ("refused", code)


def test_a_device_counts_its_own_budget_over_all_runs(place, tmp_path, job):
    """Two rounds of multiplier 2 are one of 2 / sqrt 2: the third would be beyond epsilon 2.3, in whichever run."""
    worker, job = make_worker(place, tmp_path, epsilon=2.3, delta=0.001), summed(job, noise=2.0)
    spent = [mechanism.epsilon(2 / math.sqrt(n), 1.0, 1, 0.001) for n in (1, 2, 3)]
    assert spent[1] < 2.3 < spent[2]
    assert take(worker, job).code == "budget"  # for all of its rounds
    job = dataclasses.replace(job, rounds=2)
    assert take(worker, job).what == "ready"
    assert [trained(worker, place, job, r, r).what for r in (1, 2)] == ["done", "done"]
    more = trained(worker, place, job, 3, 9)
    assert (more.what, more.code) == ("failed", "budget")
    again = make_worker(place, tmp_path, epsilon=2.3, delta=0.001)  # restarted, in the same run
    assert take(again, job).what == "ready"
    fresh = make_worker(place, tmp_path, epsilon=2.3, delta=0.001)
    assert take(fresh, dataclasses.replace(job, run="e" * 32, rounds=1)).code == "budget"


def test_a_method_that_keeps_memories_of_clients_is_in_no_secure_sum(worker, job):
    assert take(worker, dataclasses.replace(job, secure=SUM)).code == "settings"


FEW, CLIPS, NOISES = [{"least": 2}, {"clients": 5}, {"clients": 2}], (0.0, math.inf), (-1.0, 1e-9)


@pytest.mark.parametrize("odd", FEW + [{"clip": c} for c in CLIPS] + [{"noise": z} for z in NOISES])
def test_a_secure_sum_that_hides_nothing_is_no_job(odd):
    with pytest.raises((MessageError, ValidationError)):
        dataclasses.replace(SUM, **odd)


# Rows that the device hides ------------------------------------------------------------------------------
HIDDEN = Hidden(4.0, 1e-3, 1.0)
STEPS = 2  # of a round


def hiding(job: Job, batch: int = 99, **more: object) -> Job:
    settings = {name: value for name, value in SET.items() if name != "scaffold"} | {"batch_size": batch}
    return dataclasses.replace(job, set=settings, hidden=HIDDEN, **more)


def test_its_noise_is_its_own_and_costs_the_epsilon_of_the_run(place, tmp_path, job, monkeypatch):
    """By its own rows; and the steps are those of a simulated client, whose noise and sample are the same where both are still."""
    job = hiding(job, 4)
    worker = make_worker(place, tmp_path)
    assert take(worker, job).what == "ready"
    assert worker.loaded is not None
    hides = worker.loaded.hides
    assert hides is not None
    assert (hides.clip, hides.q, hides.N) == (1.0, 4 / 12, 12)
    spent = mechanism.epsilon(hides.noise, hides.q, job.rounds * STEPS, 1e-3)
    assert spent <= 4.0 < 1.02 * spent
    replies = [trained(worker, place, job, 1).body for _ in range(2)]
    assert replies[0] != replies[1]  # the server's key decides none of it
    monkeypatch.setattr(mechanism, "discrete_gaussian", lambda count: np.zeros(count, np.int64))
    monkeypatch.setattr("fleetune.data.encode.sample", lambda rows, q: list(rows)[:3])
    reply = trained(worker, place, job, 1)
    model, rows = loaded(place)
    batches = Batches(rows, pad_id(model), 7, "cpu", 0, Privacy(1.0, hides.noise, 4 / 12, 12))
    sent, method = decode(message(place, job, 1)), methods.make("fedit", job.set)
    assert reply.body == work(method, model, batches, 7, sent, Memories(), lambda client, step: None)
    assert decode(reply.body).payload.scalars["loss"] == 0.0


def test_it_counts_the_steps_of_a_run_whatever_the_server_says(place, tmp_path, job):
    """Over restarts, in rounds that come again, and where the job comes again with fewer rounds or a larger epsilon."""
    plain, job, notes = job, hiding(job), list[str]()
    for round in range(1, 4):
        worker = make_worker(place, tmp_path, epsilon=4.0, delta=1e-3)
        worker.note = notes.append
        assert take(worker, job).what == "ready"
        assert trained(worker, place, job, round).what == "done"
    assert notes[-1].startswith("round 3 of 3: ")
    assert "loss" not in notes[-1]  # none is told
    for round in (3, 4):
        more = trained(worker, place, job, round)
        assert (more.what, more.code) == ("failed", "budget")
    for other in (
        dataclasses.replace(job, rounds=1),
        dataclasses.replace(job, hidden=dataclasses.replace(HIDDEN, epsilon=90.0)),
        dataclasses.replace(job, run="e" * 32),
    ):
        assert take(make_worker(place, tmp_path, epsilon=4.0, delta=1e-3), other).code == "budget"
    assert take(make_worker(place, tmp_path), dataclasses.replace(job, rounds=1)).code == "budget"
    assert take(make_worker(place, tmp_path, epsilon=90.0), summed(plain, noise=9.0)).code == "unit"


@pytest.mark.parametrize(
    ("brings", "odd", "code"),
    [
        ({"epsilon": 3.9, "delta": 1e-3}, {}, "budget"),
        ({"epsilon": 4.0, "delta": 1e-4}, {}, "budget"),
        ({"least": 3}, {}, "no-sum 3"),
        ({"epsilon": 4.0}, {"hidden": None}, "no-noise"),
        ({}, {"hidden": dataclasses.replace(HIDDEN, delta=0.1)}, "settings"),
        ({}, {"rounds": 1_000_000}, "settings"),
        ({}, {"rounds": 0}, "settings"),
        ({}, {"set": SET}, "settings"),
        ({}, {"method": "fwdllm", "set": {}}, "settings"),
    ],
)
def test_a_run_that_hides_less_than_it_asks_for_is_refused(place, tmp_path, job, brings, odd, code):
    worker = make_worker(place, tmp_path, **brings)
    refused = take(worker, dataclasses.replace(hiding(job), **odd))
    assert (refused.what, refused.code) == ("refused", code)
    helps = f"this device allows {brings.get('epsilon', 0):g}: raise --epsilon"  # and names no file: nothing was spent
    assert (code == "budget") == (helps in str(worker.error and worker.error.hint))


def test_back_propagation_that_was_not_agreed_is_counted(place, tmp_path, job):
    """A message can ask fedkseed for other steps than its settings say: more of them than are accounted never leave."""
    job = dataclasses.replace(hiding(job), method="fedkseed", set={"K": 16, "tau": 1, "backprop_steps": 9})
    worker = make_worker(place, tmp_path)
    assert take(worker, dataclasses.replace(job, rounds=1)).what == "ready"
    method = methods.make("fedkseed", job.set)
    sent = method.broadcast(method.init(loaded(place)[0], 5))
    marked = Payload(sent.arrays, {**sent.scalars, "backprop": True})
    body = encode(Message(1, bytes.fromhex(job.base)[:8], marked))
    assert DeviceReply.decode(worker.answer(Order("work", 1, 0, 7, body).encode())).code == "budget"


@pytest.mark.parametrize(
    "odd", [{"dtype": "bf16"}, {"task": "eval"}, {"secure": SUM}, {"hidden": {"delta": 1}}]
)
def test_a_job_that_cannot_hide_rows_is_none(job, odd):
    with pytest.raises((MessageError, ValidationError)):
        dataclasses.replace(hiding(job), **odd)
