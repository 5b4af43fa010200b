# SPDX-License-Identifier: Apache-2.0
"""LLM-Pruner: the recovery of what is left, and settings and models that do not fit."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gkd_harness import END, rows
from pruner_harness import pruner, stop_at, tiny
from torch import Tensor

from fleetune import adapters, compression
from fleetune.compression.methods import gkd
from fleetune.compression.methods import llm_pruner
from fleetune.data import Batches
from fleetune.errors import FleetuneError, Interrupted, RecipeError, UsageError
from fleetune.evaluation.losses import response_loss
from fleetune.models import Model, digest, named_tensors

# --- recovery -------------------------------------------------------------------------------------------------

LORA = {"recover": "lora", "lr": 1e-2, "steps": 12, "r": 4, "batch_size": 4}
OF_DATA = 322  # a seed with which gkd's first ten batches are answered by the data: writing takes longer


def recovered(values: dict[str, Any], folder: Path, on: Any = lambda *_: None, seed: int = OF_DATA) -> Model:
    made = pruner(**values)
    whole = tiny()
    pruned = made.prune(whole, rows(0, 8), folder)
    return made.train(pruned, whole, rows(0, 8), seed, folder / "recovery", on)


def test_lora_brings_the_loss_down_and_is_folded_in(tmp_path: Path) -> None:
    pruned = pruner(**LORA).prune(tiny(), rows(0, 8), tmp_path / "p")
    before, loss = dict(named_tensors(copy.deepcopy(pruned.net))), response_loss(pruned, rows(0, 8))
    model = recovered(LORA, tmp_path / "r")
    assert model.attachment is None
    assert response_loss(model, rows(0, 8)) < loss - 0.1
    after = dict(named_tensors(model.net))
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {n for n in after if n.endswith("proj.weight")}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4) <= 4
    assert model.digest == digest(after.items())


def test_lora_is_trained_as_the_formulas_say(tmp_path: Path) -> None:
    """AdamW on A and B of W + (alpha / r) B A in float64: the clipped gradient of the responses' loss, rates up and down."""
    values = LORA | {"dropout": 0.0, "steps": 4, "warmup": 0.5, "r": 2}
    pruned = pruner(**values).prune(tiny(), rows(0, 8), tmp_path / "p")
    adapters.attach(pruned, adapters.Lora(2, 16.0), seed=OF_DATA)
    start = {n: torch.from_numpy(a).double().requires_grad_() for n, a in adapters.export(pruned).items()}
    adapters.detach(pruned)
    net, m, v = copy.deepcopy(pruned.net).double(), dict.fromkeys(start, 0.0), dict.fromkeys(start, 0.0)
    base = dict(net.named_parameters())

    def merged() -> dict[str, Tensor]:
        return base | {
            f"{x}.weight": base[f"{x}.weight"] + 8 * start[b] @ start[a]
            for x, (b, a) in adapters.pairs(start).items()
        }

    losses, norms = [], []
    for t, batch in enumerate(Batches(rows(0, 8), END, OF_DATA).steps(4, 4)):
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        out = torch.func.functional_call(net, merged(), kwargs=inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), batch.labels[:, 1:].flatten())
        found = dict(zip(start, torch.autograd.grad(loss, list(start.values())), strict=True))
        norm = sum(float(g.square().sum()) for g in found.values()) ** 0.5
        for n, p in start.items():
            g = found[n] * min(1, 1 / norm)
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g * g
            step = (m[n] / (1 - 0.9 ** (t + 1))) / ((v[n] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            p.data -= 1e-2 * [0.5, 1, 1, 0.5][t] * step
        losses.append(loss.item())
        norms.append(norm)
    assert max(norms) > 1.5 * min(norms) > 1.5
    told: list[float] = []
    model = recovered(values, tmp_path / "r", lambda step, steps, loss: told.append(loss))
    assert told == pytest.approx(losses, rel=1e-4)
    after, theirs = dict(named_tensors(model.net)), {n: w.detach() for n, w in merged().items()}
    for layer in adapters.pairs(start):
        name = f"{layer}.weight"
        moved = (theirs[name] - base[name]).norm()
        assert float((after[name].double() - theirs[name]).norm() / moved) < 0.01


def test_dropout_is_a_function_of_seed_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[int] = []
    own = llm_pruner.training
    monkeypatch.setattr(recovery, "training", lambda model, key: keys.append(key) or own(model, key))
    for seed in (0, 1):
        recovered(LORA | {"steps": 3}, tmp_path / str(seed), seed=seed)
    assert len(set(keys)) == 6


@pytest.mark.parametrize(("recover", "save_every"), [("lora", 2), ("lora", 100), ("gkd", 2)])
def test_a_stopped_recovery_goes_on_bit_for_bit(recover: str, save_every: int, tmp_path: Path) -> None:
    values = LORA | {"recover": recover, "steps": 5, "save_every": save_every, "lr": 1e-3}
    whole = recovered(values, tmp_path / "whole")
    with pytest.raises(Interrupted):
        recovered(values, tmp_path / "part", stop_at(3))
    steps: list[int] = []
    again = recovered(values, tmp_path / "part", lambda step, *_: steps.append(step))
    assert steps == [4, 5]
    assert digest(named_tensors(again.net)) == digest(named_tensors(whole.net))
    with pytest.raises(UsageError, match="other weights, rows or settings"):
        recovered(values, tmp_path / "part", seed=6)


def test_an_interrupted_recovery_leaves_the_pruned_weights(tmp_path: Path) -> None:
    made = pruner(**LORA)
    pruned = made.prune(tiny(), rows(0, 8), tmp_path)
    before = pruned.digest
    with pytest.raises(Interrupted):
        made.train(pruned, pruned, rows(0, 8), 5, tmp_path / "recovery", stop_at(2))
    assert pruned.attachment is None
    assert digest(named_tensors(pruned.net)) == before


def test_the_whole_model_teaches_the_pruned_one(tmp_path: Path) -> None:
    made, whole = pruner(**LORA | {"recover": "gkd", "steps": 10, "lr": 3e-3}), tiny()
    before = digest(named_tensors(whole.net))
    pruned = made.prune(whole, rows(0, 8), tmp_path)
    assert digest(named_tensors(whole.net)) == before
    far = gkd.Trainer(teacher="t").distance(pruned, whole, rows(0, 8))
    model = made.train(pruned, whole, rows(0, 8), OF_DATA, tmp_path / "recovery")
    assert gkd.Trainer(teacher="t").distance(model, whole, rows(0, 8)) < 0.9 * far
    assert digest(named_tensors(whole.net)) == before


def test_a_loss_that_is_no_number_ends_the_recovery(tmp_path: Path) -> None:
    made = pruner(**LORA)
    pruned = made.prune(tiny(), rows(0, 8), tmp_path)
    pruned.net.model.norm.weight.fill_(math.nan)
    with pytest.raises(FleetuneError, match="the loss is nan in step 1"):
        made.train(pruned, pruned, rows(0, 8), 5, tmp_path / "recovery")
    assert not (tmp_path / "recovery").exists()


# --- bad settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"ratio": 0}, "between 0 and 1"),
        ({"ratio": 1}, "between 0 and 1"),
        ({"importance": "third"}, "not one of"),
        ({"aggregate": "last"}, "not one of"),
        ({"scope": "all"}, "not one of"),
        ({"mode": "channel"}, "not one of"),
        ({"recover": "sft"}, "not one of"),
        ({"round_to": 0}, "below 1"),
        ({"samples": 0}, "below 1"),
        ({"first": -1}, "below 0"),
        ({"lr": 0}, "must be positive"),
        ({"alpha": math.inf}, "must be positive"),
        ({"dropout": 1}, "not both shares"),
        ({"warmup": 2}, "not both shares"),
        ({"r": 0}, "below 1"),
        ({"rato": 0.5}, "Did you mean 'ratio'"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        pruner(**values)


@pytest.mark.parametrize(
    ("values", "sizes", "text"),
    [
        ({"first": 2, "last": 2}, {}, "spare all 4 blocks"),
        ({"round_to": 64}, {}, "more than the 40 channels"),
        ({"ratio": 0.04}, {}, "takes nothing from 3 key heads and 40 channels in steps of 4"),
        ({"mode": "depth", "ratio": 0.2}, {}, "less than half a block"),
        ({"mode": "depth", "ratio": 0.9, "first": 0, "last": 0}, {}, "of 4 blocks is all of them"),
        ({"recover": "gkd"}, {"max_position_embeddings": 100}, "beyond the context of 100"),
    ],
)
def test_models_that_do_not_fit(values: dict[str, Any], sizes: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        pruner(**values).check(tiny(**sizes), 24, plain=False)


def test_depth_may_take_all_that_is_not_spared(tmp_path: Path) -> None:
    made = pruner(mode="depth", ratio=0.9, first=1, last=1, recover="none")
    made.check(tiny(), 24, plain=False)
    assert made.prune(tiny(), rows(0, 8), tmp_path).net.config.num_hidden_layers == 2


def test_check_tells_other_families_and_plain_text() -> None:
    pruner().check(tiny(), 24, plain=True)
    pruner(recover="gkd").check(tiny(), 24, plain=False)
    with pytest.raises(RecipeError, match="not on plain text"):
        pruner(recover="gkd").check(tiny(), 24, plain=True)
    with pytest.raises(RecipeError, match="type 'mistral' are not pruned; llama, qwen2, qwen3 are"):
        pruner().check(tiny("mistral"), 24, plain=False)
    broken = tiny()
    broken.net.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(RecipeError, match="not finite"):
        pruner().check(broken, 24, plain=False)


def test_the_name_is_the_files_with_either_dash() -> None:
    assert "llm-pruner" in compression.entries()
    assert compression.method_class("llm_pruner") is compression.method_class("llm-pruner")
    with pytest.raises(UsageError, match="Did you mean 'llm-pruner'"):
        compression.method_class("llm-prune")
    assert isinstance(pruner(), compression.Pruner)
    assert not isinstance(pruner(), compression.Trainer)
