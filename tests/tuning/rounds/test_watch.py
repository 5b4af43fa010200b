"""A run that diverges says so at once, once, with what to change; and says at the end what its change is worth."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fleetune
from command_line import FEW
from fleetune.cli.main import main
from fleetune.common import files
from fleetune.common.events import ClientReply, Diverging, RoundDone, RoundEvaluated, as_dict
from fleetune.runs.rundir import events
from fleetune.tuning.rounds.watch import Watch
from heard import Heard


@dataclass
class Some:
    lr: float = 3e-3
    clip: float = 0.0


def evaluated(round: int, loss: float, error: float | None = 0.01) -> RoundEvaluated:
    return RoundEvaluated(round=round, loss=loss, change_error=error if round else None)


COSTS: dict[str, Any] = {"bytes_up": 1, "bytes_down": 1, "seconds": 0.0, "rss": 1}


def replied(round: int, loss: float | None, status: str = "ok", reason: str = "", client: int = 0) -> Any:
    return ClientReply(round=round, client=client, n=1, loss=loss, status=status, reason=reason, **COSTS)


def ended(round: int) -> RoundDone:
    return RoundDone(round=round, clients=1, accepted=1, bytes_total=2, **COSTS)


def heard(watch: Watch, *told: Any) -> list[Diverging | None]:
    return [watch.heard(event) for event in told]


def test_a_loss_above_the_start_by_more_than_noise_is_said_at_once_and_once():
    watch = Watch(Some(), "loss", ())
    nothing, within, rose, again = heard(
        watch, evaluated(0, 4.0), evaluated(1, 4.019), evaluated(2, 4.03), evaluated(3, 9.0)
    )
    assert (nothing, within, again) == (None, None, None)
    assert rose.round == 2
    assert "has risen to 4.030 from 4.000 before tuning, by more than noise (0.020)" in rose.text
    assert "--set lr=0.0003" in rose.text
    assert "clip" in rose.text


def test_where_privacy_adds_noise_no_learning_rate_is_blamed():
    (_, rose) = heard(Watch(Some(), "loss", (), noise=1.0), evaluated(0, 4.0), evaluated(1, 5.0))
    assert "the noise may be too loud" in rose.text
    assert "learning rate" not in rose.text


def test_ups_and_downs_after_a_gain_are_not_divergence_and_half_the_gain_lost_is():
    told = (evaluated(0, 4.0), evaluated(1, 3.0), evaluated(2, 3.49), evaluated(3, 3.51))
    *before, lost = heard(Watch(Some(), "loss", ()), *told)
    assert before == [None] * 3
    assert "from 3.000 after round 1" in lost.text
    assert "--set lr=0.001" in lost.text
    assert "--keep best" in lost.text


def test_a_loss_that_is_twice_what_it_was_is_said_before_the_model_is_evaluated():
    calm = [evaluated(0, 4.0), replied(1, 5.0), ended(1), replied(2, 9.9), ended(2), replied(3, 10.1)]
    *before, blown = heard(Watch(Some(clip=1.0), "loss", ()), *calm, ended(3))
    assert before == [None] * 6
    assert blown.text.startswith(
        "round 3: the median client's loss is 10.100, 2.02 times its first; lower the learning rate"
    )
    assert "clip" not in blown.text  # it has one
    first = heard(Watch(Some(), "loss", ()), evaluated(0, 4.0), replied(1, 8.1), ended(1))[-1]
    assert first is not None  # of a first reply the base's loss is the measure


def test_replies_that_are_not_finite_are_said_in_their_round():
    lost = replied(1, None, "refused", "2752 values that are not finite")
    *_, found = heard(Watch(Some(), "loss", ()), evaluated(0, 4.0), lost, ended(1))
    assert "the median client's reply is not finite; let the learning rate be found" in found.text
    assert heard(Watch(Some(), "loss", ()), replied(1, None, "refused", "too far"), ended(1)) == [None] * 2


@pytest.mark.parametrize("lie", [(1e9, "ok", ""), (None, "refused", "1 value that is not finite")])
def test_what_one_of_several_clients_says_is_no_divergence(lie):
    """A loss of 1e9 used to be said, and then nothing of the validation loss any more."""
    honest = [replied(1, 3.0, client=c) for c in (1, 2)]
    *before, rose = heard(
        Watch(Some(), "loss", ()), evaluated(0, 4.0), *honest, replied(1, *lie), ended(1), evaluated(1, 9.0)
    )
    assert before == [None] * 5
    assert "has risen to 9.000" in rose.text


def test_after_a_resume_it_knows_what_it_heard():
    told = [evaluated(0, 4.0), replied(1, 3.0), evaluated(1, 3.0), replied(2, 3.0), evaluated(2, 3.6)]
    for cut in range(len(told) + 1):
        past = [as_dict(event) for event in told[:cut]]
        watch = Watch(Some(), "loss", past)
        assert [e is not None for e in heard(watch, *told[cut:])] == [i == 4 for i in range(cut, len(told))]
    said = [*(as_dict(e) for e in told), {"event": "diverging", "round": 2, "text": ""}]
    assert Watch(Some(), "loss", said).heard(evaluated(3, 9.0)) is None


def tune(place: Path, out: Path, listener: Heard | None = None, **more: Any) -> fleetune.TuneResult:
    options = FEW | {"method": "fedit", "settings": {"r": 2, "steps": 1, "lr": 30.0}, "rounds": 2}
    options |= {"held_out": 6, "eval_rows": 6, "max_length": 48, "listener": listener, "out": out} | more
    return fleetune.tune(str(place / "tiny"), str(place / "rows.jsonl"), **options)


def test_a_run_that_rises_says_so_in_the_round_and_at_the_end(place, tmp_path):
    notes = Heard()
    run = tune(place, tmp_path, notes)
    assert run.done.tuned["loss"] > run.done.base["loss"]  # type: ignore[operator]
    said = [text for text in notes.notes if "has risen" in text]
    assert len(said) == 1
    assert [e["text"] for e in events(run.folder) if e["event"] == "diverging"] == said
    (rose,) = (text for text in run.done.remarks if text.startswith("the validation loss rose (+"))
    assert "--set lr=1" in rose
    error = run.done.change_errors["loss"]  # type: ignore[index]
    evaluation = files.read_json(run.folder / "eval.json", "")["losses"]
    changes = [t - b for b, t in zip(evaluation["base"], evaluation["tuned"], strict=True)]
    D = sum(changes) / sum(evaluation["tokens"])
    squares = sum((d - D * n) ** 2 for d, n in zip(changes, evaluation["tokens"], strict=True))
    assert error == pytest.approx((6 / 5 * squares) ** 0.5 / sum(evaluation["tokens"]))
    page = run.report.read_text()
    assert f" ± {100 * error / run.done.base['loss']:.1f} %, worse" in page  # type: ignore[operator]


def test_a_change_within_noise_is_called_so(place, capsys):
    run = tune(place, Path("runs"), method="mezo", settings={"tau": 1, "lr": 1e-3}, rounds=1, seed=5)
    assert any("within noise" in text for text in run.done.remarks)
    assert "which is within noise" in run.report.read_text()
    assert "within noise</td>" in run.report.read_text()
    assert main(["eval", "1", "--tasks", "loss"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "loss, 6 held-out rows" in line
    assert "within noise" in line
    assert f"{run.done.base['loss']:.4f}"[:6] in line
