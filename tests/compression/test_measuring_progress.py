# SPDX-License-Identifier: Apache-2.0
"""What is measured before and after a compression, and by `eval`, is counted row by row, and Ctrl-C stops it."""

from __future__ import annotations

from pathlib import Path

import pytest
from deploy_harness import tiny

import fleetune
from fleetune import models
from fleetune.cli.main import main
from fleetune.compression.jobs import solve
from fleetune.errors import Interrupted
from heard import Heard

ROWS = [{"prompt": f"say {w}", "response": f"{w} it is"} for w in "abcdefghij"]


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = tiny()
    models.save(model.net, model.tokenizer, tmp_path / "little")
    (tmp_path / "text.txt").write_text("a few words of a text, some more of them. " * 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def counts(heard: Heard) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for what, done, total, _ in heard.counts:
        found.setdefault(what, []).append((done, total))
    return found


def test_a_compression_counts_the_rows_that_it_measures_on(at: Path) -> None:
    heard = Heard()
    fleetune.compress("little", method="rtn", eval_text="text.txt", listener=heard)
    found = counts(heard)
    windows = found["rows of the reference"][-1][1]
    assert windows > 1
    once = [(n, windows) for n in range(1, windows + 1)]
    assert found["rows of the reference"] == found["rows compared"] == once
    assert found["rows of the text"] == once * 2, "before and after"


@pytest.mark.parametrize("what", ["rows of the text", "rows of the reference", "rows compared"])
def test_a_stop_while_measuring_is_heard_and_resumed_to_the_same_bits(at: Path, what: str) -> None:
    whole = fleetune.compress("little", method="rtn", eval_text="text.txt")
    with pytest.raises(Interrupted) as caught:
        fleetune.compress("little", method="rtn", eval_text="text.txt", listener=Heard(stop_at=what))
    assert caught.value.hint == "fleetune compress --resume runs/0002-rtn-little"
    again = fleetune.resume_compression("latest")
    assert again.folder == Path("runs/0002-rtn-little")
    assert (again.digest, again.done.after) == (whole.digest, whole.done.after)
    assert not list(again.folder.glob("*.npy"))


def test_a_compression_that_is_stopped_at_once_says_how_it_is_resumed(
    at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*args: object, **how: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(solve, "solve", stopped)
    assert main(["compress", "little", "--method", "rtn"]) == 130
    assert capsys.readouterr().err.endswith(
        "stopped\n  resume: fleetune compress --resume runs/0001-rtn-little\n"
    )


class Hasty(Heard):
    """Ctrl-C as soon as the header is shown: the job's folder is there."""

    def header(self, title: str, rows: object) -> None:
        raise KeyboardInterrupt


def test_so_does_one_that_is_stopped_before_its_first_step(at: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        fleetune.compress("little", method="rtn", listener=Hasty())
    assert stopped.value.__notes__ == ["fleetune compress --resume runs/0001-rtn-little"]
    assert fleetune.resume_compression("runs/0001-rtn-little").digest


def test_eval_counts_rows_answers_and_what_is_compared(at: Path) -> None:
    heard = Heard()
    fleetune.evaluate(
        "little", ROWS, tasks=["loss", "rouge_l"], answer_tokens=2, reference="little", listener=heard
    )
    assert counts(heard) == {
        "rows of the reference": [(n, 10) for n in range(1, 11)],
        "rows": [(8, 10), (10, 10)],
        "answers": [(8, 10), (10, 10)],
        "rows compared": [(n, 10) for n in range(1, 11)],
    }
    heard = Heard()
    fleetune.evaluate("little", text="text.txt", listener=heard)
    assert set(counts(heard)) == {"rows of the text"}
