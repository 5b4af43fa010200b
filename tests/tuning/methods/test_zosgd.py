"""ZO-SGD: MeZO's numbers bit for bit, from a direction that lies in memory while the losses are taken."""

from typing import Any

import numpy as np
import pytest
import torch

from fleetune.data.encode import Batches
from fleetune.evaluation import objectives
from fleetune.models import Model, named_tensors, tiny_llama
from fleetune.seeds import noise
from fleetune.tuning import methods
from fleetune.tuning.methods import Reply, mezo, zosgd
from law_definition import direction

SETTINGS: dict[str, Any] = {"K": 32, "tau": 7, "lr": 2e-3, "batch_size": 3}


def in_type(dtype: torch.dtype) -> Model:
    model = tiny_llama(layers=1)
    model.net.to(dtype)
    return model


def trained(method: Any, model: Model, rows: Any, rounds: int) -> Any:
    state = method.init(model, 5)
    for r in range(rounds):
        payload = method.local(model, method.broadcast(state), Batches(rows, 257, r), r, {})
        state = method.aggregate(state, [Reply(0, r, payload)])
    return state


NARROW = [(torch.bfloat16, "hashed"), (torch.float16, "rademacher")]


@pytest.mark.parametrize(("dtype", "law"), [*((torch.float32, law) for law in noise.LAWS), *NARROW])
def test_it_is_mezo_bit_for_bit(dtype, law, rows):
    """Three rounds: from the base, from few passes, and from 14 where directions are independent."""
    settings = SETTINGS | {"law": law}
    mine = trained(zosgd.Method(**settings), in_type(dtype), rows, 3)
    theirs = trained(mezo.Method(**settings), in_type(dtype), rows, 3)
    assert len(mine.ledger) > 16
    assert np.array_equal(mine.ledger.ids, theirs.ledger.ids)
    assert np.array_equal(mine.ledger.coefficients, theirs.ledger.coefficients)
    assert (mine.ledger.head.method, theirs.ledger.head.method) == ("zosgd", "mezo")


@pytest.mark.parametrize("law", noise.LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_direction_lies_in_memory_while_the_losses_are_taken(dtype, law, rows, monkeypatch):
    model, method = in_type(dtype), zosgd.Method(**SETTINGS | {"law": law, "tau": 3})
    state, seen = method.init(model, 5), []

    def watched(model: Model, batch: Any) -> float:
        stored = model.attachment.stored
        seen.append({name: z.clone() for name, z in stored.z.items()})
        return 0.5

    monkeypatch.setattr(objectives, "get", lambda name: watched)
    method.local(model, method.broadcast(state), Batches(rows, 257, 1), 1, {})
    assert len(seen) == 6
    for step, id in enumerate(method.ids(0).tolist()):
        for found in seen[2 * step : 2 * step + 2]:
            assert found.keys() == {name for name, _ in named_tensors(model.net)}
            for slot in model.attachment.slots:
                z = direction(
                    law, id, slot.start, slot.tensor.numel(), SETTINGS["K"], model.attachment.run_key
                )
                assert torch.equal(found[slot.name], torch.from_numpy(z).to(dtype))
    weights = sum(t.nbytes for _, t in named_tensors(model.net))
    assert sum(z.nbytes for z in seen[0].values()) == weights  # twice the memory
    assert model.attachment.stored is None  # and none of it afterwards


def test_settings_are_mezos():
    for name in ("lr", "eps", "batch_size", "tau", "K", "law", "clip", "objective"):
        assert getattr(zosgd.Method(), name) == getattr(mezo.Method(), name)
    assert methods.entry("zosgd").clients == 1
