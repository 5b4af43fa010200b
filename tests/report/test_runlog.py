"""A run folder read as far as it can be read: its summary, torn and doubled records, and which runs compare."""

import json
import re
import shutil
from pathlib import Path

import pytest
from report_harness import fake_run, lines_of, page_of, write_lines

from command_line import ok
from fleetune.cli.main import main
from fleetune.common import sums
from fleetune.report import runlog
from fleetune.runs import rundir


def test_summary_of_a_run(run24):
    done = lines_of(run24)[-1]
    expected = {
        "name": "0007-fedit-smollm2-135m",
        "path": str(run24),
        "method": "fedit",
        "model": "smollm2-135m",
    }
    expected |= {"status": "done", "rounds": 10, "rounds_planned": 10, "clients": 24, "base_loss": 2.3914}
    expected |= {
        "tuned_loss": done["tuned"]["loss"],
        "change_error": None,
        "seconds": done["wall"],
        "intact": True,
    }
    expected |= {name: done[name] for name in ("bytes_up", "bytes_down", "peak_rss")}
    assert runlog.summary(run24) == expected | {"bytes": done["bytes_up"] + done["bytes_down"]}


def test_summary_before_the_end_is_reckoned_from_the_rounds(tmp_path):
    run = fake_run(tmp_path, rounds=3, status="running")
    events = lines_of(run)
    rounds = [e for e in events if e["event"] == "round"]
    assert runlog.summary(run)["status"] == "interrupted"  # nobody has the folder: it was killed
    with rundir.locked(run):
        found = runlog.summary(run)
    assert found["status"] == "running"
    found["status"] = "interrupted"
    assert found["bytes"] == rounds[-1]["bytes_total"]
    assert found["tuned_loss"] == events[-1]["loss"]
    assert found["seconds"] == pytest.approx(sum(e["seconds"] for e in rounds))  # type: ignore[misc]
    assert found["peak_rss"] == max(e["rss"] for e in events if "rss" in e)  # type: ignore[type-var]
    assert runlog.table([run, run]) == [found, found]


def test_summary_counts_a_round_that_stands_twice_once(tmp_path):
    run = fake_run(tmp_path, rounds=4, status="interrupted")
    before, events = runlog.summary(run), lines_of(run)
    write_lines(run, events + [e for e in events if e.get("round") == 4])
    assert runlog.summary(run) == before
    page = page_of(run)
    assert "fleetune tune --resume" in page.text
    assert len(page.table("round", "validation loss")) == 5


def test_summary_of_an_end_that_was_gone_beyond(tmp_path):
    run = fake_run(tmp_path, rounds=2)
    done = runlog.summary(run)
    more = {"event": "round", "round": 3, "clients": 24, "accepted": 24, "bytes_up": 5, "bytes_down": 7}
    write_lines(run, [*lines_of(run), more])
    after = runlog.summary(run)
    assert (after["rounds"], after["bytes"]) == (3, done["bytes"] + 12)


def altered(run: Path, place: Path, digest: str = "", **options: object) -> Path:
    """A copy of a run with other options; `digest` is stated of its validation rows."""
    shutil.copytree(run, place)
    for name, value in options.items():
        text = re.sub(rf"(?m)^{name} = .*\n", "", (place / "run.toml").read_text())
        (place / "run.toml").write_text(f"{name} = {json.dumps(value)}\n{text}")
    if digest:
        first, *lines = lines_of(place)
        write_lines(place, [first | {"held_out_digest": digest}, *lines])
    return place


NOT_ALIKE = {
    "another seed": ({"seed": 43}, "are measured on different rows (seed)"),
    "other data": ({"data": "other.jsonl"}, "have different data"),
    "rows of another column": ({"partition": "iid"}, "are measured on different rows (partition)"),
    "rows of their own": ({"eval_data": "v.jsonl"}, "are measured on different rows (eval_data)"),
    "another alpha": ({"partition": "dirichlet:9:category"}, ""),
    "other rounds": ({"rounds": 3}, ""),
}


@pytest.mark.parametrize("case", NOT_ALIKE)
def test_caveats_tell_losses_on_different_rows(case, run24, tmp_path):
    options, told = NOT_ALIKE[case]
    runs = [run24, altered(run24, tmp_path / "0008-fedit-other", **options)]
    assert runlog.caveats([runlog.read(run) for run in runs]) == [told] * bool(told)


def test_caveats_are_decided_by_the_digest_of_the_rows_where_runs_state_it(run24, tmp_path):
    def caveats(*runs: Path) -> list[str]:
        return runlog.caveats([runlog.read(run) for run in runs])

    one = altered(run24, tmp_path / "0001-a", "aa")
    assert caveats(one, altered(run24, tmp_path / "0002-a", "aa", limit=50)) == []
    changed = ["are measured on different rows (the data changed between them)"]
    assert caveats(one, altered(run24, tmp_path / "0003-a", "bb")) == changed
    given = [altered(run24, tmp_path / f"000{i}-b", eval_data="v.jsonl", seed=i, data=f"{i}") for i in (4, 5)]
    assert caveats(*given) == []


def test_changed_records_are_told_wherever_they_are_shown(run24, tmp_path, capsys):
    for name in ("0001-fedit-a", "0002-fedit-b"):
        shutil.copytree(run24, tmp_path / name)
    changed = tmp_path / "0002-fedit-b" / "metrics.jsonl"
    changed.unlink()
    writer = rundir.Metrics(changed.parent)
    for line in lines_of(run24):
        writer.record(line)
    writer.close()
    sums.write(changed.parent, [changed.name])
    told = "0002-fedit-b: metrics.jsonl was changed since the run ended"
    for spoilt in (False, True):
        if spoilt:
            changed.write_text(changed.read_text().replace('"round": 3', '"round": 4', 1))
        for words in ([], ["show", "2"], ["compare", "1", "2"]):
            assert main(["runs", *words, "--out", str(tmp_path)]) == 0
            assert (told in capsys.readouterr().err) is spoilt
    rows = ok(capsys, "runs", "--out", str(tmp_path))
    assert {r["name"]: r["intact"] for r in rows} == {"0001-fedit-a": True, "0002-fedit-b": False}
    assert told in (changed.parent / "report.html").read_text()
