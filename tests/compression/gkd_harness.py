"""What the tests of GKD share: rows, two models, settings, and the divergence as the paper writes it."""

from typing import Any

import numpy as np
from torch import Tensor

from fleetune import compression, models
from fleetune.compression.methods import gkd
from fleetune.data.encode import MASKED, Encoded
from fleetune.models import Model

END = 257


def rows(seed: int, count: int, longest: int = 24) -> list[Encoded]:
    """Texts of a few letters, so that there is something to learn, each with an end token."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt, answer = (rng.integers(60, 70, rng.integers(*few)) for few in ((2, 8), (1, longest - 8)))
        made.append(Encoded(np.array([256, *prompt, *answer, END], np.int32), 1 + len(prompt)))
    return made


def trainer(**values: Any) -> gkd.Trainer:
    given = {"teacher": "t", "steps": 6, "batch_size": 3, "max_new_tokens": 6, "lr": 1e-3, "lmbda": 0.5}
    made = compression.make("gkd", given | values)
    assert isinstance(made, gkd.Trainer)
    return made


def formula(Q: Tensor, P: Tensor, beta: float) -> Tensor:
    """The paper's divergence of each row, from logits, in float64 and with probabilities."""
    q, p = Q.double().softmax(-1), P.double().softmax(-1)
    if beta in (0, 1):
        a, b = (p, q) if beta == 0 else (q, p)
        return (a * (a / b).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


def pair() -> tuple[Model, Model]:
    return models.tiny_llama(0), models.tiny_llama(1)


def whole(model: Model, batch: Any) -> Tensor:
    """All logits."""
    return model.net(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def direct(student: Model, teacher: Model, batch: Any, beta: float) -> Tensor:
    """The divergence of every scored token from whole arrays of logits."""
    Q, P = whole(student, batch), whole(teacher, batch)
    scored = batch.labels[:, 1:] != MASKED
    return formula(Q[:, :-1][scored], P[:, :-1][scored], beta)
