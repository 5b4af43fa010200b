"""Training in steps that resume bit for bit, and what is refused to resume from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gkd_harness import pair, rows, trainer
from safetensors.torch import load_file

from fleetune.compression.training import learning_rate
from fleetune.errors import Interrupted, StorageError, UsageError
from fleetune.models import digest, named_tensors

Stop = Callable[[int, int, float], None]


def run(folder: Path, on_step: Stop, **values: Any) -> str:
    student, teacher = pair()
    trainer(**{"save_every": 2, "steps": 8} | values).train(student, teacher, rows(0, 7), 3, folder, on_step)
    return digest(named_tensors(student.net))


@pytest.mark.parametrize("error", [Interrupted, RuntimeError])
def test_a_stopped_training_goes_on_bit_for_bit(error: type[Exception], tmp_path: Path) -> None:
    """Interrupted keeps the step it comes in; a crash falls back to the last that was kept."""
    whole: list[float] = []
    want = run(tmp_path / "whole", lambda s, n, loss: whole.append(loss))
    assert run(tmp_path / "again", lambda *_: None) == want
    seen: dict[int, float] = {}

    def stop(step: int, steps: int, loss: float) -> None:
        seen[step] = loss
        if step == 5:
            raise error("now")

    with pytest.raises(error):
        run(tmp_path / "p", stop)
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["state.safetensors"]
    more: dict[int, float] = {}
    assert run(tmp_path / "p", lambda step, n, loss: more.update({step: loss})) == want
    assert min(more) == (6 if error is Interrupted else 5)
    assert [(seen | more)[s] for s in range(1, 9)] == whole
    assert run(tmp_path / "p", lambda *_: pytest.fail("all is done already")) == want
    assert run(tmp_path / "other", lambda *_: None, lmbda=1.0) != want


def test_what_is_kept_of_another_training_or_damaged_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "p", lambda *_: None)
    with pytest.raises(UsageError, match="other weights, rows or settings"):
        run(tmp_path / "p", lambda *_: None, lr=2e-3)
    assert "weight/model.norm.weight" in load_file(tmp_path / "p" / "state.safetensors")
    (tmp_path / "p" / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(StorageError, match="damaged"):
        run(tmp_path / "p", lambda *_: None)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(t, 10, 1.0, 0.2) for t in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert learning_rate(0, 3, 1.0, 0) == 1.0
    assert learning_rate(1, 2, 1.0, 1) == 1.0
