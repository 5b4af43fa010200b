"""The working folder, with the tiny model and rows; encoded rows that the methods' tests share."""

from pathlib import Path

import pytest

from fleetune.data import Encoded, Example
from fleetune.data.encode import encode_all
from fleetune.models import tiny_llama


@pytest.fixture
def place(tiny: str, at: Path) -> Path:
    (at / "tiny").symlink_to(tiny)
    rows = (f'{{"instruction": "say {i}", "response": "{i} it is"}}\n' for i in range(24))
    (at / "rows.jsonl").write_text("".join(rows))
    return at


@pytest.fixture(scope="module")
def rows() -> list[Encoded]:
    examples = [Example((("user", f"say {n}"),), "yes" if n % 2 else "a number", {}) for n in range(8)]
    return encode_all(examples, tiny_llama().tokenizer, 48)[0]
