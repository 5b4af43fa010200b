"""Replays of a ledger: what is said of the work ahead, and how much of it a file may ask for."""

import numpy as np
import pytest

from command_line import refused
from fleetune import models
from fleetune.errors import Interrupted, LedgerError
from fleetune.models.net.model import Model
from fleetune.seeds import noise
from fleetune.seeds.ledger import Ledger
from fleetune.tuning.methods import mezo
from fleetune.tuning.result import finished
from heard import Heard


@pytest.fixture
def model() -> Model:
    return models.tiny_llama()


def ledger_on(model: Model, rounds: int, law: str = "rademacher") -> Ledger:
    """A ledger of one step a round, with the digest after every round."""
    made = mezo.Method(law=law, K=16, lr=0.02, eps=0.01).empty(model, 5)
    for r in range(1, rounds + 1):
        made = made.append(np.array([r - 1]), np.array([3]), r).with_check(r, "0" * 64)
    return made


def test_a_replay_says_what_work_is_ahead_and_how_far_it_is(model):
    heard = Heard()
    ledger = ledger_on(model, 3)
    assert finished.rebuild(model, ledger, listener=heard) == finished.rebuild(model, ledger)
    count = model.n_params
    assert heard.notes == [f"3 passes over {count:,} weights to rebuild"]
    assert heard.counts[-1] == ("weights", count, count, "3 passes")
    done = [entry[1] for entry in heard.counts]
    assert done == sorted(done)
    assert len(done) > 3
    with pytest.raises(Interrupted, match="nothing was written"):
        finished.rebuild(model, ledger, listener=Heard(lambda _: True))


def test_a_ledger_that_asks_for_endless_replays_is_refused(model, monkeypatch, tmp_path, capsys):
    assert len(finished.stated_points(ledger_on(model, finished.REPLAYS))) == finished.REPLAYS
    many = ledger_on(model, finished.REPLAYS + 1)
    with pytest.raises(LedgerError, match="257 rounds takes more work than a run asks for"):
        finished.verify(model, many, listener=Heard())
    many.save(tmp_path / "ledger.safetensors")
    monkeypatch.setattr(finished, "base_of", None)
    assert "at most 256 replays and 1,048,576 passes" in refused(
        capsys, "verify", str(tmp_path / "ledger.safetensors"), "--from", "any/any", code=1
    )
    monkeypatch.setattr(finished, "PASSES", 5)
    with pytest.raises(LedgerError, match="takes more work"):
        finished.stated_points(ledger_on(model, 3))  # 1 + 2 + 3
    assert len(finished.stated_points(ledger_on(model, 2))) == 2
    assert noise.PASSES == 1 << 20
