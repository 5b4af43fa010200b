# SPDX-License-Identifier: Apache-2.0
"""Make the recipes of `fleetune demo`: two short real jobs on smollm2-135m and the built-in data of 24 sites.

FedIT first, because minutes of back-propagation on an adapter show a gain; then FedKSeed, because a
full-parameter fine-tune as some kilobytes is what no other tool has.  Its fleet is mixed: every second site
back-propagates, the others only run the model forward.  In so few steps forward passes alone would move the
loss by hundredths (`recipe:fedkseed`).
"""

from __future__ import annotations

from typing import Any

from fleetune.tuning.recipe.recipe import Recipe, make

MODEL = "smollm2-135m"
LENGTH = 256  # tokens of a row at most
ANSWER = 72  # tokens of an answer at most


def recipes(*, quick: bool = False) -> list[Recipe]:
    """Return the demo's recipes, in order; `quick` takes a few steps of each, to see the path."""
    shared: dict[str, Any] = {
        "model": MODEL,
        "data": "demo",
        "partition": "column:client",
        "held_out": 32,
        "max_length": LENGTH,
        "samples": 2,
        "answer_tokens": ANSWER,
        "client_rows": 0,  # two rows of each site tell little
    }
    fedit = shared | {  # many small steps of few sites: four of them a round
        "method": "fedit",
        "rounds": 1 if quick else 3,
        "participation": 0.125 if quick else 0.167,
        "set": {"r": 8, "alpha": 16, "dropout": 0.0, "lr": 2e-3, "batch_size": 2, "epochs": 1},
    }
    fedkseed = shared | {
        "method": "fedkseed",
        "rounds": 1 if quick else 2,
        "participation": 0.167,
        "samples": 0,
        "eval_every": 2,
        "set": {
            "K": 1024,
            "tau": 1 if quick else 4,
            "lr": 1e-4,
            "eps": 1e-3,
            "batch_size": 4,
            "backprop": 0.5,
            "backprop_steps": 1 if quick else 3,
            "backprop_lr": 5e-3,
        },
    }
    return [make(fedit), make(fedkseed)]
