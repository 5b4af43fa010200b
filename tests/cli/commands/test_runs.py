"""`models` with a cache, `runs`, and completion in the shell: what is here, and what can be typed."""

import json
import shutil
from pathlib import Path

import pytest

from command_line import call

pytestmark = pytest.mark.usefixtures("at", "own_cache")


def made(number: int, status: str, **options: object) -> Path:
    """A run folder as far as `runs` reads it."""
    folder = Path("runs") / f"{number:04d}-mezo-a-model-of-some-length"
    folder.mkdir(parents=True)
    rows = {"model": "m", "data": "d", "method": "mezo", "rounds": 1, **options}
    (folder / "run.toml").write_text(
        "".join(f"{k} = {json.dumps(v)}\n" for k, v in rows.items()) + "[set]\nlr = 0.5\n"
    )
    (folder / "status").write_text(status)
    events = [
        {"event": "eval", "round": 0, "loss": 4.4117742507},
        {"event": "round", "round": 1, "bytes_up": 4484562, "bytes_down": 0, "seconds": 61.0},
        {"event": "eval", "round": 1, "loss": 4.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"v": 1, **e}) + "\n" for e in events))
    return folder


WHY = "failed: every client failed, 1 round in a row; the first: 2752 values that are not finite; see log.txt"


def test_the_list_has_one_word_and_show_the_reason(capsys):
    made(1, "done")
    made(2, WHY)
    Path("runs/0002-mezo-a-model-of-some-length/report.html").write_text("<html></html>")
    code, out, _ = call(capsys, "runs")
    assert code == 0
    assert "2752" not in out
    assert next(line.split()[1] for line in out.splitlines() if "0002-mezo" in line) == "failed"
    assert "fleetune runs show runs/0002-mezo-a-model-of-some-length\n" in out
    assert "report    runs/0002-mezo-a-model-of-some-length/report.html" in out
    _, out, _ = call(capsys, "runs", "show", "2")
    assert "2752 values that are not finite" in out
    assert "4.412 -> 4.000 (-9.3 %)" in out
    assert "4.5 MB: 4.5 MB up, 0 B down" in out
    assert [line.split() for line in out.splitlines() if "settings" in line] == [["settings", "lr", "0.5"]]
    assert "4.4117" not in out


def test_compare_shows_the_options_that_differ(capsys):
    one = made(1, "done", seed=42)
    made(2, "done", seed=43)
    same = shutil.copytree(one, Path("more") / one.name)
    _, out, _ = call(capsys, "runs", "compare", "1", "2", str(same))
    assert all(str(folder) in out for folder in (one, same))
    _, out, err = call(capsys, "runs", "compare", "1", "2")
    (line,) = [line.split() for line in out.splitlines() if line.strip().startswith("seed")]
    assert line == ["seed", "42", "43"]
    assert "set.lr" not in out
    assert "5 options equal" in err
    assert "4.412 -> 4.000" in out
