"""Rows behind one another give what they give side by side with padding; a net that mixes them is left alone."""

import numpy as np
import pytest
import torch

from fleetune.data import Batches, Encoded
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models import tiny_tokenizer
from fleetune.models.net.layers import by_layer
from fleetune.models.net.packed import packing
from tiny_families import DECODERS, build, model_of

# attention with a cap or sinks, or (by its version) not transformers' function; state spaces and convolutions
MIXES = {"bloom", "falcon", "gemma2", "gpt_oss", "lfm2", "mamba"}
ROWS = [
    Encoded(ids=np.arange(7, 7 + 5 * n, 5, dtype=np.int32) % 250, n_prompt=n // 3) for n in (11, 4, 2, 14)
]


def batch(packed):
    batches = Batches(ROWS, 257, key=3)
    batches.packed = packed
    return next(batches.steps(1, len(ROWS)))


def gradients(model, rows):
    for parameter in model.net.parameters():
        parameter.requires_grad_(True).grad = None
    loss = loss_tensor(model, rows)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", DECODERS)
def test_losses_and_gradients_are_those_of_padded_rows(family):
    model = model_of(build(family), tiny_tokenizer(), family)
    padded, slopes = gradients(model, batch(0))
    with packing(model.net) as most:
        assert most >= 14 or family in MIXES
        if not most:
            return
        packed, own = gradients(model, batch(most))
        with by_layer(model.net, small=0):
            recomputed, again = gradients(model, batch(most))
        assert gradients(model, batch(0))[0] == pytest.approx(padded, rel=1e-6)
    assert packed == pytest.approx(padded, rel=1e-5)
    assert recomputed == packed
    for name, slope in slopes.items():
        torch.testing.assert_close(own[name], slope, rtol=1e-3, atol=1e-6)
        assert torch.equal(own[name], again[name]), name
