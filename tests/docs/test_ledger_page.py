"""The replay on docs/ledger.md rebuilds what `fleetune verify` rebuilds, without Fleetune."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from command_line import ok
from fleetune import models
from fleetune.models.net.model import Model
from fleetune.seeds import ledger as ledgers
from fleetune.seeds.ledger import Ledger, LedgerHead
from fleetune.tuning.result import finished

PAGE = Path(__file__).parents[2] / "docs" / "ledger.md"
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def replay(ledger: Path, base: Path) -> subprocess.CompletedProcess[str]:
    """Run the page's program as it stands there."""
    ledger = ledger.absolute()
    program = ledger.with_name("replay.py")
    program.write_text(CODE, encoding="utf-8")
    line = [sys.executable, "-I", program, ledger, base]
    return subprocess.run(line, capture_output=True, text=True, cwd=ledger.parent)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(hidden=64).save(tmp_path_factory.mktemp("model") / "tiny")


def on(model: Model, law: str, K: int, entries: list[tuple[int, int]]) -> Ledger:
    """A ledger on this base with these (id, coefficient) pairs in two rounds."""
    tensors = tuple((n, tuple(t.shape), str(t.dtype)[6:]) for n, t in models.named_tensors(model.net))
    grid = 2.0**-18  # so that 16-bit types meet ties
    head = LedgerHead(model.digest, model.tokenizer_digest, tensors, 0x0123456789ABCDEF, law, K, grid)
    ids, coefficients = (np.array(column) for column in zip(*entries, strict=True))
    return Ledger(head).append(ids[:2], coefficients[:2], 1).append(ids[2:], coefficients[2:], 2)


@pytest.mark.parametrize(
    ("method", "values"),
    [("fedkseed", ["K=64", "tau=3", "lr=1e-3"]), ("signlora", ["steps=2", "pool=3", "r=2", "lr=0.05"])],
)
def test_it_rebuilds_a_tuned_model(method, values, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--method", method, *(word for value in values for word in ("--set", value)), "--clients", "2"]
    sizes = ["--rounds", "2", "--limit", "20", "--max-length", "48", "--samples", "0"]
    run = Path(ok(capsys, "tune", tiny, "demo", *words, *sizes)[-1]["run"])
    verified = ok(capsys, "ledger", "replay", str(run))[-1]
    done = replay(run / "ledger.safetensors", tiny)
    assert done.stdout.strip() == verified["digest"], done.stderr
    stated = ledgers.load(run / "ledger.safetensors").head.checks
    assert verified["digest"] == stated[max(stated, key=int)]


PAIRS = [(0, 70_000), (5, -300), (15, 1 << 20), (5, 100), (3, -1), (1 << 32 | 5, 11), (1 << 32 | 9, 1 << 29)]
TIES = [(id, c << 12) for id, c in ((0, 30), (5, -4), (15, 70), (5, 3), (3, -1), (1 << 32 | 9, 12))]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("law", "K"), [("hashed", 16), ("hashed", 8192), ("rademacher", 1)])
def test_every_dtype_and_law_that_it_knows(tiny: Path, tmp_path: Path, dtype: str, law: str, K: int):
    model = models.load(str(tiny), dtype=dtype)
    ledger = on(model, law, K, PAIRS if dtype == "fp32" else TIES)
    ledger.save(tmp_path / "ledger.safetensors")
    done = replay(tmp_path / "ledger.safetensors", tiny)
    assert done.stdout.strip() == finished.rebuild(model, ledger), done.stderr
    assert done.stdout.strip() != model.digest


def test_it_refuses_another_base(tiny: Path, tmp_path: Path):
    model = models.tiny_llama(seed=1, hidden=64)
    models.save(model.net, model.tokenizer, tmp_path / "other")
    on(models.load(str(tiny)), "hashed", 16, PAIRS).save(tmp_path / "ledger.safetensors")
    done = replay(tmp_path / "ledger.safetensors", tmp_path / "other")
    assert done.returncode == 1
    assert model.digest in done.stderr
