"""Runs that train the scales of a quantised base: what is refused, what a device is told, and what a ledger says of it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_harness import gguf_of

import fleetune
from fleetune import models, subject
from fleetune.deploy import harness
from fleetune.deploy import measure as lines
from fleetune.errors import LedgerError, RecipeError, UsageError
from fleetune.seeds.ledger import LedgerHead
from fleetune.seeds.scale_view import ScaleView
from fleetune.seeds.view import View
from fleetune.tuning.methods import _zeroth, mezo
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.result import finished

pytestmark = pytest.mark.usefixtures("own_cache")
ROWS = [{"prompt": f"say {w}", "response": f"{w} it is"} for w in "abcdefghijklmnopqrstuvwxyz"]
FEW: dict[str, Any] = {"clients": 2, "rounds": 2, "samples": 0, "client_rows": 0, "held_out": 4}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_of(tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": "fedit"}, "train = scales is for mezo, fedkseed, onebyte, fedpetuning, not for fedit"),
        ({"method": "zosgd"}, "not for zosgd"),
        ({"base": "memory"}, "base = memory does not"),
        ({"device": "cuda"}, "not on device = cuda"),
        ({"set": {"law": "gaussian"}}, "law = gaussian"),
        ({"method": "fedpetuning", "set": {"module": "lora"}}, "is the module scales, not lora"),
        ({"method": "fedit", "base": "memory", "device": "cuda"}, "not for fedit"),
    ],
)
def test_what_cannot_train_scales_is_refused_before_any_work(changed, words):
    given = {"model": "m.gguf", "data": "demo", "method": "mezo", "train": "scales", **changed}
    with pytest.raises(RecipeError, match=words) as refused:
        prepare.check(recipes.make(given))
    assert refused.value.hint
    for change in refused.value.hint.split("; "):  # what the hint says is good
        flag, value = change.split(",")[0].removeprefix("--").split(" ")
        named = dict([value.split("=")]) if flag == "set" else {}
        given |= {"set": {**given.get("set", {}), **named}} if named else {flag: value}
    prepare.check(recipes.make(given))


def test_a_run_that_tuned_a_file_has_the_bits_of_that_file(file, tmp_path):
    options: Any = {"out": tmp_path / "runs", **FEW, "rounds": 1, "settings": {"tau": 2, "lr": 0.05}}
    run = fleetune.tune(str(file), ROWS, method="mezo", train="scales", **options)
    plain = fleetune.tune(str(file), ROWS, method="mezo", **options)
    (base, tuned), (other, _) = (lines.of(subject.Run(r.folder), offline=True).lines for r in (run, plain))
    assert harness.bits(base.weights) == harness.bits(tuned.weights) == harness.bits(file)
    assert (base.bytes, tuned.bytes) == (file.stat().st_size, file.stat().st_size + run.path.stat().st_size)
    assert harness.bits(other.weights).all == 32
    out, ledger = fleetune.export(run, to="gguf").path, run.ledger()
    dataclasses.replace(ledger, head=dataclasses.replace(ledger.head, checks={})).save(run.path)
    for name in ("SHA256SUMS", "metrics.jsonl", "env.json"):  # what they state is not proven
        (run.folder / name).unlink()
    proven = {link.what: link.words for link in fleetune.verify(out, offline=True)}
    assert proven["weights"].endswith("which states no digest; theirs is not computed")
    assert proven["base"].endswith(ledger.head.base)


def test_eps_is_in_the_units_of_what_is_trained_unless_given():
    given = {"model": "m.gguf", "data": "demo", "method": "mezo"}
    assert "eps" not in recipes.make(given).set
    assert recipes.make({**given, "train": "scales"}).set["eps"] == 0.01
    assert recipes.make({**given, "train": "scales", "set": {"eps": 0.5}}).set["eps"] == 0.5
    assert recipes.make({**given, "train": "scales", "method": "fedit"}).set == {}


def test_a_device_does_what_the_message_says_and_the_base_must_have_blocks(file):
    model = models.load(str(file), device="cpu", base="mapped")
    model.trains = "scales"
    made = mezo.Method(K=64, lr=0.1, eps=0.01).empty(model, 5)
    payload = _zeroth.ledger_payload(made, 64, 0)
    assert payload.scalars["train"] == "scales"
    device = models.load(str(file), device="cpu", base="mapped")
    view, _ = _zeroth.open_view(device, payload, law="hashed", K=64, lr=0.1)
    assert type(view) is ScaleView
    plain = _zeroth.ledger_payload(_zeroth.Ledger(_of_weights(made.head)), 64, 0)
    assert "train" not in plain.scalars
    view, _ = _zeroth.open_view(device, plain, law="hashed", K=64, lr=0.1)
    assert type(view) is View
    with pytest.raises(UsageError, match="has no scales"):
        _zeroth.open_view(models.load(str(file), device="cpu"), payload, law="hashed", K=64, lr=0.1)


def _of_weights(head: LedgerHead) -> LedgerHead:
    return dataclasses.replace(head, hyper={})


def test_a_killed_run_goes_on_to_the_same_bits_and_its_ledger_is_verified(file, tmp_path):
    options: Any = FEW | {
        "method": "fedkseed",
        "train": "scales",
        "settings": {"lr": 0.05, "tau": 3, "K": 64},
    }
    whole = fleetune.tune(str(file), ROWS, out=tmp_path / "a", **options)
    half = fleetune.tune(str(file), ROWS, out=tmp_path / "b", **{**options, "rounds": 1})
    assert fleetune.resume_run(half.folder, rounds=2).done.digest == whole.done.digest
    model = finished.load(whole.folder)
    assert type(model.attachment) is ScaleView
    ledger = finished.ledger_of(whole.folder)
    assert ledger.head.trains == "scales"
    base = finished.base_of(ledger, str(file))
    digest, stated = finished.verify(base, ledger)
    assert digest == whole.done.digest
    assert {True} == set(stated.values())
    confused = dataclasses.replace(ledger, head=_of_weights(ledger.head))
    with pytest.raises(LedgerError, match="belongs to another base model"):
        finished.check_base(base, confused)
    merged = model.merge()
    assert merged.digest == whole.done.digest
    assert not any(np.isnan(p.numpy()).any() for p in merged.net.parameters())
