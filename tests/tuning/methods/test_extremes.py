# SPDX-License-Identifier: Apache-2.0
"""Whatever integers a reply may hold, the server's ledger takes them: one bad client never stops a round."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fleetune.models import tiny_llama
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Payload
from fleetune.tuning.methods import Reply

CASES: list[tuple[str, dict[str, Any]]] = [
    ("mezo", {"tau": 3, "K": 16}),
    ("zosgd", {"tau": 3, "K": 16}),
    ("fedkseed", {"tau": 3, "K": 16}),
    ("fedkseed", {"tau": 3, "K": 16, "server_lr": 64.0}),
    ("onebyte", {"directions": 3, "K": 16}),
    ("onebyte", {"directions": 3, "K": 16, "wire": "sign"}),
]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda c: str(c).replace(" ", ""))
@pytest.mark.parametrize("end", ["min", "max"])
def test_the_largest_integers_that_pass_the_door_are_taken(
    name: str, settings: dict[str, Any], end: str
) -> None:
    method, model = methods.make(name, settings), tiny_llama()
    state = method.init(model, 5)
    for _ in range(3):
        spec = method.expects(state)
        arrays = {
            n: np.full(
                [3 if side is None else abs(side) for side in shape], getattr(np.iinfo(kind), end), kind
            )
            for n, (kind, shape) in spec.arrays.items()
        }
        scalars = {n: 3 if kind is int else 1.0 for n, (kind, _, _) in spec.scalars.items()}
        state = method.aggregate(state, iter([Reply(0, 9, Payload(arrays, scalars))]))
    assert np.abs(state.ledger.coefficients.astype(np.int64)).max(initial=0) < 1 << 31
