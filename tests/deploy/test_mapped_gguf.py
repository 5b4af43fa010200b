"""A GGUF file as a mapped base: digests, replies of every method, runs and exports are those of its conversion in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_harness import compressed, tiny

from fleetune import models
from fleetune.data import Encoded
from fleetune.deploy.export import write as export
from fleetune.evaluation.losses import response_loss
from fleetune.models.lazy import weights_of
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, encode
from fleetune.tuning.rounds.simulated_fleet import LocalFleet

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


ROWS = [Encoded(np.arange(i, i + 12, dtype=np.int32), 4) for i in range(6)]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mezo": ("mezo", {"tau": 3}),
    "onebyte": ("onebyte", {"directions": 3}),
    "fedkseed": ("fedkseed", {"tau": 3, "K": 64}),
    "backward": ("fedkseed", {"K": 64, "backprop": 1.0, "backprop_steps": 2}),
    "fedit": ("fedit", {"dropout": 0.2}),
    "pissa": ("fedit", {"start": "pissa", "dropout": 0.0}),
    "fedpeptao": ("fedpeptao", {"layers_rule": "half", "tokens": 3}),
} | {m: ("fedpetuning", {"module": m}) for m in ("full", "bitfit")}


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
