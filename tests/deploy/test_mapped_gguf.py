# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a mapped base: digests, replies of every method, runs and exports are those of its conversion in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_harness import compressed, tiny

import fleetune
from fleetune import models
from fleetune.data import Encoded
from fleetune.deploy.export import export
from fleetune.errors import ModelError, RecipeError
from fleetune.evaluation.losses import response_loss
from fleetune.models import stored
from fleetune.models.lazy import weights_of
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, encode
from fleetune.tuning.result import finished
from fleetune.tuning.rounds.fleets.local import LocalFleet

pytestmark = pytest.mark.usefixtures("own_cache")
IDS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a GGUF file of 4-bit codes."""
    at = tmp_path_factory.mktemp("gguf")
    compressed(tiny(), at / "codes")
    export(at / "codes", "gguf", at / "m.gguf")
    return at / "m.gguf"


def test_a_gguf_file_is_read_where_it_is(file: Path) -> None:
    whole = models.load(str(file), device="cpu")
    mapped = models.load(str(file), device="cpu", base="mapped")
    assert mapped.digest == whole.digest
    assert mapped.tokenizer_digest == whole.tokenizer_digest
    assert not list(mapped.path.glob("*.safetensors"))
    assert {w.stored.kind for w in weights_of(mapped.net).values()} >= {"Q4_0"}
    assert all(w.stored.file.path == file for w in weights_of(mapped.net).values())
    with torch.inference_mode():
        torch.testing.assert_close(mapped.net(input_ids=IDS).logits, whole.net(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, -100),
        (0, 1.5),
        (0, "x"),
        (1, 0),
        (1, 18),
        (2, "Q9_9"),
        (2, None),
        (2, "Q8_0"),
        (3, "ab"),
        (3, [-64, -64]),
        (4, [0] * 64),
        (4, [-1, *range(1, 64)]),
        (4, [*range(64), *range(64)]),
        (4, [0.5, *range(1, 64)]),
        (5, "yes"),
    ],
)
def test_a_list_that_states_what_cannot_be_is_refused(
    place: int, value: Any, file: Path, tmp_path: Path
) -> None:
    """An attacker makes the sums right: the list is read alone here."""
    folder = models.load(str(file), device="cpu", base="mapped").path
    rows = json.loads((folder / stored.PLACES_FILE).read_bytes())
    name = next(n for n in rows if n.endswith("q_proj.weight"))
    assert (rows[name][2:4], len(rows[name][4])) == (["Q4_0", [64, 64]], 64)
    rows[name][place] = value
    (tmp_path / stored.PLACES_FILE).write_text(json.dumps(rows))
    with pytest.raises(ModelError, match="is damaged"):
        stored.read_places(tmp_path, file)


def test_a_file_that_was_cut_is_refused(file: Path, tmp_path: Path) -> None:
    mapped = models.load(str(file), device="cpu", base="mapped")
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ModelError, match="shorter than its tensors"):
        stored.read_places(mapped.path, short)


def test_auto_leaves_weights_in_their_file_where_they_would_fill_memory(file: Path, tmp_path: Path) -> None:
    tiny_one = models.tiny_llama()
    models.save(tiny_one.net, tiny_one.tokenizer, tmp_path / "m")
    need = 4 * models.load(str(tmp_path / "m"), device="cpu").n_params
    for name in (tmp_path / "m", file):
        assert not weights_of(models.load(str(name), device="cpu", base="auto").net)
    for ram, lazy_ones in ((2 * need + 8, False), (2 * need - 8, True)):
        loaded = models.load(str(tmp_path / "m"), device="cpu", base="auto", ram=ram)
        assert bool(weights_of(loaded.net)) == lazy_ones
    assert weights_of(models.load(str(file), device="cpu", base="auto", ram=1000).net)


@pytest.mark.parametrize(
    ("base", "device", "words"), [("disk", "cpu", "no base named"), ("mapped", "cuda", "cuda")]
)
def test_what_cannot_be_is_refused(base: str, device: str, words: str, file: Path) -> None:
    with pytest.raises(ModelError, match=words):
        models.load(str(file), device=device, base=base)


# Methods --------------------------------------------------------------------------------------------

ROWS = [Encoded(np.arange(i, i + 12, dtype=np.int32), 4) for i in range(6)]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mezo": ("mezo", {"tau": 3}),
    "zosgd": ("zosgd", {"tau": 3}),
    "onebyte": ("onebyte", {"directions": 3}),
    "fedkseed": ("fedkseed", {"tau": 3, "K": 64}),
    "fwdllm": ("fwdllm", {"P": 2}),
    "backward": ("fedkseed", {"K": 64, "backprop": 1.0, "backprop_steps": 2}),
    "fedit": ("fedit", {"dropout": 0.2}),
    "pissa": ("fedit", {"start": "pissa", "dropout": 0.0}),
    "eva": ("fedit", {"start": "eva"}),
    "fedpeptao": ("fedpeptao", {"layers_rule": "half", "tokens": 3}),
} | {m: ("fedpetuning", {"module": m}) for m in ("full", "prefix", "adapter", "lora", "bitfit", "prompt")}


@pytest.mark.parametrize("kind", KINDS)
def test_replies_are_the_same_bytes(kind: str, file: Path) -> None:
    name, settings = KINDS[kind]
    sent, losses = [], []
    for base in ("memory", "mapped"):
        model = models.load(str(file), device="cpu", base=base)
        method: Any = methods.make(name, {"batch_size": 3, "lr": 1e-3, **settings})
        fleet = LocalFleet(model, method, [ROWS], 7, 0)
        state = method.init(model, 5)
        message = encode(Message(1, b"12345678", method.kinds(state)[-1][0]))
        (answer,) = fleet.ask(1, [0], message)
        assert answer.data is not None, answer.reason
        sent.append(answer.data)
        losses.append(response_loss(model, ROWS))
    assert sent[0] == sent[1]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["mezo", "fedit"])
def test_a_run_is_measured_replayed_and_written_from_a_mapped_base(
    method: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fleetune

    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(24)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for base in ("memory", "mapped"):
        run = fleetune.tune(
            str(file), "rows.jsonl", method=method, rounds=1, clients=2, base=base, set={"lr": 1e-4}
        )
        values = fleetune.evaluate(run, tasks=["loss"], base=base)
        written = finished.export_hf(fleetune.open(run.folder).load(base=base), tmp_path / f"out-{base}")
        found[base] = (run.done.digest, run.done.tuned["loss"], values["loss"], written)
    assert found["memory"] == found["mapped"]


def test_a_run_goes_on_where_the_base_is_elsewhere_to_the_same_bits(file: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {
        "clients": 2,
        "samples": 0,
        "client_rows": 0,
        "held_out": 4,
        "settings": {"lr": 1e-3, "steps": 2},
    }
    rows = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(24)]
    whole = fleetune.tune(str(file), rows, method="fedit", rounds=2, base="memory", out=tmp_path / "a", **few)
    half = fleetune.tune(str(file), rows, method="fedit", rounds=1, base="memory", out=tmp_path / "b", **few)
    with pytest.raises(RecipeError, match="base = 'disk' is none of auto, memory, mapped"):
        fleetune.resume_run(half, rounds=2, base="disk")
    assert fleetune.resume_run(half, rounds=2, base="mapped").done.digest == whole.done.digest
