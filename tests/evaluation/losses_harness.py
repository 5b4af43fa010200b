"""Rows, and their losses a token at a time in float64."""

import math
import random

import numpy as np
import torch
from torch import nn

from fleetune.data.encode import Batch, Encoded, collate, encode_all
from fleetune.data.read_rows import Example
from fleetune.evaluation.losses import eval_mode, token_losses
from fleetune.models import Model

CHUNK_BYTES = "fleetune.evaluation.head_loss.CHUNK_BYTES"
VOCAB = 264
TEXT = "the river runs past the old stone mill, and the wind turns its wheel at night"


def examples_of(count: int) -> list[Example]:
    draw = random.Random(5)
    words = ["river", "stone", "apple", "cloud", "lamp", "wind"]
    made = []
    for i in range(count):
        ask, say = draw.choices(words, k=1 + 3 * i % 7), draw.choices(words, k=1 + 2 * i % 5)
        made.append(Example((("user", " ".join(ask)),), " ".join(say), {"client": f"site {i}"}))
    return made


def labelled(*labels: str) -> list[Example]:
    return [Example((("user", "why " * (i + 1)),), label, {}) for i, label in enumerate(labels)]


def rows_of(model: Model, count: int = 7) -> list[Encoded]:
    return encode_all(examples_of(count), model.tokenizer, 256)[0]


def by_hand(net: nn.Module, batch: Batch) -> list[tuple[int, float]]:
    """(row, cross-entropy) of each scored token, one at a time in float64 from the full logits."""
    with torch.no_grad():
        logits = net(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    found = []
    for b, t in (batch.labels != -100).nonzero().tolist():
        if t > 0:
            scores = logits[b, t - 1].double().numpy()
            top = scores.max()
            log_sum = top + math.log(np.exp(scores - top).sum())
            found.append((b, log_sum - scores[int(batch.labels[b, t])]))
    return found


def says(model: Model, chances: dict[str, float]) -> None:
    """Rig the model: the chance of each character is the same at every place."""
    scores = torch.full((VOCAB,), -30.0)
    for char, chance in chances.items():
        scores[model.tokenizer(char)["input_ids"][0]] = math.log(chance)
    model.net.lm_head.register_forward_hook(lambda module, args, out: scores.expand(out.shape))


def odd_batch() -> Batch:
    """Ragged rows: one scored from its first token, one not at all, one with gaps in its labels."""
    draw = np.random.default_rng(0)
    rows = [(9, 0), (4, 4), (12, 5), (7, 6)]
    made = [Encoded(draw.integers(0, 256, n).astype(np.int32), prompt) for n, prompt in rows]
    batch = collate(made, 257)
    batch.labels[2, 7:9] = -100
    return batch


def same_losses(net: nn.Module, batch: Batch) -> None:
    expected = by_hand(net, batch)
    with eval_mode(net):
        losses, rows = token_losses(net, batch)
    assert rows.tolist() == [row for row, _ in expected]
    np.testing.assert_allclose(losses.numpy(), [loss for _, loss in expected], rtol=0, atol=5e-6)
