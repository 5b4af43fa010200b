# SPDX-License-Identifier: Apache-2.0
"""The report: every number of a run folder on one page that needs nothing else, and no damage stops it."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleetune import report
from fleetune.cli.main import main
from fleetune.common import sums
from fleetune.common.display import human_bytes, human_time
from fleetune.errors import StorageError, UsageError
from fleetune.report import axes, svg
from fleetune.runs import metrics, rundir

CATEGORIES = (
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
)
PARAMS = 134_515_008


def fake_run(
    parent: Path,
    name: str = "0007-fedit-smollm2-135m",
    *,
    clients: int = 24,
    rounds: int = 10,
    asked: int = 24,
    up: int = 2_457_600,
    down: int = 2_458_112,
    status: str = "done",
    categories: Sequence[str] = CATEGORIES,
    seed: int = 3,
) -> Path:
    """A run folder as a real run leaves it, with drop-outs, late and refused replies."""
    r = random.Random(seed)
    run = parent / name
    (run / "adapter").mkdir(parents=True)
    method = name.split("-")[1]
    counts: dict[str, list[int]] = {}
    for category in categories:
        weights = [r.gammavariate(0.5, 1.0) for _ in range(clients)]
        counts[category] = [round(12 * w) for w in weights]
    rows = [max(1, sum(counts[c][i] for c in categories)) for i in range(clients)]
    counts[categories[0]] = [
        counts[categories[0]][i] + (rows[i] - sum(counts[c][i] for c in categories)) for i in range(clients)
    ]
    t, total, total_up, total_down, elapsed, peak = 1_760_000_000.0, 0, 0, 0, 0.0, 0
    events: list[dict[str, object]] = [
        {
            "event": "start",
            "method": method,
            "model": "smollm2-135m",
            "digest": "9f2c" * 16,
            "params": PARAMS,
            "trained": 4_884_480 if method == "fedit" else PARAMS,
            "clients": clients,
            "rounds": rounds,
            "rows_per_client": rows,
            "partition": "dirichlet:0.5:category",
            "column": "category",
            "counts": counts,
        },
        {"event": "eval", "round": 0, "loss": 2.3914, "rouge_l": 11.82},
    ]
    loss, rouge = 2.3914, 11.82
    for n in range(1, rounds + 1):
        accepted = sent = received = 0
        seconds = 0.0
        for client in sorted(r.sample(range(clients), asked)):
            luck = r.random()
            kind = "refused" if luck < 0.01 else "dropped" if luck < 0.04 else "late" if luck < 0.06 else "ok"
            reason = {
                "refused": "array 'lora_A.3' is not finite",
                "dropped": "client dropped out (simulated)",
                "late": "slower than 3 times a usual client",
                "ok": "",
            }[kind]
            took = r.uniform(2.2, 4.4)
            bytes_up = up if kind in ("ok", "refused") else 0
            rss = 1_180_000_000 + n * 3_000_000 + r.randrange(40_000_000)
            peak = max(peak, rss)
            events.append(
                {
                    "event": "client",
                    "round": n,
                    "client": client,
                    "n": rows[client],
                    "loss": round(loss + r.gauss(0.02, 0.19), 4) if kind == "ok" else None,
                    "bytes_up": bytes_up,
                    "bytes_down": down,
                    "seconds": round(took, 3),
                    "rss": rss,
                    "status": kind,
                    "reason": reason,
                }
            )
            accepted += kind == "ok"
            sent, received, seconds = sent + bytes_up, received + down, seconds + took
        total_up, total_down, elapsed = total_up + sent, total_down + received, elapsed + seconds
        total = total_up + total_down
        events.append(
            {
                "event": "round",
                "round": n,
                "clients": asked,
                "accepted": accepted,
                "bytes_up": sent,
                "bytes_down": received,
                "bytes_total": total,
                "seconds": round(seconds, 3),
                "rss": rss,
            }
        )
        loss = loss - (loss - 1.86) * 0.22 + r.gauss(0, 0.008)
        rouge = rouge + (24.9 - rouge) * 0.2
        events.append({"event": "eval", "round": n, "loss": round(loss, 4), "rouge_l": round(rouge, 2)})
    base, tuned = {"loss": 2.3914, "rouge_l": 11.82}, {"loss": round(loss, 4), "rouge_l": round(rouge, 2)}
    if status == "done":
        events.append(
            {
                "event": "done",
                "base": base,
                "tuned": tuned,
                "bytes_up": total_up,
                "bytes_down": total_down,
                "seconds": round(elapsed, 3),
                "wall": round(elapsed + 31.5, 3),
                "peak_rss": peak + 12_000_000,
                "rows": 240,
                "digest": "51ab" * 16,
            }
        )
        samples = [
            {"prompt": prompt, "reference": reference, "base": before, "tuned": after, "client": 5 + i}
            for i, (prompt, reference, before, after) in enumerate(SAMPLES)
        ]
        (run / "eval.json").write_text(
            json.dumps({"base": base, "tuned": tuned, "rows": 240, "samples": samples})
        )
    lines = [json.dumps({"v": 1, "t": t + i, **event}) for i, event in enumerate(events)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "status").write_text(status + "\n")
    (run / "run.toml").write_text(
        RECIPE.format(method=method, clients=clients, rounds=rounds, part=asked / clients)
    )
    env: dict[str, object] = {
        "fleetune": "0.1.0",
        "python": "3.11.7",
        "torch": "2.9.0",
        "transformers": "5.0.1",
        "numpy": "2.4.6",
    }
    env |= {"system": "Linux", "machine": "x86_64", "processors": 2, "digest": "9f2c" * 16}
    (run / "env.json").write_text(json.dumps(env))
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 2_460_000)
    return run


RECIPE = """# A Fleetune recipe. Run it again: fleetune tune -c run.toml

model = "smollm2-135m"  # hub id, HF directory, GGUF file, or a built-in name
data = "demo"
method = "{method}"
clients = {clients}
rounds = {rounds}
participation = {part}
partition = "dirichlet:0.5:category"
held_out = 0.1
eval_data = ""
limit = 0
max_length = 512
seed = 42
dtype = "fp32"
device = "cpu"
drop = 0.03
stragglers = 0.02
deadline = 3.0
quorum = 1
eval_every = 1

[set]  # the method's own settings
r = 8
alpha = 16
lr = 0.0003
targets = "all-linear"
exact = false
"""

SAMPLES = (
    (
        "The walk-in cooler reads 9 °C this morning. What should I do first?",
        "Note: 9 °C is above the safe limit.\nDo now: move milk, meat and fish to the spare cooler.\n"
        "Then: call the service line and write the time down.",
        "A walk-in cooler is a room that is used to store food at a low temperature. It is important to keep"
        " the temperature of the cooler at a constant level. The temperature of the cooler should be kept at"
        " a constant level. The temperature",
        "Note: 9 °C is too warm for fresh food.\nDo now: move the milk and meat to another cooler and close"
        " the door.\nThen: call service.",
    ),
    (
        "Sort these into tools and consumables: drill, sandpaper, chisel, glue.",
        "Tools: drill, chisel.\nConsumables: sandpaper, glue.",
        "Sure! Here are the tools and consumables:\n1. Drill\n2. Sandpaper\n3. Chisel\n4. Glue",
        "Tools: drill, chisel.\nConsumables: sandpaper, glue.",
    ),
    (
        "Write one line for the notice board: the north gate is closed on Monday.",
        "North gate closed on Monday. Please use the south gate.",
        "The north gate is closed on Monday. The north gate is closed on Monday. The north gate is closed.",
        "North gate closed Monday; please use the south gate.",
    ),
)

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Balance, ids, texts, attributes and tables of a page; fails on the first wrong closing tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] in {"td", "th"}:
            self.tables[-1][-1][-1] += data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]

    @property
    def text(self) -> str:
        return "".join(self.words)

    def table(self, *head: str) -> list[list[str]]:
        """The rows of the one table whose head begins with these names."""
        (found,) = [t for t in self.tables if tuple(t[0][: len(head)]) == head]
        return found[1:]


def page_of(run: Path) -> Page:
    path = report.write(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def lines_of(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def self_contained(page: Page, text: str) -> None:
    """Nothing in it is fetched and nothing runs."""
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    names = {name for _, name, _ in page.attributes}
    assert all(re.match(r"data:(image/svg\+xml|text/csv);base64,", url) for url in page.values("href"))
    assert page.tags.count("a") == len(page.values("download")) == len(page.values("href"))
    assert not {"src", "xlink:href", "srcset", "action", "style"} & names
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    assert "default-src 'none'" in text


@pytest.fixture(scope="module")
def run24(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run200(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("runs")
    name = "0008-fedkseed-smollm2-135m"
    return fake_run(parent, name, clients=200, rounds=2, asked=10, up=260, down=4170, seed=5)


def test_the_page_is_whole_and_needs_nothing_else(run24: Path, run200: Path) -> None:
    for run in (run24, run200):
        page = page_of(run)
        self_contained(page, (run / "report.html").read_text())
        ids = page.values("id")
        assert len(ids) == len(set(ids))
        assert (run / "report.html").stat().st_size < 300_000
        for title in ("Result", "Training", "Fleet", "Samples", "Configuration", "Versions", "Run it again"):
            assert title in page.words


def test_every_drawing_can_be_read_without_seeing_it(run24: Path, run200: Path) -> None:
    for run in (run24, run200):
        text = report.write(run).read_text()
        drawings = re.findall(r"<svg .*?</svg>", text, re.S)
        assert len(drawings) >= 5
        for drawing in drawings:
            title, desc = re.search(r'aria-labelledby="(\S+) (\S+)"', drawing).groups()  # type: ignore[union-attr]
            assert re.search(rf'<title id="{title}">[^<]{{8,}}</title>', drawing)
            assert re.search(rf'<desc id="{desc}">[^<]{{8,}}</desc>', drawing)
            assert 'role="img"' in drawing
            assert "nan" not in drawing
            assert "inf" not in drawing.replace("information", "")


def test_the_numbers_are_those_of_the_metrics(run24: Path) -> None:
    page, events = page_of(run24), lines_of(run24)
    done = next(e for e in events if e["event"] == "done")
    rounds = {e["round"]: e for e in events if e["event"] == "round"}
    evals = {e["round"]: e for e in events if e["event"] == "eval"}
    rows = page.table("round", "validation loss", "Rouge-L")
    assert [row[0] for row in rows] == [str(n) for n in range(11)]
    for row in rows:
        number = int(row[0])
        assert row[1] == f"{evals[number]['loss']:.3f}"
        assert row[2] == f"{evals[number]['rouge_l']:.1f}"
        if number == 0:
            assert row[3:6] == ["-", "-", "-"]
            continue
        event = rounds[number]
        assert row[3] == f"{event['accepted']} of {event['clients']}"
        assert row[4:7] == [human_bytes(event[k]) for k in ("bytes_up", "bytes_down", "bytes_total")]  # type: ignore[arg-type]
        assert row[7] == human_time(event["seconds"])  # type: ignore[arg-type]
        assert row[8] == human_bytes(event["rss"])  # type: ignore[arg-type]
    loss, rouge = page.table("", "base", "tuned", "change")
    base, tuned = done["base"], done["tuned"]
    assert isinstance(base, dict)
    assert isinstance(tuned, dict)
    fell = 100 * (tuned["loss"] - base["loss"]) / base["loss"]
    assert loss == [
        "validation loss",
        f"{base['loss']:.3f}",
        f"{tuned['loss']:.3f}",
        f"−{-fell:.1f} %, better",
    ]
    assert rouge[1:] == [
        f"{base['rouge_l']:.1f}",
        f"{tuned['rouge_l']:.1f}",
        f"+{tuned['rouge_l'] - 11.82:.1f}, better",
    ]
    took = {row[0]: row[1] for t in page.tables for row in t if len(row) == 2}
    assert took["bytes over the fleet"] == human_bytes(done["bytes_up"] + done["bytes_down"])  # type: ignore[operator]
    assert took["wall time"] == human_time(done["wall"])  # type: ignore[arg-type]
    assert took["peak memory"] == human_bytes(done["peak_rss"])  # type: ignore[arg-type]
    assert took["sent by a client, per round"] == "2.5 MB"
    assert took["replies accepted"] == f"{sum(e['accepted'] for e in rounds.values())} of 240"  # type: ignore[misc]


def test_the_spread_and_the_partition_are_those_of_the_metrics(run24: Path) -> None:
    page, events = page_of(run24), lines_of(run24)
    losses: dict[object, list[float]] = {}
    for e in events:
        if e["event"] == "client" and e["loss"] is not None:
            losses.setdefault(e["round"], []).append(e["loss"])  # type: ignore[arg-type]
    rows = page.table("round", "clients", "lowest")
    assert len(rows) == 10
    for row in rows:
        values = sorted(losses[int(row[0])])
        middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        assert row[1] == str(len(values))
        assert (row[2], row[4], row[6]) == (f"{values[0]:.3f}", f"{middle:.3f}", f"{values[-1]:.3f}")
    start = events[0]
    assert isinstance(start["counts"], dict)
    table = next(t for t in page.tables if t[0][0] == "client")
    assert set(table[0][1:-1]) == set(CATEGORIES)
    for i, row in enumerate(table[1:]):
        assert row[1:-1] == [str(start["counts"][name][i]) for name in table[0][1:-1]]
        assert row[-1] == str(start["rows_per_client"][i])  # type: ignore[index]
    text = (run24 / "report.html").read_text()
    assert text.count('class="dot ') == sum(map(len, losses.values()))
    assert text.count('class="mark c0"') == 22


def test_replies_that_did_not_count_are_listed_with_their_reasons(run24: Path) -> None:
    page = page_of(run24)
    lost = [e for e in lines_of(run24) if e["event"] == "client" and e["status"] != "ok"]
    rows = page.table("what", "why", "times")
    assert len(lost) > 5
    assert sum(int(row[2]) for row in rows) == len(lost)
    for what, why, times, clients, rounds in rows:
        same = [e for e in lost if e["status"] == what and e["reason"] == why]
        assert int(times) == len(same)
        assert clients == ", ".join(map(str, sorted({int(str(e["client"])) for e in same})))
        assert rounds == ", ".join(map(str, sorted({int(str(e["round"])) for e in same})))
    assert f"{len(lost)} of 240 replies did not count." in page.text


def test_the_head_says_what_was_run(run24: Path) -> None:
    text = page_of(run24).text
    for part in (
        "smollm2-135m @ 9f2c9f2c9f2c · 135 M params · fp32",
        "fedit · r 8 · alpha 16 · lr 0.0003 · targets all-linear · exact false · trains 4.88 M",
        "demo · 24 clients · Dirichlet α 0.5 over category",
        "rounds10 · 24 clients in each",
        "2025-10-09 08:53 UTC",
        "fleetune tune -c ",
        "/0007-fedit-smollm2-135m/run.toml",
        "adapter/adapter_model.safetensors 2.5 MB",
        "digest (SHA-256 of the tuned tensors) " + "51ab" * 16,
    ):
        assert part in text, part
    assert str(run24.parent.parent) not in (run24 / "report.html").read_text()


def test_a_run_that_has_just_begun_shows_what_there_is(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rounds=1, clients=2, asked=1, status="running")
    events = [e for e in lines_of(run) if e["event"] != "round" and (e["event"] != "eval" or e["round"] == 0)]
    events[0] |= {"model": "/home/someone/models/small-hf", "rows_per_client": [5, 5]}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)))
    page = page_of(run)
    assert "0 rounds so far; no loss to compare yet." in page.text
    assert "fedit on small-hf" in page.text
    assert "5 rows each" in page.text
    assert "median 5" not in page.text
    text = (run / "report.html").read_text()
    assert "Validation loss by round" not in text  # one value is not a course
    assert "Training loss of the client" in text
    assert text.count('class="mark c0"') == 1


def test_configuration_and_versions_are_complete(run24: Path) -> None:
    text = report.write(run24).read_text()
    pairs = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", text))
    assert (pairs["max_length"], pairs["set.r"], pairs["set.exact"]) == ("512", "8", "false")
    assert (pairs["set.targets"], pairs["participation"], pairs["held_out"]) == ("all-linear", "1", "0.1")
    assert (pairs["torch"], pairs["python"], pairs["processors"]) == ("2.9.0", "3.11.7", "2")


def test_large_fleets_are_a_heat_map(run24: Path, run200: Path) -> None:
    small, large = report.write(run24).read_text(), report.write(run200).read_text()
    assert "sorted by their main category" not in small
    assert "200 clients, sorted by their main category" in large
    assert len(re.findall(r"<title>client \d+: \d+ rows: ", large)) == 200
    assert "0 clients" not in small


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\"'&\x00\x1b[31m\ud800</title></svg></style>"
    run = fake_run(tmp_path, clients=3, rounds=2, asked=3, categories=(bad, "b"), status="done")
    events = lines_of(run)
    for event in events:
        if event["event"] == "start":
            event |= {"model": bad, "method": bad, "digest": bad, "partition": bad, "column": bad}
        if event["event"] == "client":
            event |= {"status": "refused", "reason": bad, "client": bad}
        if event["event"] == "eval":
            event |= {bad: 1.5}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)))
    sample = dict.fromkeys(("prompt", "reference", "base", "tuned", "client"), bad)
    (run / "eval.json").write_text(json.dumps({"base": {bad: 1.0}, "tuned": {bad: 2.0}, "samples": [sample]}))
    (run / "env.json").write_text(json.dumps({bad: bad}))
    (run / "status").write_text(f"failed: {'<b>'} {bad[:8]}")
    page, text = page_of(run), (run / "report.html").read_text()
    self_contained(page, text)
    assert text.count("<script") == 0
    assert text.count("</svg>") == text.count("<svg ")
    assert text.count("</style>") == 1
    assert "\x00" not in text
    assert "\x1b" not in text
    assert page.text.count("<script>alert(1)</script>") >= 10


def test_a_torn_last_line_is_left_out(run24: Path, tmp_path: Path) -> None:
    torn = tmp_path / "0007-fedit-smollm2-135m"
    torn.mkdir()
    data = (run24 / "metrics.jsonl").read_bytes()
    lines = data.splitlines(keepends=True)
    before = b"".join(lines[:60])
    (torn / "metrics.jsonl").write_bytes(before)
    whole = report.summary(torn)
    (torn / "metrics.jsonl").write_bytes(before + lines[60][: len(lines[60]) // 2])
    assert report.summary(torn) == whole
    assert whole["rounds"] == 2
    assert "1 damaged line of" in page_of(torn).text
    (torn / "metrics.jsonl").write_bytes(before + b'{"event": "\xff\xfe')
    assert report.summary(torn) == whole


@pytest.mark.parametrize(
    "missing", ["run.toml", "env.json", "metrics.jsonl", "eval.json", "status", "adapter"]
)
def test_a_missing_file_is_an_empty_part(tmp_path: Path, missing: str) -> None:
    run = fake_run(tmp_path, rounds=2)
    path = run / missing
    path.rename(tmp_path / "gone")
    page = page_of(run)
    self_contained(page, (run / "report.html").read_text())
    assert report.summary(run)["base_loss"] == 2.3914
    if missing != "metrics.jsonl":
        assert report.summary(run)["method"] == "fedit"


def test_an_empty_folder_has_a_report_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "Nothing has been measured yet." in page.text
    assert report.summary(tmp_path)["status"] == "unknown"
    with pytest.raises(UsageError, match="no run folder at"):
        report.write(tmp_path / "none")


RUBBISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    *("round", "loss", "client", "clients", "accepted", "bytes_up", "bytes_down", "bytes_total", "seconds"),
    *("rss", "status", "reason", "t", "method", "model", "params", "rows_per_client", "counts", "partition"),
    *("base", "tuned", "peak_rss", "rounds", "digest", "column"),
)


@example([{"event": "round", "round": 0, "loss": 0, "bytes_up": 7.550206357119099e-233}], {})
@example([{"event": "round", "round": 0, "bytes_up": 1e-10, "seconds": -9.9e17}], {})
@given(
    st.lists(
        st.builds(
            lambda event, rest: {"event": event, **rest},
            st.sampled_from(("start", "eval", "client", "round", "done", "else")),
            st.dictionaries(st.sampled_from(KEYS), RUBBISH | st.integers(-1, 3), max_size=12),
        ),
        max_size=8,
    ),
    st.dictionaries(st.sampled_from(("base", "tuned", "rows", "samples")), RUBBISH, max_size=4),
)
def test_no_record_however_wrong_stops_the_report(
    tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, object]], final: dict[str, object]
) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)))
    (run / "eval.json").write_text(json.dumps(final))
    page = page_of(run)
    self_contained(page, (run / "report.html").read_text())
    report.summary(run)


def test_values_that_are_not_finite_are_not_drawn(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rounds=3)
    text = (run / "metrics.jsonl").read_text()
    lines = text.splitlines()
    spoilt = [
        re.sub(r'"loss": [\d.]+', '"loss": NaN', line) if '"round": 2' in line else line for line in lines
    ]
    (run / "metrics.jsonl").write_text("\n".join(spoilt))
    page = page_of(run)
    rows = page.table("round", "validation loss")
    assert [row[1] for row in rows][2] == "-"
    assert not re.search(r"\bnan\b", (run / "report.html").read_text())


def test_a_round_that_stands_twice_counts_once(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rounds=4, status="interrupted")
    before = report.summary(run)
    events = lines_of(run)
    again = [e for e in events if e.get("round") == 4]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(e) for e in events + again))
    assert report.summary(run) == before
    page = page_of(run)
    assert "fleetune tune --resume" in page.text
    assert len(page.table("round", "validation loss")) == 5


def test_a_methods_own_figures_stand_beside_the_losses(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rounds=3)
    events = lines_of(run)
    own = {1: {"layers": 30.0}, 2: {"layers": 12.0, "personal_loss": 1.23456, "odd": "text"}, 3: "no table"}
    for event in events:
        if event["event"] == "round":
            event["report"] = own[int(str(event["round"]))]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(e) for e in events))
    rows = page_of(run).table("round", "validation loss", "Rouge-L", "layers", "personal loss", "replies")
    assert [row[3:5] for row in rows] == [["-", "-"], ["30", "-"], ["12", "1.235"], ["-", "-"]]


def test_an_end_that_was_gone_beyond_is_no_end(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rounds=2)
    done = report.summary(run)
    more = {
        "event": "round",
        "round": 3,
        "clients": 24,
        "accepted": 24,
        "bytes_up": 5,
        "bytes_down": 7,
        "seconds": 1.5,
    }
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(more) + "\n")
    after = report.summary(run)
    assert after["rounds"] == 3
    assert after["bytes"] == done["bytes"] + 12  # type: ignore[operator]


def test_the_summary_of_a_run(run24: Path) -> None:
    done = lines_of(run24)[-1]
    assert done["event"] == "done"
    assert report.summary(run24) == {
        "name": "0007-fedit-smollm2-135m",
        "path": str(run24),
        "method": "fedit",
        "model": "smollm2-135m",
        "status": "done",
        "rounds": 10,
        "rounds_planned": 10,
        "clients": 24,
        "base_loss": 2.3914,
        "tuned_loss": done["tuned"]["loss"],
        "change_error": None,
        "bytes_up": done["bytes_up"],
        "bytes_down": done["bytes_down"],  # type: ignore[index]
        "bytes": done["bytes_up"] + done["bytes_down"],
        "seconds": done["wall"],  # type: ignore[operator]
        "peak_rss": done["peak_rss"],
        "intact": True,
    }


def test_the_summary_before_the_end_is_reckoned_from_the_rounds(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rounds=3, status="running")
    events = lines_of(run)
    rounds = [e for e in events if e["event"] == "round"]
    assert report.summary(run)["status"] == "interrupted"  # nobody has the folder: it was killed
    with rundir.locked(run):
        found = report.summary(run)
    assert found["status"] == "running"
    found["status"] = "interrupted"
    assert found["bytes"] == rounds[-1]["bytes_total"]
    assert found["tuned_loss"] == events[-1]["loss"]
    assert found["seconds"] == pytest.approx(sum(e["seconds"] for e in rounds))  # type: ignore[misc]
    assert found["peak_rss"] == max(e["rss"] for e in events if "rss" in e)  # type: ignore[type-var]
    assert report.table([run, run]) == [found, found]


def test_the_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_run(tmp_path, rounds=2)
    report.write(run)
    old = (run / "report.html").read_bytes()
    assert stat.S_IMODE((run / "report.html").stat().st_mode) == 0o600  # it has held-out prompts

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(StorageError, match="disk is full"):
            report.write(run)
    assert (run / "report.html").read_bytes() == old
    assert not [p for p in run.iterdir() if p.name.endswith(".tmp")]


def altered(run: Path, place: Path, digest: str = "", **options: object) -> Path:
    """A copy of a run with other options; `digest` is stated of its validation rows."""
    shutil.copytree(run, place)
    for name, value in options.items():
        text = re.sub(rf"(?m)^{name} = .*\n", "", (place / "run.toml").read_text())
        (place / "run.toml").write_text(f"{name} = {json.dumps(value)}\n{text}")
    if digest:
        lines = lines_of(place)
        start = next(line for line in lines if line["event"] == "start")
        start["held_out_digest"] = digest
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


NOT_ALIKE = {
    "another seed": ({"seed": 43}, "are measured on different rows (seed)"),
    "another length": ({"max_length": 48}, "are measured on different rows (max_length)"),
    "other data": ({"data": "other.jsonl"}, "have different data"),
    "rows of another column": ({"partition": "iid"}, "are measured on different rows (partition)"),
    "rows of their own": ({"eval_data": "v.jsonl"}, "are measured on different rows (eval_data)"),
    "another alpha": ({"partition": "dirichlet:9:category"}, ""),
    "other rounds": ({"rounds": 3}, ""),
}


@pytest.mark.parametrize("case", NOT_ALIKE)
def test_losses_on_different_rows_are_told(case: str, run24: Path, tmp_path: Path) -> None:
    options, told = NOT_ALIKE[case]
    runs = [run24, altered(run24, tmp_path / "0008-fedit-other", **options)]
    assert report.caveats([report.read(run) for run in runs]) == [told] * bool(told)


def test_the_digest_of_the_rows_decides_where_runs_state_it(run24: Path, tmp_path: Path) -> None:
    def caveats(*runs: Path) -> list[str]:
        return report.caveats([report.read(run) for run in runs])

    one = altered(run24, tmp_path / "0001-a", "aa")
    assert caveats(one, altered(run24, tmp_path / "0002-a", "aa", limit=50)) == []
    changed = ["are measured on different rows (the data changed between them)"]
    assert caveats(one, altered(run24, tmp_path / "0003-a", "bb")) == changed
    given = [altered(run24, tmp_path / f"000{i}-b", eval_data="v.jsonl", seed=i, data=f"{i}") for i in (4, 5)]
    assert caveats(*given) == []


def test_a_record_that_was_changed_is_told_wherever_it_is_shown(
    run24: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0001-fedit-a", "0002-fedit-b"):
        shutil.copytree(run24, tmp_path / name)
    changed = tmp_path / "0002-fedit-b" / "metrics.jsonl"
    *lines, last = lines_of(run24)
    changed.unlink()
    writer = metrics.Metrics(changed.parent)
    for line in lines:
        writer.record(line)
    writer.record(last)
    writer.close()
    sums.write(changed.parent, [changed.name])
    told = "0002-fedit-b: metrics.jsonl was changed since the run ended"
    for words in ([], ["show", "2"], ["compare", "1", "2"]):
        assert main(["runs", *words, "--out", str(tmp_path)]) == 0
        assert told not in "".join(capsys.readouterr())
    changed.write_text(changed.read_text().replace('"round": 3', '"round": 4', 1))
    for words in ([], ["show", "2"], ["compare", "1", "2"]):
        assert main(["runs", *words, "--out", str(tmp_path)]) == 0
        assert told in capsys.readouterr().err
        assert main(["runs", *words, "--out", str(tmp_path), "--json"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [r["intact"] for r in rows if r["name"] == "0002-fedit-b"] == [False]
        assert all(r["intact"] for r in rows if r["name"] == "0001-fedit-a")
    assert told in (changed.parent / "report.html").read_text()


# Axes


@example([1.0, 8.216234970987793e-205], 2)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20), st.integers(2, 10))
def test_axes_hold_their_values_between_few_round_ticks(values: list[float], count: int) -> None:
    axis = axes.numbers(values, "x", count=count)
    assert -1e-6 <= axis.at(min(values)) <= axis.at(max(values)) <= 1 + 1e-6
    places = [value for value, _ in axis.ticks]
    assert places == sorted(places)
    assert 2 <= len(places) <= count + 3
    steps = {round((b - a) / (places[1] - places[0]), 6) for a, b in itertools.pairwise(places)}
    assert steps == {1.0}


@given(st.floats(1e-6, 1e9), st.integers(1, 12))
def test_steps_are_one_two_or_five(span: float, count: int) -> None:
    step = axes.nice_step(span, count)
    first = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(first - digit) for digit in (1, 2, 5)) < 1e-6
    assert span / step <= count * (1 + 1e-6)
    assert span / step >= count / 2.6


def test_ticks_carry_units() -> None:
    assert [t for _, t in axes.sizes([1.2e6], "x").ticks] == ["0", "0.5 MB", "1 MB", "1.5 MB"]
    assert [t for _, t in axes.sizes([3], "x").ticks] == ["0", "1 B", "2 B", "3 B"]
    assert [t for _, t in axes.log_sizes([1e3, 1e9], "x").ticks] == [
        "1 kB",
        "10 kB",
        "100 kB",
        "1 MB",
        "10 MB",
        "100 MB",
        "1 GB",
    ]
    assert [t for _, t in axes.log_sizes([100, 900], "x").ticks] == ["100 B", "200 B", "500 B", "1 kB"]
    assert [t for _, t in axes.integers([0, 3], "x").ticks] == ["0", "1", "2", "3"]
    assert next(t for _, t in axes.numbers([2.386, 2.391], "x").ticks) == "2.386"
    assert [t for _, t in axes.counts([1], "x").ticks] == ["0", "1"]


@given(st.lists(st.floats(0, 300), max_size=12))
def test_labels_are_pushed_apart(ys: list[float]) -> None:
    ordered = sorted(ys)
    moved = svg.spread(ordered, 14.0, 20.0, 260.0)
    assert moved == sorted(moved)
    assert all(b - a >= 14.0 - 1e-9 for a, b in itertools.pairwise(moved))
    assert all(y <= 260.0 + 1e-9 for y in moved)
    alone = [y for y in ordered if 20 <= y <= 260]
    if len(ordered) == len(alone) == 1:
        assert moved == ordered


def test_tick_labels_do_not_overlap() -> None:
    x, y = axes.integers([0, 5000], "round", count=60), axes.numbers([1, 2], "loss")
    text = svg.Plot("a", "title", "description", x, y).svg()
    spans = [
        (float(x) - svg.CHAR * len(t) / 2, float(x) + svg.CHAR * len(t) / 2)
        for x, t in re.findall(r'<text x="([\d.]+)" y="257" text-anchor="middle">(\d+)</text>', text)
    ]
    assert len(spans) > 5
    assert all(b[0] - a[1] > 0 for a, b in itertools.pairwise(spans))


def test_a_line_is_broken_where_a_value_is_missing() -> None:
    x, y = axes.integers([0, 4], "round"), axes.numbers([1, 2], "loss")
    plot = svg.Plot("a", "title", "description", x, y)
    plot.line([(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.5), (4, 1.0)], 0, ["t"] * 5)
    path = re.search(r'class="line c0" d="([^"]*)"', plot.svg())
    assert path is not None
    assert re.sub(r"[\d. ]", "", path[1]) == "MLML"
    assert plot.svg().count('<circle class="mark') == 4


def test_points_are_where_their_values_are() -> None:
    x, y = axes.integers([0, 10], "round"), axes.numbers([0.0, 1.0], "loss", zero=True)
    plot = svg.Plot("a", "title", "description", x, y)
    assert plot.px(0) == pytest.approx(plot.left)
    assert plot.px(10) == pytest.approx(plot.width - plot.right)
    assert plot.px(5) == pytest.approx((plot.left + plot.width - plot.right) / 2)
    assert (plot.py(1.0), plot.py(0.0)) == pytest.approx((26.0, plot.height - 40.0))
    log = axes.log_sizes([1e3, 1e6], "bytes")
    assert log.at(1e4) - log.at(1e3) == pytest.approx(log.at(1e6) - log.at(1e5))


def test_it_needs_no_torch() -> None:
    check = "import sys, fleetune.report; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, timeout=60)
