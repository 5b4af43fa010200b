"""Measure a run's result, or a plain model, on the held-out rows of devices that join (`eval-fleet.json` in the run's folder).

The mean R = sum w_i l_i is of the losses l_i of the devices by their shares w_i of the tokens.  Tokens are what a device says, so
none counts more than `aggregation.TIMES` times the median device.  The standard error is the jackknife's, R_-i being R without
device i (CV3 of MacKinnon, Nielsen and Webb 2022, arXiv 2205.03288):

    se(R)^2 = (n - 1) / n sum (R_-i - R)^2        R_-i - R = w_i (R - l_i) / (1 - w_i)
"""

import math
import secrets
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from fleetune.common.display import quoted
from fleetune.common.events import DeviceEvaluated, FleetEvaluated
from fleetune.common.files import PRIVATE, finite, json_text, write_atomic
from fleetune.errors import FleetError, MessageError, UsageError
from fleetune.fleet import result
from fleetune.fleet.orders import Device, Job, Order
from fleetune.fleet.server import Served
from fleetune.fleet.table import Devices
from fleetune.runs import rundir
from fleetune.runs.listener import Listener
from fleetune.subject import Compressed, Plain, Run
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.exchange.messages import Message, Payload, ReplySpec, check, decode, encode
from fleetune.tuning.result import finished
from fleetune.tuning.rounds.fleets import Answer

FILE: Final = "eval-fleet.json"
APART: Final = 3.0  # times the devices' median deviation: of honest ones, mean and median seldom are
PATIENCE: Final = 600.0  # seconds that devices have to come, where no deadline is given; some then suffice
WORST: Final = 100.0  # nats per token: devices report less, and its perplexity is a number


def evaluate(
    subject: Run | Compressed | Plain, served: Served, listener: Listener, *, offline: bool = False
) -> tuple[FleetEvaluated, Sequence[DeviceEvaluated]]:
    """Measure on the devices that join, and return the means and every device's figures; all of them are events.

    FleetError when no device has measured anything; UsageError for a run without a result, and for codes.
    """
    served.farewell, served.more, served.patience = "the evaluation is finished", " --held-out N", PATIENCE
    listener.note(
        "devices join as they trained (--data, --held-out N); those that held nothing out add --eval-data FILE"
    )
    with _place(subject) as folder:
        devices = Devices(folder)
        job, packed = _job(subject, devices.run, offline)
        count = served.wanted(sum(rows > 0 for rows in devices.rows) or _clients(subject))
        listener.header("fleetune fleet eval", [("model", subject.argument), ("fleet", served.where(count))])
        listener.progress("devices", 0, count)
        fleet = served.gather(folder, devices, job, 0, count, listener)
        chosen, base = fleet.ready(), bytes.fromhex(job.base)[:8]
        message = encode(Message(0, base, packed))
        orders = {client: Order("eval", client=client, body=message) for client in chosen}
        found = []
        for answer in fleet.give(orders):
            one = measured(answer, devices.members[answer.client].name, fleet.told[answer.client], job)
            what = "measured" if one.status == "ok" else one.status
            fleet.record(what, one.client, rows=one.rows, tokens=one.tokens, reason=one.reason)
            listener.event(one)
            found.append(one)
            listener.progress("devices", len(found), len(chosen))
        done = mean(subject.argument, found)
        if warning := disagreement(done, found):
            listener.note(warning)
        if isinstance(subject, Run):
            done = replace(done, path=str(folder / FILE))
            content = {**asdict(done), "base_digest": job.base, "result_sha256": job.result}
            content["devices"] = [asdict(one) for one in sorted(found, key=lambda one: one.client)]
            write_atomic(folder / FILE, json_text(finite(content)), mode=PRIVATE)
        listener.event(done)
        return done, found


def measured(answer: Answer, name: str, device: Device, job: Job) -> DeviceEvaluated:
    """Return a device's figures, or why there are none: it can claim no more rows than it holds out, and no odd loss."""
    none = DeviceEvaluated(
        client=answer.client,
        name=name,
        rows=0,
        tokens=0,
        base=None,
        tuned=None,
        digest=device.held_out_digest,
        status=answer.status,
        reason=answer.reason,
    )
    if answer.data is None:
        return none
    tokens = device.held_out * job.max_length
    most = tokens * WORST
    spec = ReplySpec(
        {},
        {
            "rows": (int, 1, device.held_out),
            "tokens": (int, 1, tokens),
            "base": (float, 0, most),
            "tuned": (float, 0, most),
        },
    )
    try:
        payload = check(decode(answer.data), spec, round=0, base=bytes.fromhex(job.base)[:8])
        rows, tokens = payload.int("rows"), payload.int("tokens")
        base, tuned = payload.float("base"), payload.float("tuned")
        if tokens > rows * job.max_length or max(base, tuned) > tokens * WORST:
            raise MessageError(f"{rows} rows cannot have {tokens} tokens with such a loss")
        return replace(none, rows=rows, tokens=tokens, base=base / tokens, tuned=tuned / tokens)
    except MessageError as error:
        return replace(none, status="refused", reason=str(error))


def mean(model: str, found: Sequence[DeviceEvaluated]) -> FleetEvaluated:
    """Return the means over the devices that have measured; FleetError when there are none."""
    good = [one for one in found if one.base is not None and one.tuned is not None]
    if not good:
        why = f"; the first: {found[0].reason}" if found else ""
        raise FleetError(
            f"no device has measured anything{why}",
            hint="devices hold rows out with: fleetune fleet join .. --held-out 0.1, or --eval-data FILE",
        )
    shares = shares_of([one.tokens for one in good])
    base = [float(one.base or 0.0) for one in good]
    tuned = [float(one.tuned or 0.0) for one in good]
    change = [t - b for t, b in zip(tuned, base, strict=True)]
    return FleetEvaluated(
        model=model,
        devices=len(good),
        asked=len(found),
        rows=sum(one.rows for one in good),
        tokens=sum(one.tokens for one in good),
        largest_share=max(one.tokens for one in good) / sum(one.tokens for one in good),
        base=ratio(base, shares)[0],
        tuned=ratio(tuned, shares)[0],
        change=ratio(change, shares)[0],
        base_error=ratio(base, shares)[1],
        tuned_error=ratio(tuned, shares)[1],
        change_error=ratio(change, shares)[1],
        base_perplexity=_exp(ratio(base, shares)[0]),
        tuned_perplexity=_exp(ratio(tuned, shares)[0]),
        base_plain=statistics.fmean(base),
        tuned_plain=statistics.fmean(tuned),
        base_median=statistics.median(base),
        median=statistics.median(tuned),
        change_median=statistics.median(change),
        improved=sum(c < 0 for c in change),
    )


def shares_of(tokens: Sequence[int]) -> list[float]:
    """Return what each device counts in the mean, of 1: by its tokens, at most `aggregation.TIMES` times the median's."""
    counted = [min(own, aggregation.TIMES * aggregation.usual(tokens)) for own in tokens]
    return [own / sum(counted) for own in counted]


def disagreement(done: FleetEvaluated, found: Sequence[DeviceEvaluated]) -> str:
    """Return a warning where mean and median are further apart than devices are, else "": few of them may decide the mean."""
    good = [(float(one.base or 0.0), one.tuned) for one in found if one.tuned is not None]
    for what, by_tokens, each in (
        ("change", done.change, [tuned - base for base, tuned in good]),
        ("loss", done.tuned, [tuned for _, tuned in good]),
    ):
        median = statistics.median(each)
        spread = statistics.median(abs(own - median) for own in each)
        if abs(by_tokens - median) > min(abs(median), APART * spread + abs(median) / 5):
            return (
                f"the {what} is {by_tokens:+.4g} in the mean by tokens and {median:+.4g} in the median: believe the median, "
                "which few devices cannot move far"
            )
    return ""


def ratio(means: Sequence[float], shares: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of the devices' means by their shares, and its standard error; None for one device.

    A device that has nearly all tokens has a residual near 0; its w / (1 - w) does not let that pass for certainty.
    """
    n = len(means)
    R = math.fsum(m * w for m, w in zip(means, shares, strict=True))
    if n < 2:
        return R, None
    squares = math.fsum((w * (m - R) / (1 - w)) ** 2 for m, w in zip(means, shares, strict=True))
    return R, math.sqrt((n - 1) / n * squares)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


@contextmanager
def _place(subject: Run | Compressed | Plain) -> Iterator[Path]:
    """The run's folder, which no other process has meanwhile; of a plain model a temporary one."""
    if isinstance(subject, Run):
        with rundir.locked(subject.folder):
            yield subject.folder
    else:
        with tempfile.TemporaryDirectory(prefix="fleetune-") as folder:
            yield Path(folder)


def _clients(subject: Run | Compressed | Plain) -> int:
    return subject.recipe.clients if isinstance(subject, Run) else 0


def _job(subject: Run | Compressed | Plain, run: str, offline: bool) -> tuple[Job, Payload]:
    """Return what devices are told, and the files of the result."""
    if isinstance(subject, Run):
        found = finished.result_of(subject.folder)
        rounds = subject.recipe.rounds  # all are over, and `fleet status` goes on to say so
        job = result.job_of_run(subject.folder, run, "eval", rounds)
        return job, Payload({}, result.packed(found))
    if isinstance(subject, Compressed):
        raise UsageError(
            f"{subject.argument} is a compressed model, which devices are not sent",
            hint=f"write a plain one (fleetune export {quoted(subject.argument)} --to hf), bring it to the "
            "devices, and measure that",
        )
    model = subject.load(offline=offline)
    run, length = secrets.token_hex(16), subject.max_length
    return Job(run, "", {}, subject.name, model.digest, model.dtype, length, (), 0, "eval"), Payload()
