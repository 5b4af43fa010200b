"""Rows that the methods' tests share."""

from __future__ import annotations

import pytest

from fleetune.data import Encoded, Example
from fleetune.data.encode import encode_all
from fleetune.models import tiny_llama


@pytest.fixture(scope="module")
def rows() -> list[Encoded]:
    examples = [Example((("user", f"say {n}"),), "yes" if n % 2 else "a number", {}) for n in range(8)]
    return encode_all(examples, tiny_llama().tokenizer, 48)[0]
