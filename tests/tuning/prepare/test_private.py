"""Runs with differential privacy: what they promise, what they refuse, and that local steps hide rows as the papers say."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fleetune
from command_line import FEW
from fleetune import adapters, models
from fleetune.data import Batches, encode_all
from fleetune.data.forms import Example
from fleetune.errors import FleetError, RecipeError, StorageError, UsageError
from fleetune.evaluation.objectives import batch_loss, loss_tensor
from fleetune.models.net.model import Model
from fleetune.privacy import mechanism
from fleetune.privacy.mechanism import Privacy
from fleetune.runs import rundir
from fleetune.seeds import ledger as ledgers
from fleetune.seeds.descent import Position, descend_projected, slope
from fleetune.seeds.noise import POOL, probe
from fleetune.tuning import methods
from fleetune.tuning.methods import _adapter, _zeroth
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes

LEVELS: dict[str, dict[str, Any]] = {
    **{name: {"K": 16, "tau": 2, "lr": 1e-3} for name in ("fedkseed", "mezo")},
    "onebyte": {"K": 16, "directions": 2, "lr": 1e-3},
    "signlora": {"lr": 1e-2, "steps": 1, "batch_size": 2},
    "fedit": {"r": 2, "lr": 1e-2, "steps": 1, "batch_size": 2},
}
PLAIN: dict[str, Any] = FEW | {"clients": 12, "rounds": 2, "limit": 40, "max_length": 48}
DEMO = str(Path(fleetune.__file__).parent / "data" / "demo.jsonl")
SMALL: dict[str, Any] = PLAIN | {"privacy": "client", "epsilon": 8.0}

pytestmark = pytest.mark.usefixtures("at")


def tuned(tiny: str, method: str = "fedkseed", **more: Any) -> Any:
    return fleetune.tune(tiny, "demo", method=method, settings=LEVELS[method], **SMALL | more)


def spent_in(run: Any) -> list[float]:
    return [e["report"]["epsilon"] for e in rundir.events(run.folder) if e["event"] == "round"]


def by_renyi(z: float, q: float, releases: int, delta: float) -> float:
    """An account of its own: Renyi divergences of whole orders (Mironov et al. 2019), Canonne et al.'s conversion."""

    def of(a: int) -> float:
        if q >= 1:
            return a / (2 * z * z)
        k = np.arange(a + 1)
        chosen = [math.log(math.comb(a, i)) for i in k.tolist()]
        logs = chosen + k * math.log(q) + (a - k) * math.log1p(-q) + k * (k - 1) / (2 * z * z)
        return float(np.logaddexp.reduce(logs)) / (a - 1)

    def at(a: int) -> float:
        return releases * of(a) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1)

    return min(map(at, range(2, 100)))


@pytest.mark.parametrize("method", LEVELS)
@pytest.mark.parametrize("level", ["client", "example"])
def test_a_run_states_what_it_promises_wherever_it_is_read(tiny, method, level):
    """Console, record, ledger's head or card; and epsilon follows from the record, by an account of the test's own."""
    more = {"participation": 0.5} if level == "client" else {}
    run = tuned(tiny, method, privacy=level, **more)
    recipe = recipes.make(recipes.read(run.folder / "run.toml"))
    assert min(recipe.noise, recipe.clip_norm, recipe.delta) > 0
    spent = spent_in(run)
    assert len(spent) == 2
    assert 0 < spent[0] < spent[1] <= 8.0 < spent[1] * 1.1
    steps, q = 1, recipe.participation
    if level == "example":
        parts = prepare.split(recipe, methods.entry(method)).clients
        n, own = min(map(len, parts)), methods.make(method, recipe.set)
        steps, q = own.local_steps(n), min(1.0, getattr(own, "batch_size", 8) / n)
    assert spent[1] <= by_renyi(recipe.noise, q, 2 * steps, recipe.delta) < 1.5 * spent[1] + 0.5
    promise = f"epsilon {spent[1]:.3g} at delta {recipe.delta:g}"
    (remark,) = (r for r in run.done.remarks if r.startswith("differential privacy"))
    assert promise in remark
    card = run.folder / "adapter" / "README.md"
    stated = card.read_text() if method == "fedit" else run.ledger().head.privacy
    assert promise in stated
    assert f"{recipe.noise:.4g}" in stated
    told = [e for e in rundir.events(run.folder) if e["event"] == "client"]
    assert all(e.get(key) is None for e in told for key in ("n", "loss", "steps", "tokens"))
    assert "per_client" not in json.loads((run.folder / "eval.json").read_text())


def test_how_loud_the_noise_is_is_told_where_both_it_and_the_clip_are_given(tiny, monkeypatch):
    told, rows, bench = list[str](), list[int](), prepare.private.Bench
    monkeypatch.setattr(prepare.private, "Bench", lambda *a: rows.append(len(a[1][0])) or bench(*a))
    given = {**PLAIN, "privacy": "client", "noise": 1.0, "clip_norm": 0.5, "set": LEVELS["fedit"]}
    recipe = recipes.make({"model": tiny, "data": "demo", "method": "fedit", **given})
    prepare.prepare(recipe, measure=False, note=told.append)
    prepare.dry_run(dataclasses.replace(recipe, clip_norm=0.0), offline=True)
    assert rows == [4, 2]  # for a dry run those of a step will do
    assert any("times as long as the clip: little can be learned" in line for line in told)


def test_the_record_and_the_report_tell_of_no_clients_rows(tiny):
    """With privacy; the same run without it tells how many each has, and what it is coloured by."""
    options = {"partition": "dirichlet:0.5:category", "clients": 10, "rounds": 1}
    hidden = tuned(tiny, "fedit", **options)
    shown = tuned(tiny, "fedit", **options, privacy="none", epsilon=0.0)
    words = ("Rows of the clients", "rows each", "tokens trained on per second", "local steps per second")
    for run, private in ((hidden, True), (shown, False)):
        (start,) = (e for e in rundir.events(run.folder) if e["event"] == "start")
        assert (start["rows_per_client"] == []) is ("counts" not in start) is private
        report = (run.folder / "report.html").read_text()
        assert [word in report for word in words] == [not private] * 4
        card = (run.folder / "adapter" / "README.md").read_text()
        assert ("| training rows | those of 10 clients" in card) is private
        assert ("training rows, as text" in card) is not private


def test_no_seed_repeats_the_noise_or_the_sample(tiny):
    """Whoever has the recipe, and so every seed, cannot take the noise off; a resumed run goes on with its count."""
    one, other = (tuned(tiny, participation=0.5, out=f"runs{i}") for i in range(2))
    assert one.digest != other.digest
    assert recipes.read(one.folder / "run.toml") == recipes.read(other.folder / "run.toml")
    with pytest.raises(UsageError, match="privacy budget for 2 rounds"):
        fleetune.resume_run(one, rounds=3)
    text = (one.folder / "run.toml").read_text()
    (one.folder / "run.toml").write_text(re.sub(r"(?m)^epsilon = \S+", "epsilon = 80.0", text))
    with pytest.raises(RecipeError, match="epsilon"):
        fleetune.resume_run(one)


def test_a_run_ends_where_its_budget_does(tiny):
    run = tuned(tiny, rounds=6, noise=1.0, epsilon=8.0)
    assert run.done.rounds < 6
    assert any("the privacy budget is spent" in r for r in run.done.remarks)
    assert spent_in(run)[-1] <= 8.0


def test_a_client_alone_takes_the_steps_that_are_accounted(tiny, monkeypatch):
    """Where all back-propagate, one that nobody holds was let walk, which is many times the steps."""
    given = SMALL | {"privacy": "example", "aggregation": "mean:4", "clients": 2, "participation": 0.5}
    settings = LEVELS["fedkseed"] | {"backprop": 1.0, "backprop_steps": 3, "tau": 9}
    assert fleetune.tune(tiny, "demo", method="fedkseed", settings=settings, **given).done.rounds == 2
    monkeypatch.setattr(methods.make("fedkseed", settings).__class__, "local_steps", lambda method, rows: 2)
    with pytest.raises(FleetError, match="accounted"):
        fleetune.tune(tiny, "demo", method="fedkseed", settings=settings, **given)


def test_a_run_that_has_lost_a_checkpoint_ends_with_what_it_has_released(tiny):
    """The last round was released again, and the account did not know."""
    run = tuned(tiny)
    spent = spent_in(run)
    lost = run.folder / "ledger.safetensors"
    rundir.checkpoints(run.folder)[-1][1].unlink()
    lost.unlink()
    again = fleetune.resume_run(run)
    promise = f"epsilon {spent[1]:.3g} at delta {recipes.read(run.folder / 'run.toml')['delta']:g}"
    stated = (*again.done.remarks, ledgers.load(lost).head.privacy)
    assert again.done.rounds == 1
    assert sum(promise in s and "after 1 round (2 releases" in s for s in stated) == 2
    assert "stopped after round 1 of 2: the privacy budget is spent" in stated
    (run.folder / "releases").unlink()
    lost.unlink()
    with pytest.raises(StorageError, match="releases is gone"):
        fleetune.resume_run(run)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"epsilon": 0.0}, "needs a budget"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": 1e6}, "promises nothing"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"delta": 0.2}, "below 1 / 12"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"noise": 0.01}, "in the first round"),
        ({"clients": 3}, "fewer than 10"),
        ({"aggregation": "median"}, "leave aggregation out"),
        ({"quorum": 2}, "quorum"),
        ({"privacy": "none"}, "does nothing without privacy"),
        ({"method": "fwdllm", "settings": {}}, "directions of its own"),
        ({"method": "fedpeptao", "settings": {}}, "variate"),
        ({"method": "fedit", "settings": {"scaffold": True}}, "scaffold=false"),
        ({"method": "fedit", "settings": {"average": "product"}}, "average=separate"),
        ({"privacy": "example", "method": "fwdllm", "settings": {}}, "hide rows"),
        ({"privacy": "example", "settings": {"objective": "accuracy:yes,no"}}, "use the loss"),
        ({"privacy": "sealed", "clients": 2, "epsilon": 0.0}, "adds up 3 clients or more"),
        ({"privacy": "sealed", "clients": 9}, "lost in the noise"),
        ({"privacy": "sealed", "participation": 0.5}, "the server's to keep"),
        ({"privacy": "sealed", "clients": 3000}, "2,048 clients at most"),
        ({"privacy": "example", "dtype": "bf16"}, "rounds a row's loss"),
        ({"dedupe": True}, "the rows of one client"),
        (
            {"method": "fedit", "settings": LEVELS["fedit"] | {"start": "eva", "start_data": DEMO}},
            "may be seen",
        ),
        ({"settings": {"backprop": 1.0}, "kinds": "1,0"}, "kinds of these settings, as 1"),
        ({"privacy": "sealed", "aggregation": "median"}, "compares single replies"),
        ({"privacy": "sealed", "quorum": 3}, "whether others count"),
        ({"privacy": "sealed", "method": "fwdllm", "settings": {}}, "directions of its own"),
    ],
)
def test_what_cannot_be_promised_is_refused_before_work(tiny, options, word):
    given = SMALL | {"method": "fedkseed", "settings": LEVELS["fedkseed"]} | options
    with pytest.raises(RecipeError, match=word):
        fleetune.tune(tiny, "demo", **given)
    assert not list(Path("runs").glob("*"))


def test_the_time_of_a_private_run_counts_no_rows_of_clients(tiny):
    given = PLAIN | {"model": tiny, "data": "demo", "method": "fedkseed", "set": LEVELS["fedkseed"]}
    for private in ({}, {"privacy": "client", "epsilon": 8.0, "clip_norm": 1.0}):
        recipe = recipes.make({**given, **private})
        found = prepare.prepare(recipe).estimate
        assert found is not None
        assert (found.client_rows == 0) is bool(private)
        assert ("rows of clients" in found.text) is not bool(private)


@pytest.fixture
def rows() -> tuple[Model, Any]:
    model = models.tiny_llama()
    texts = [Example((("user", f"Say {n}."),), f"It is {n * 'a'} {n}.") for n in range(1, 6)]
    return model, encode_all(texts, model.tokenizer, 48)[0]


def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "discrete_gaussian", lambda count: np.zeros(count, np.int64))


def single(rows: Any, i: int) -> Any:
    return next(Batches(rows[i : i + 1], 0, 1).steps(1, 1))


@pytest.mark.parametrize("clip", [1e4, 0.5])
def test_a_slope_is_the_mean_of_the_rows_clipped_slopes(rows, clip, monkeypatch):
    """DPZero's Algorithm 1, of all rows (q = 1), against slopes of each row alone."""
    model, encoded = rows
    silent(monkeypatch)
    view = _zeroth.view_of(model, 1, POOL, 1e-6)
    direction, eps = probe(POOL, 16, 3), 1e-3

    def of(batch: Any) -> tuple[float, float]:
        return slope(model, view, direction, batch, batch_loss, eps=eps, clip=0.0)

    each = [of(single(encoded, i))[0] for i in range(5)]
    (batch,) = Batches(encoded, 0, 1, private=Privacy(clip, 1.0, 1.0, 5)).steps(1, 5)
    found, told = of(batch)
    assert told == 0.0
    assert found == pytest.approx(np.clip(each, -clip, clip).mean(), rel=1e-4, abs=2e-3)


def test_a_gradient_is_the_mean_of_the_rows_clipped_gradients(rows, monkeypatch):
    """DP-SGD's Algorithm 1, over all that is trained; and along the pool, whose vector of K is clipped as one."""
    model, encoded = rows
    silent(monkeypatch)
    adapters.attach(model, adapters.Lora(2, 4, 0.0, "all-linear", "gaussian"), seed=1)
    parameters = adapters.trainable(model)
    each = []
    for i in range(5):
        loss_tensor(model, single(encoded, i)).backward()
        each.append({n: p.grad.double().numpy().copy() for n, p in parameters.items()})
        for p in parameters.values():
            p.grad = None
    norms = [math.sqrt(sum((g**2).sum() for g in grads.values())) for grads in each]
    clip = float(np.median(norms))
    (batch,) = Batches(encoded, 0, 1, private=Privacy(clip, 1.0, 1.0, 5)).steps(1, 5)
    _adapter.hide_rows(model, batch, Privacy(clip, 1.0, 1.0, 5), parameters)
    for name, p in parameters.items():
        expected = sum(g[name] * min(1, clip / n) for g, n in zip(each, norms, strict=True)) / 5
        assert p.grad is not None
        assert torch.allclose(p.grad.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-6 * clip)
    drawn = []
    monkeypatch.setattr(
        _adapter, "loss_tensor", lambda model, row: drawn.append(torch.rand(1)) or loss_tensor(model, row)
    )
    for _ in range(2):
        torch.manual_seed(3)
        _adapter.hide_rows(model, batch, Privacy(clip, 1.0, 1.0, 5), parameters)
    assert len({float(mask) for mask in drawn}) == 10  # of dropout: no seed that anybody knows gives them
    adapters.detach(model)


def test_a_projection_hides_each_row(rows, monkeypatch):
    """One step of a back-propagating client of fedkseed: the mean over rows of p, each cut to the clip."""
    model, encoded = rows
    silent(monkeypatch)
    view = _zeroth.view_of(model, 1, POOL, 1e-6)

    def moved(batch: Any) -> np.ndarray:
        none = np.zeros(0, np.uint64)
        start = Position(POOL, 16, none, none.astype(np.int64))
        return descend_projected(model, view, start, 0, [batch], units=-16.0, clip=0.0).moved

    each = [moved(single(encoded, i)) for i in range(5)]
    norms = [float(np.linalg.norm(p)) for p in each]
    clip = float(np.median(norms))
    (batch,) = Batches(encoded, 0, 1, private=Privacy(clip, 1.0, 1.0, 5)).steps(1, 5)
    expected = sum(p * min(1, clip / n) for p, n in zip(each, norms, strict=True)) / 5
    assert moved(batch) == pytest.approx(expected, rel=1e-3, abs=1e-4 * clip)


def test_rows_are_drawn_each_by_itself(rows):
    """A batch may have no row; then one stands in, and does not count.  The step is taken all the same."""
    _, encoded = rows
    sizes = [b.drawn.rows for b in Batches(encoded, 0, 1, private=Privacy(1.0, 1.0, 0.2, 5)).steps(400, 1)]
    assert {0, 1, 2} <= set(sizes)
    assert np.mean(sizes) == pytest.approx(1.0, abs=5 * math.sqrt(5 * 0.16 / 400))


def test_a_run_under_secure_sums_adds_up_what_nobody_sees(tiny):
    """Its record has neither rows nor losses of a client; without a budget it repeats to the same bits."""
    runs = [tuned(tiny, privacy="sealed", epsilon=0.0, clients=4, clip_norm=1e4) for _ in range(2)]
    assert runs[0].digest == runs[1].digest
    replies = [e for e in rundir.events(runs[0].folder) if e["event"] == "client"]
    assert len(replies) == 8
    assert {(e["n"], e["loss"], e["status"]) for e in replies} == {(None, None, "ok")}
    head = runs[0].ledger().head
    assert "secure sum of 3 of 4 or more" in head.aggregation
    for gone in ("ledger.safetensors", "checkpoints/round-000002.ckpt"):
        (runs[1].folder / gone).unlink()
    assert fleetune.resume_run(runs[1].folder).digest == runs[0].digest


def test_a_secure_sum_with_a_budget_promises_what_the_servers_noise_does(tiny):
    run = tuned(tiny, privacy="sealed")
    recipe = recipes.make(recipes.read(run.folder / "run.toml"))
    spent = spent_in(run)
    assert spent[-1] <= 8 < 1.02 * spent[-1] + 0.1
    assert by_renyi(recipe.noise, 1.0, 2, recipe.delta) >= spent[-1]
    assert "secure sum of 8 of 12 or more" in run.ledger().head.privacy
