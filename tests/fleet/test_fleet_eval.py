"""A result is measured on the devices' own held-out rows, which they never train on; a device bounds nothing but itself."""

import hashlib
import json
import math
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices_harness import Device, Direct, Door, devices, free_port, simulated, worker, write_rows

from fleetune import data, models, subject
from fleetune.cli.main import main
from fleetune.common import files
from fleetune.common.events import DeviceEvaluated
from fleetune.data.encode import digest, encode_rows
from fleetune.errors import DataError, FleetError, FleetuneError, MessageError
from fleetune.evaluation.losses import response_loss
from fleetune.fleet import eval_server, keys, result, status
from fleetune.fleet.brings import divided
from fleetune.fleet.device_state import DeviceState
from fleetune.fleet.eval_server import FILE, disagreement, mean, measured, ratio
from fleetune.fleet.orders import Device as Told
from fleetune.fleet.orders import DeviceReply, Job, Order
from fleetune.fleet.table import Devices
from fleetune.tuning.exchange.messages import Message, Payload, encode
from fleetune.tuning.result import finished
from fleetune.tuning.rounds.fleets import Answer
from heard import Heard


@pytest.fixture(scope="module", params=["ledger", pytest.param("adapter", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that leaves a ledger or an adapter, and rows that it was not trained on."""
    place = tmp_path_factory.mktemp(str(request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        write_rows("own-0.jsonl", 100, 104)
        write_rows("own-1.jsonl", 200, 207)
        simulated(str(request.param))
    return place


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("runs/latest").resolve()


def own(number: int) -> dict[str, Any]:
    return {"eval_data": f"own-{number}.jsonl"}


def link() -> Direct:
    return Direct({f"k{c}": worker(c, **own(c)) for c in range(2)})


def evaluated(link: Direct, name: object = "latest") -> tuple[Heard, Any]:
    """Measure over a link; what was heard, and the means."""
    heard, served = Heard(), Door(link)
    done, _ = eval_server.evaluate(subject.open(name), served, heard, offline=True)  # type: ignore[arg-type]
    return heard, done


def test_each_device_measures_what_the_server_would_on_its_rows(run):
    heard, done = evaluated(link())
    base, tuned = models.load("model", device="cpu"), finished.load(run)
    both = []
    for one in heard.of("device"):
        rows = encode_rows(base, data.read(f"own-{one.client}.jsonl"), 48)[0]
        both += rows
        reading = result.job_of_run(run, "a" * 32, "eval").reading
        keyed = DeviceState(Path(f"direct-{one.client}")).keyed(reading + digest([rows]))
        assert (one.rows, one.digest, one.status) == (len(rows), keyed, "ok")
        assert keyed != digest([rows])
        assert one.base == pytest.approx(response_loss(base, rows), abs=5.1e-4)  # to `EXACT`
        assert one.tuned == pytest.approx(response_loss(tuned, rows), abs=5.1e-4)
        assert one.tuned != one.base
    assert (done.devices, done.asked, done.rows) == (2, 2, 11)
    assert done.base == pytest.approx(response_loss(base, both), abs=5.1e-4)
    assert done.tuned == pytest.approx(response_loss(tuned, both), abs=5.1e-4)
    assert done.change == pytest.approx(done.tuned - done.base)
    assert done.tuned_perplexity == pytest.approx(math.exp(done.tuned))
    file = run / FILE
    assert file.stat().st_mode & 0o777 == 0o600
    kept = files.read_json(file, "")
    assert (kept["tuned"], [d["rows"] for d in kept["devices"]]) == (done.tuned, [4, 7])
    assert kept["result_sha256"] == finished.stated_by(run)["result_sha256"]


@pytest.mark.parametrize("made", ["ledger"], indirect=True)
def test_over_the_network_by_the_commands(run, capsys):
    port = free_port()
    with devices(Device(port, 0, held_out=0.25)) as joined:
        assert main(["fleet", "eval", "latest", "--port", str(port), "--wait", "1"]) == 0
    said = capsys.readouterr()
    assert [str(d.outcome) for d in joined] == ["the evaluation is finished"]
    assert "mean by tokens" in said.out
    kept = files.read_json(run / FILE, "")
    assert [(d["status"], d["rows"]) for d in kept["devices"]] == [("ok", 2)]
    assert kept["tuned_error"] is None


@pytest.mark.parametrize("made", ["ledger"], indirect=True)
def test_a_plain_model_is_measured_and_a_wrong_result_is_not(run, caplog):
    _, done = evaluated(link(), "model")
    assert done.base == done.tuned
    assert done.change == 0
    assert done.path is None
    Path("direct-0/measured.json").unlink()  # a plain model is measured at another length
    served = link()
    files = result.packed(finished.result_of(run))
    (name,) = files
    spoilt = bytearray(files[name])  # type: ignore[arg-type]
    spoilt[-1] ^= 1
    job = result.job_of_run(run, "a" * 32, "eval")
    taken = DeviceReply.decode(
        served.workers["k0"].answer(Order("job", body=job.to_json().encode()).encode())
    )
    assert taken.what == "ready"
    body = encode(Message(0, bytes(8), Payload({}, {name: bytes(spoilt)})))
    reply = DeviceReply.decode(served.workers["k0"].answer(Order("eval", body=body).encode()))
    assert (reply.what, reply.code) == ("failed", "order")
    assert "the job states" in caplog.text
    assert not list(Path("direct-0").glob("run-*/result/*"))
    refused = DeviceReply.decode(worker(1).answer(Order("job", body=job.to_json().encode()).encode()))
    assert (refused.what, refused.code) == ("refused", "no-evaluation")


@pytest.mark.parametrize(
    "name", ["", *["../x", "a/b", "..", "a\\b", "evil.py", "__init__.py", "authorized_keys"]]
)
def test_files_of_a_result_stay_in_their_folder_and_are_those_of_a_result(tmp_path, name):
    job = Job("a" * 32, "fedit", {}, "m", "b" * 64, "fp32", 8, (), 0, "eval", "c" * 64)
    with pytest.raises(MessageError, match="is no file of a result"):
        result.placed({result.FILE + name: b"x"}, DeviceState(tmp_path), job)
    assert not list(tmp_path.iterdir())


JOB = Job("a" * 32, "fedkseed", {}, "m", "b" * 64, "fp32", 48, (), 0, "eval", "c" * 64)
TOLD = Told(9, "d" * 64, 1, 1, "0", held_out=4, held_out_digest="e" * 64)


@pytest.mark.parametrize("name", ["adapter_config.json", "module.json", "SHA256SUMS"])
def test_a_text_of_a_result_has_a_size_and_a_list_names_a_file_once(tmp_path, name):
    """Millions of targets were compared with every layer, and millions of lines with one file."""
    own = DeviceState(tmp_path)
    with pytest.raises(MessageError, match="1,048,576 bytes"):
        result.placed({result.FILE + name: bytes((1 << 20) + 1)}, own, JOB)
    line = f"{hashlib.sha256(b'{}').hexdigest()}  module.json\n".encode()
    for times, why in ((1, "the job states"), (2, "damaged")):
        files = {result.FILE + "module.json": b"{}", result.FILE + "SHA256SUMS": line * times}
        with pytest.raises(FleetuneError, match=why):
            result.placed(files, own, JOB)


def claimed(**change: object) -> DeviceEvaluated:
    scalars: Any = {"rows": 4, "tokens": 80, "base": 240.0, "tuned": 160.0} | change
    message = encode(Message(0, bytes.fromhex(JOB.base)[:8], Payload({}, scalars)))
    return measured(Answer(0, 0, message, "ok", "", 0.0, 0), "dev", TOLD, JOB)


def test_what_a_device_claims_is_bounded():
    good = claimed()
    assert (good.status, good.base, good.tuned) == ("ok", 3.0, 2.0)
    odd: list[dict[str, object]] = [{"rows": rows} for rows in (5, 0, True, 4.0, 1 << 40)]
    odd += [{"tokens": 4 * 48 + 1}, {"tokens": 0}, {"rows": 1, "tokens": 49}, {"more": 1}]
    odd += [{"base": loss} for loss in (math.nan, 1e7, 3)] + [
        {"tuned": loss} for loss in (math.inf, -1e-9, "1")
    ]
    for change in odd:
        found = claimed(**change)
        assert (found.status, found.rows, found.tuned) == ("refused", 0, None), change
        assert found.reason


def test_the_standard_error_is_that_of_devices_drawn_again():
    """Of many fleets drawn at random: how much their means differ is what each of them states, within a tenth."""
    rng = np.random.default_rng(5)
    found, stated = [], []
    for _ in range(4000):
        tokens = rng.integers(50, 400, 30)
        losses = rng.normal(2.0, 0.5, 30) + 0.001 * tokens
        R, error = ratio(losses.tolist(), (tokens / tokens.sum()).tolist())
        found.append(R)
        stated.append(error or 0.0)
    assert np.mean(stated) == pytest.approx(np.std(found), rel=0.1)
    assert ratio([3.0], [1.0]) == (3.0, None)
    values, equal = rng.normal(size=9), [1 / 9] * 9
    assert ratio(values.tolist(), equal)[1] == pytest.approx(values.std(ddof=1) / 3)


def claims(devices: list[tuple[int, float, float]]) -> list[DeviceEvaluated]:
    """What devices say of one row each: (tokens, loss of the base, loss of the result)."""
    one = {"name": "", "rows": 1, "digest": "", "status": "ok", "reason": ""}
    return [
        DeviceEvaluated(client=c, tokens=tokens, base=base, tuned=tuned, **one)  # type: ignore[arg-type]
        for c, (tokens, base, tuned) in enumerate(devices)
    ]


def test_the_mean_is_that_of_all_tokens():
    each = claims([(10, 3.0, 2.0), (30, 5.0, 6.0), (60, 1.0, 0.5)])
    lost = claimed(rows=0)
    done = mean("m", [*each, lost])
    assert (done.devices, done.asked, done.rows, done.tokens) == (3, 4, 3, 100)
    assert (done.base, done.tuned) == (pytest.approx(2.4), pytest.approx(2.3))
    assert done.change == pytest.approx(-0.1)
    # the change, by who is left out
    without = [(30 * 1 - 60 * 0.5) / 90, (-10 - 60 * 0.5) / 70, (-10 + 30 * 1) / 40]
    squares = sum((R + 0.1) ** 2 for R in without)
    assert done.change_error == pytest.approx(math.sqrt(2 / 3 * squares))
    assert (done.base_median, done.median, done.change_median, done.improved) == (3.0, 2.0, -0.5, 2)
    assert (done.base_plain, done.tuned_plain) == (pytest.approx(3.0), pytest.approx(8.5 / 3))
    assert done.largest_share == 0.6
    with pytest.raises(FleetError, match="no device has measured anything; the first"):
        mean("m", [lost])


@pytest.mark.parametrize("lie", [0.0, 9900.0])
def test_a_device_that_claims_all_tokens_neither_decides_nor_seems_certain(lie):
    """Three honest devices; a fourth says that it has 2^31 - 1 rows, and any loss."""
    honest = [(3400, 3.5, 3.1), (3600, 3.7, 3.3), (3500, 3.6, 3.0)]
    each = claims([*honest, ((2**31 - 1) * 64, 4.0, lie)])
    done = mean("m", each)
    share = 4 * 3500 / (3400 + 3600 + 3500 + 4 * 3500)
    by_tokens = sum(w * t for w, _, t in honest) / sum(w for w, *_ in honest)
    assert done.tuned == pytest.approx(share * lie + (1 - share) * by_tokens)
    assert done.tuned_error is not None
    assert done.tuned_error > 0.5 * abs(lie - done.median)
    assert 3.0 <= done.median <= 3.3
    assert done.largest_share > 0.9999
    assert "believe the median" in disagreement(done, each)
    assert disagreement(mean("m", each[:3]), each[:3]) == ""


# honest devices, of a run that made the model worse
WORSE = [(3500, 4.40, 5.9), (3800, 4.45, 6.1), (3300, 4.50, 6.0)]
BETTER = [(3000, 4.0, tuned) for tuned in (3.1, 3.3, 3.0)]
GOOD = [(3563, 3.8087, 2.9648), (3858, 3.6614, 2.9495)]
SAME = [(3000, loss, loss) for loss in (3.1, 3.3, 3.0)]  # of a plain model


@pytest.mark.parametrize(
    ("honest", "lies", "told"),
    [
        (WORSE, [], ""),
        (WORSE, [(2**31, 4.45, 0.0)] * 2, "the change is -2."),
        (WORSE, [(14000, 4.45, 3.0)] * 2, "the change is -0."),
        (WORSE[:2], [(15000, 4.45, 3.5)], "the change is -0."),
        (BETTER, [(3000, 4.0, 3.2)], ""),
        (BETTER, [(3000, 4.0, 9.0)], "the change is +0."),
        (GOOD, [(3332, 3.92, 3.02)], ""),
        (GOOD, [(2**40, 3.7, 4.05)], "the change is -0.0"),
        (GOOD, [(2**40, 4.3, 2.3)], "the change is -1.6"),
        (SAME, [], ""),
        (SAME, [(3000, 9900.0, 9900.0)], "the loss is +2477 in the mean by tokens and +3.2 in the median"),
    ],
)
def test_few_devices_that_decide_the_mean_are_seen(honest, lies, told):
    each = claims([*honest, *lies])
    said = disagreement(mean("m", each), each)
    assert said.startswith(told)
    assert bool(said) == bool(told)


def test_held_out_rows_are_never_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows("rows.jsonl", 0, 20)
    write_rows("twice.jsonl", 0, 5)
    Path("twice.jsonl").write_text(Path("twice.jsonl").read_text() * 2)
    for much, count in ((0.25, 5), (3, 3), (1, 1)):
        training, held = divided("rows.jsonl", much)
        assert (len(training), len(held)) == (20 - count, count)
        assert not {e.messages for e in training} & {e.messages for e in held}
        assert divided("rows.jsonl", much) == (training, held)
    assert len(divided("rows.jsonl")[0]) == 20
    training, held = divided("twice.jsonl", 2)
    assert not {e.messages for e in training} & {e.messages for e in held}
    with pytest.raises(DataError, match=r"5 rows of twice\.jsonl are rows of rows\.jsonl as well"):
        divided("rows.jsonl", 0, "twice.jsonl")
    Path("one.jsonl").write_text(Path("twice.jsonl").read_text().splitlines()[0] + "\n" * 2)
    with pytest.raises(DataError):
        divided("one.jsonl", 1)
    line = Path("one.jsonl").read_text().strip()
    Path("one.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(DataError, match="none is left to train on"):
        divided("one.jsonl", 1)


def test_events_are_as_the_schema_says():
    from jsonschema import Draft202012Validator

    from fleetune.common.events import as_dict

    build = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "build.py"))
    schema = json.loads(build["events_schema"]())
    for one in (claimed(), claimed(rows=0), mean("m", [claimed()])):
        name = type(one).__name__
        checker = Draft202012Validator({**schema, "anyOf": [{"$ref": f"#/$defs/{name}"}]})
        assert not list(checker.iter_errors({"v": 1, **as_dict(one)}))


@pytest.mark.parametrize("made", ["ledger"], indirect=True)
def test_what_the_devices_did_in_training_stays_known(run):
    """The kinds of their work, and how many rounds there were."""
    table = Devices(run)
    table.register([(keys.make(Path("state-0", "key")).public.fingerprint, "dev-0")])
    table.members[0] = replace(table.members[0], able=[0, 1], kind=1)
    table._changed = True
    table.save()
    port = free_port()
    with devices(Device(port, 0, **own(0))):
        assert main(["fleet", "eval", "latest", "--port", str(port), "--wait", "1"]) == 0
    (member,) = Devices(run).members
    assert member.rows
    assert (member.able, member.kind) == ([0, 1], 1)
    now = status.look(run)
    assert (now.round, now.rounds) == (1, 1)
