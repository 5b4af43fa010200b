"""ZO-SGD: MeZO's numbers bit for bit, from a direction that lies in memory while the losses are taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fleetune.data import Encoded, Example
from fleetune.data.encode import Batches, encode_all
from fleetune.evaluation import objectives
from fleetune.models import Model, named_tensors, tiny_llama
from fleetune.seeds import noise
from fleetune.seeds.view import View
from fleetune.tuning import methods
from fleetune.tuning.methods import Reply, mezo, zosgd
from law_definition import slow_places

SETTINGS: dict[str, Any] = {"K": 32, "tau": 9, "lr": 2e-3, "batch_size": 3}


@pytest.fixture(scope="module")
def rows() -> list[Encoded]:
    examples = [Example((("user", f"say {n}"),), "yes" if n % 2 else "a number", {}) for n in range(8)]
    return encode_all(examples, tiny_llama().tokenizer, 48)[0]


def in_type(dtype: torch.dtype) -> Model:
    model = tiny_llama()
    model.net.to(dtype)
    return model


def trained(method: Any, model: Model, rows: Any, rounds: int) -> Any:
    state = method.init(model, 5)
    for r in range(rounds):
        payload = method.local(model, method.broadcast(state), Batches(rows, 257, r), r, {})
        state = method.aggregate(state, [Reply(0, r, payload)])
    return state


@pytest.mark.parametrize(
    ("dtype", "law"),
    [
        (torch.float32, "hashed"),
        (torch.float32, "rademacher"),
        (torch.float32, "gaussian"),
        (torch.bfloat16, "hashed"),
        (torch.float16, "rademacher"),
    ],
)
def test_it_is_mezo_bit_for_bit(dtype: torch.dtype, law: str, rows: Any) -> None:
    """Three rounds: from the base, from few passes, and from 27 where directions are independent."""
    settings = SETTINGS | {"law": law}
    mine = trained(zosgd.Method(**settings), in_type(dtype), rows, 3)
    theirs = trained(mezo.Method(**settings), in_type(dtype), rows, 3)
    assert len(mine.ledger) > 20
    assert np.array_equal(mine.ledger.ids, theirs.ledger.ids)
    assert np.array_equal(mine.ledger.coefficients, theirs.ledger.coefficients)
    assert (mine.ledger.head.method, theirs.ledger.head.method) == ("zosgd", "mezo")


def z_of(view: View, id: int, law: str) -> dict[str, torch.Tensor]:
    K, k = SETTINGS["K"], id & 0xFFFFFFFF
    found = {}
    for slot in view.slots:
        n = slot.tensor.numel()
        if law == "gaussian":
            z = noise.normals(view.run_key, id, slot.start, n).astype(np.float64)
        else:
            z = noise.signs(view.run_key, id >> 32 if law == noise.POOL else id, slot.start, n).astype(float)
        if law == noise.POOL:
            z *= [(-1) ** bin(int(j) & k).count("1") for j in slow_places(K, slot.start, n)]
        found[slot.name] = torch.from_numpy(z).to(slot.tensor.dtype)
    return found


@pytest.mark.parametrize("law", noise.LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_direction_lies_in_memory_while_the_losses_are_taken(
    dtype: torch.dtype, law: str, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            expected = z_of(model.attachment, id, law)
            assert found.keys() == {name for name, _ in named_tensors(model.net)}
            assert all(torch.equal(found[name], z) for name, z in expected.items())
    weights = sum(t.nbytes for _, t in named_tensors(model.net))
    assert sum(z.nbytes for z in seen[0].values()) == weights  # twice the memory
    assert model.attachment.stored is None  # and none of it afterwards


def test_settings_are_mezos_and_checked() -> None:
    for name in ("lr", "eps", "batch_size", "tau", "K", "law", "clip", "objective"):
        assert getattr(zosgd.Method(), name) == getattr(mezo.Method(), name)
    with pytest.raises(ValueError, match="power of two"):
        zosgd.Method(K=48)
    assert methods.entry("zosgd").clients == 1
