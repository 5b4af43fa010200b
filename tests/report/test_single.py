"""The page of a run: one file that needs nothing else, shows no folder of this machine, and that no damage stops."""

import json
import os
import re
import stat
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from report_harness import CATEGORIES, fake_run, lines_of, page_of, restated, self_contained, write_lines

from fleetune.common.display import human_bytes, human_time
from fleetune.errors import StorageError, UsageError
from fleetune.report import page as parts
from fleetune.report import runlog, single, svg


def pairs_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", text))


def test_page_is_whole_and_needs_nothing_else(run24):
    page, text = page_of(run24), (run24 / "report.html").read_text()
    self_contained(page, text)
    assert len(page.values("id")) == len(set(page.values("id")))
    assert (run24 / "report.html").stat().st_size < 300_000
    for title in ("Result", "Training", "Fleet", "Samples", "Configuration", "Versions", "Run it again"):
        assert title in page.words
    drawings = re.findall(r"<svg .*?</svg>", text, re.S)
    assert len(drawings) == 2
    for drawing in drawings:  # each can be read without seeing it, and on a telephone
        title, desc = re.search(r'aria-labelledby="(\S+) (\S+)"', drawing).groups()  # type: ignore[union-attr]
        assert re.search(rf'<title id="{title}">[^<]{{8,}}</title>', drawing)
        assert re.search(rf'<desc id="{desc}">[^<]{{8,}}</desc>', drawing)
        assert f'viewBox="0 0 {svg.WIDTH:.0f} ' in drawing
        assert 'role="img"' in drawing
        assert "nan" not in drawing


def test_result_is_that_of_the_metrics(run24):
    events = lines_of(run24)
    done = events[-1]
    base, tuned = done["base"], done["tuned"]
    loss, rouge = page_of(run24).table("", "base", "tuned", "change")
    fell = 100 * (tuned["loss"] - base["loss"]) / base["loss"]
    figures = [f"{base['loss']:.3f}", f"{tuned['loss']:.3f}", f"−{-fell:.1f} %, better"]
    assert loss == ["validation loss", *figures]
    assert rouge[1:] == ["11.8", f"{tuned['rouge_l']:.1f}", f"+{tuned['rouge_l'] - 11.82:.1f}, better"]
    took = pairs_of((run24 / "report.html").read_text())
    assert "held-out rows; loss in nats per token" in page_of(run24).text
    assert took["bytes over the fleet"] == human_bytes(done["bytes_up"] + done["bytes_down"])  # type: ignore[operator]
    assert took["wall time"] == human_time(done["wall"])  # type: ignore[arg-type]
    assert took["peak memory"] == human_bytes(done["peak_rss"])  # type: ignore[arg-type]
    assert took["sent by a client, per round"] == "2.5 MB"
    accepted = sum(int(str(e["accepted"])) for e in events if e["event"] == "round")
    assert took["replies accepted"] == f"{accepted} of 240"


def test_page_shows_no_folder_of_this_machine(tmp_path):
    run = restated(fake_run(tmp_path, rounds=1), model="/home/someone/models/small-hf/")
    recipe = (run / "run.toml").read_text().replace('"smollm2-135m"', '"/home/someone/models/small-hf/"')
    (run / "run.toml").write_text(recipe.replace('"demo"', '"/srv/secret/rows.jsonl"'))
    text = single.write(run).read_text()
    assert not [part for part in ("/home/someone", "/srv", str(tmp_path.parent)) if part in text]
    assert (pairs_of(text)["model"], pairs_of(text)["data"]) == ("small-hf", "rows.jsonl")
    names = {"/a/b/model": "model", r"C:\data\rows.jsonl": "rows.jsonl", "org/name": "org/name", "/": "/"}
    assert {name: parts.short_name(name) for name in names} == names
    assert parts.short_name("") == ""


def test_page_with_samples_says_so_before_it_is_shared(tmp_path):
    run = fake_run(tmp_path, rounds=1)
    assert "This page shows the text of 3 held-out rows of the clients" in page_of(run).text
    final = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(final | {"samples": []}))
    assert "This page shows" not in page_of(run).text


def test_markdown_of_samples_is_shown_and_tags_stay_balanced(tmp_path):
    run = fake_run(tmp_path, rounds=1)
    text = "# Do `a` **now**\n- 2 ** 3, `x ** y` and **`b`\n** open ** <b>**c**</b>"
    (run / "eval.json").write_text(json.dumps({"samples": [{"prompt": text, "tuned": text}]}))
    shown = "<strong>Do <code>a</code> <strong>now</strong></strong>\n- 2 ** 3, <code>x ** y</code> and **<code>b</code>\n"
    page_of(run)
    html = (run / "report.html").read_text()
    assert html.count(shown) == 2
    assert "** open ** &lt;b&gt;<strong>c</strong>&lt;/b&gt;" in html


def test_what_few_look_for_is_folded(tmp_path):
    run = restated(fake_run(tmp_path, rounds=2), changed=["model"])
    page_of(run)
    folded = re.findall(r"<details><summary>([^<]*)<", (run / "report.html").read_text())
    assert [folded[i] for i in (0, -1)] == ["Every round in numbers", "versions, machine and digests"]
    assert folded[-2].endswith(" left at the default")


def test_hostile_text_stays_text(tmp_path):
    bad = "<script>alert(1)</script>\"'&\x00\x1b[31m\ud800</title></svg></style>"
    run = fake_run(tmp_path, clients=3, rounds=2, asked=3, categories=(bad, "b"))
    restated(run, model=bad, method=bad, digest=bad, partition=bad, column=bad)
    restated(restated(run, "client", status="refused", reason=bad, client=bad), "eval", **{bad: 1.5})
    sample = dict.fromkeys(("prompt", "reference", "base", "tuned", "client"), bad)
    (run / "eval.json").write_text(json.dumps({"base": {bad: 1.0}, "tuned": {bad: 2.0}, "samples": [sample]}))
    (run / "env.json").write_text(json.dumps({bad: bad}))
    (run / "status").write_text(f"failed: {'<b>'} {bad[:8]}")
    page, text = page_of(run), (run / "report.html").read_text()
    self_contained(page, text)
    assert text.count("<script") == 0
    assert text.count("</svg>") == text.count("<svg ")
    assert text.count("</style>") == 1
    assert not {"\x00", "\x1b"} & set(text)
    assert page.text.count("<script>alert(1)</script>") >= 10


@pytest.mark.parametrize(
    "missing", ["run.toml", "env.json", "metrics.jsonl", "eval.json", "status", "adapter"]
)
def test_missing_file_is_an_empty_part(tmp_path, missing):
    run = fake_run(tmp_path, rounds=2)
    (run / missing).rename(tmp_path / "gone")
    self_contained(page_of(run), (run / "report.html").read_text())
    assert runlog.summary(run)["base_loss"] == 2.3914


def test_empty_folder_has_a_page_and_a_missing_one_is_an_error(tmp_path):
    assert "Nothing has been measured yet." in page_of(tmp_path).text
    assert runlog.summary(tmp_path)["status"] == "unknown"
    with pytest.raises(UsageError, match="no run folder at"):
        single.write(tmp_path / "none")


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


@settings(max_examples=40)
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
    st.dictionaries(st.sampled_from(("base", "tuned", "rows", "samples", "per_client")), RUBBISH, max_size=4),
)
def test_no_record_however_wrong_stops_the_page(tmp_path_factory, events, final):
    run = tmp_path_factory.mktemp("run")
    write_lines(run, events)
    (run / "eval.json").write_text(json.dumps(final))
    self_contained(page_of(run), (run / "report.html").read_text())
    runlog.summary(run)


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = fake_run(tmp_path, rounds=2)
    old = single.write(run).read_bytes()
    assert stat.S_IMODE((run / "report.html").stat().st_mode) == 0o600  # it has held-out prompts

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(StorageError, match="disk is full"):
            single.write(run)
    assert (run / "report.html").read_bytes() == old
    assert not [p for p in run.iterdir() if p.name.endswith(".tmp")]


def drawing(text: str, ident: str) -> str:
    (found,) = [d for d in re.findall(r"<svg .*?</svg>", text, re.S) if f'"{ident}-t ' in d]
    return found


def test_rounds_are_those_of_the_metrics(run24):
    events = lines_of(run24)
    rounds = {e["round"]: e for e in events if e["event"] == "round"}
    evals = {e["round"]: e for e in events if e["event"] == "eval"}
    rows = page_of(run24).table("round", "validation loss", "Rouge-L")
    assert [row[0] for row in rows] == [str(n) for n in range(11)]
    for row in rows:
        number = int(row[0])
        assert row[1:3] == [f"{evals[number]['loss']:.3f}", f"{evals[number]['rouge_l']:.1f}"]
        if number == 0:
            assert row[3:6] == ["-", "-", "-"]
            continue
        event = rounds[number]
        assert row[3] == f"{event['accepted']} of {event['clients']}"
        assert row[4:7] == [human_bytes(event[k]) for k in ("bytes_up", "bytes_down", "bytes_total")]  # type: ignore[arg-type]
        assert row[7:] == [human_time(event["seconds"]), human_bytes(event["rss"])]  # type: ignore[arg-type]


def test_partition_is_that_of_the_metrics(run24):
    page, events = page_of(run24), lines_of(run24)
    start = events[0]
    table = next(t for t in page.tables if t[0][0] == "client")
    assert set(table[0][1:-1]) == set(CATEGORIES)
    for i, row in enumerate(table[1:]):
        assert row[1:-1] == [str(start["counts"][name][i]) for name in table[0][1:-1]]
        assert row[-1] == str(start["rows_per_client"][i])  # type: ignore[index]
    assert (run24 / "report.html").read_text().count('class="mark c0"') == 11


def test_partition_of_many_clients_draws_the_largest_and_groups_small_categories(tmp_path):
    run = fake_run(tmp_path, clients=200, rounds=1, asked=2, categories=[f"kind {i:02d}" for i in range(12)])
    text = single.write(run).read_text()
    assert "The 64 largest are drawn." in text
    assert len(re.findall(r"<title>client \d+: \d+ rows: ", drawing(text, "partition"))) == 64
    sizes = lines_of(run)[0]["rows_per_client"]
    table = next(t for t in page_of(run).tables if t[0][0] == "client")
    assert (len(table), len(table[0]), table[0][-2]) == (201, 10, "5 others")
    assert [row[-1] for row in table[1:]] == [str(size) for size in sizes]  # type: ignore[attr-defined]


def test_replies_that_did_not_count_are_listed_with_their_reasons(run24):
    lost = [e for e in lines_of(run24) if e["event"] == "client" and e["status"] != "ok"]
    rows = page_of(run24).table("reply", "why", "times")
    assert len(lost) > 5
    assert sum(int(row[2]) for row in rows) == len(lost)
    for what, why, times, clients, rounds in rows:
        same = [e for e in lost if e["status"] == what and e["reason"] == why]
        assert int(times) == len(same)
        for column, key in ((clients, "client"), (rounds, "round")):
            names = sorted({int(str(e[key])) for e in same})
            assert column.split(" and ")[0] == ", ".join(map(str, names[:12]))
    assert f"{len(lost)} of 240 replies did not count" in page_of(run24).text


def test_client_name_is_that_of_the_data(tmp_path):
    run = fake_run(tmp_path, clients=3, rounds=2, asked=3)
    names = ["bakery-lyon", "ferry & co", "a-name-much-longer-than-what-fits"]
    text = single.write(restated(run, names=names, partition="column:client")).read_text()
    bars = drawing(text, "partition")
    for part in (">bakery-lyon</", ">ferry &amp; co</", ">a-name-much-longer-th…</", f"client {names[2]}: "):
        assert part in bars
    assert "one per &#x27;client&#x27;" in text
    text = single.write(restated(run, names=["a", 7, None], partition="column:site")).read_text()
    assert ">a</text>" in drawing(text, "partition")
    assert ">2</text>" in drawing(text, "partition")
    assert "one per &#x27;site&#x27;" in text


def test_values_that_are_not_finite_are_not_drawn(tmp_path):
    run = fake_run(tmp_path, rounds=3)
    lines = lines_of(run)
    for line in lines:
        line |= {"loss": float("nan")} if line.get("round") == 2 and "loss" in line else {}
    rows = page_of(write_lines(run, lines)).table("round", "validation loss")
    assert [row[1] for row in rows][2] == "-"
    assert not re.search(r"\bnan\b", (run / "report.html").read_text())


def test_figures_of_the_method_stand_beside_the_losses(tmp_path):
    run = fake_run(tmp_path, rounds=3)
    events = lines_of(run)
    own = {1: {"layers": 30.0}, 2: {"layers": 12.0, "personal_loss": 1.23456, "odd": "text"}, 3: "no table"}
    for event in events:
        if event["event"] == "round":
            event["report"] = own[int(str(event["round"]))]
    head = ("round", "validation loss", "Rouge-L", "layers", "personal loss")
    rows = page_of(write_lines(run, events)).table(*head)
    assert [row[3:5] for row in rows] == [["-", "-"], ["30", "-"], ["12", "1.235"], ["-", "-"]]


def with_clients(run: Path, **of: object) -> Path:
    final = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(final | {"per_client": of}))
    return run


def test_client_losses_show_who_got_worse(tmp_path):
    run = restated(fake_run(tmp_path, clients=4, rounds=1, asked=4), names=["north", "south", "east", "west"])
    with_clients(run, rows="held-out", n=[4, 4, 4, 4], base=[4.0, 3.0, 2.0, 1.0], tuned=[3.5, 3.25, 2.0, 0.5])
    text = single.write(run).read_text()
    assert "2 of 4 clients got better, 1 worse (south +0.250)" in text
    assert "Mean: 2.500 before, 2.312 after; of the worst tenth: 4.000 before, 3.500 after." in text
    assert "Measured on 4 held-out rows of each:" in text
    drawn = drawing(text, "per-client")
    assert re.findall(r'text-anchor="end">(\w+)</text>', drawn) == ["south", "east", "north", "west"]
    assert [drawn.count(f'class="link c{c}"') for c in (svg.BETTER, svg.WORSE, svg.SAME)] == [2, 1, 1]
    assert page_of(run).table("client", "before", "after")[0][:3] == ["south", "3.000", "3.250"]
    with_clients(run, rows="training", n=[2, 3], base=[1, 2], tuned=[0.5, 1])
    assert "Measured on 2 to 3 training rows of each, which were trained on" in page_of(run).text


def test_worst_tenth_is_of_one_client_at_least():
    assert single.worst_tenth([1.0, 5.0, 2.0]) == 5.0
    assert single.worst_tenth([float(i) for i in range(20)]) == 18.5
