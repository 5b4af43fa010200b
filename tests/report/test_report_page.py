# SPDX-License-Identifier: Apache-2.0
"""What the report shows of a run and what it leaves out: names in place of paths and numbers, marked axes, no plot of equal bars."""

from __future__ import annotations

import base64
import csv
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_report import Page, fake_run, lines_of, page_of, self_contained

from fleetune import report
from fleetune.report import axes, charts, clients, page, single, svg


def restated(run: Path, **more: object) -> Path:
    """Let the first event of a run state more."""
    events = lines_of(run)
    events[0] |= more
    (run / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return run


def drawing(text: str, ident: str) -> str:
    (found,) = [d for d in re.findall(r"<svg .*?</svg>", text, re.S) if f'"{ident}-t ' in d]
    return found


def idents(text: str) -> set[str]:
    return set(re.findall(r'aria-labelledby="(\S+)-t ', text))


# Axes and sizes


@pytest.mark.parametrize(
    ("values", "broken"), [([3.9, 4.3], True), ([0.0, 4.0], False), ([-2.0, -1.0], True)]
)
def test_an_axis_that_leaves_out_zero_is_marked_and_said(values: list[float], broken: bool) -> None:
    text = svg.Plot(
        "a", "title", "words.", axes.integers([0, 1], "round"), axes.numbers(values, "loss")
    ).svg()
    assert ('class="break"' in text) is broken
    assert ("The vertical axis does not begin at 0." in text) is broken


def test_bars_from_zero_and_logarithms_have_no_break() -> None:
    assert not axes.counts([3], "x").broken
    assert not axes.log_sizes([1e3, 1e6], "x").broken


def test_drawings_shrink_to_a_telephone() -> None:
    style = page.style()
    assert "min-width" not in re.sub(r"\(min-width[^)]*\)", "", style)
    assert "svg{display:block;width:100%;height:auto" in style


def test_every_drawing_is_narrow_enough_to_be_read_on_a_telephone(tmp_path: Path) -> None:
    text = report.write(fake_run(tmp_path)).read_text()
    widths = {float(w) for w in re.findall(r'viewBox="0 0 ([\d.]+) ', text)}
    assert widths == {svg.WIDTH}


def test_a_legend_breaks_where_it_does_not_fit() -> None:
    entries = [(f"category {i}", i) for i in range(8)]
    drawn, height = charts.legend(entries, 4.0, 100.0, 300.0)
    ends = [
        float(x) + svg.CHAR * len(t) for x, t in re.findall(r'<text x="([\d.]+)" y="[\d.]+">([^<]+)<', drawn)
    ]
    assert len(ends) == 8
    assert max(ends) <= 300.0
    assert height == 16 + 17 * 2
    assert charts.legend([], 0, 0, 300.0) == ("", 0.0)


# Names


def test_clients_of_the_data_go_by_their_names(tmp_path: Path) -> None:
    run = fake_run(tmp_path, clients=3, rounds=2, asked=3)
    names = ["bakery-lyon", "ferry & co", "a-name-much-longer-than-what-fits"]
    text = report.write(restated(run, names=names, partition="column:client")).read_text()
    bars_of = drawing(text, "partition")
    assert ">bakery-lyon</text>" in bars_of
    assert ">ferry &amp; co</text>" in bars_of
    assert ">a-name-much-longer-th…</text>" in bars_of
    assert "client a-name-much-longer-than-what-fits: " in bars_of  # whole where one points at it
    assert "round 1, client bakery-lyon: " in drawing(text, "spread")
    assert "the clients that the data names" in text
    assert page_of(run).table("client")[0][0] == "bakery-lyon"


def test_clients_without_names_keep_their_numbers(tmp_path: Path) -> None:
    text = report.write(fake_run(tmp_path, clients=3, rounds=1, asked=3)).read_text()
    assert ">2</text>" in drawing(text, "partition")
    run = restated(
        fake_run(tmp_path, "0008-fedit-x", clients=3, rounds=1, asked=3),
        names=["a", 7, None],
        partition="column:site",
    )
    text = report.write(run).read_text()
    assert ">a</text>" in drawing(text, "partition")
    assert "one client per site" in text


def test_no_folder_of_this_machine_is_shown(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rounds=1)
    recipe = (run / "run.toml").read_text()
    recipe = recipe.replace('"smollm2-135m"', '"/home/someone/models/small-hf/"').replace(
        '"demo"', '"/srv/secret/rows.jsonl"'
    )
    (run / "run.toml").write_text(recipe)
    text = report.write(restated(run, model="/home/someone/models/small-hf/")).read_text()
    assert "/home/someone" not in text
    assert "/srv" not in text
    pairs = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", text))
    assert pairs["model"] == "small-hf"
    assert pairs["data"] == "rows.jsonl"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/a/b/model", "model"),
        ("./m.gguf", "m.gguf"),
        (r"C:\data\rows.jsonl", "rows.jsonl"),
        ("org/name", "org/name"),
        ("demo", "demo"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_a_name_is_shortened_only_where_it_is_a_path(given: str, shown: str) -> None:
    assert page.short_name(given) == shown


# What is said in place of a plot


def test_equal_bars_are_a_sentence_and_loss_by_bytes_is_left_out(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rounds=3, asked=24)
    events = lines_of(run)
    for event in events:
        if event["event"] == "round":
            event |= {"bytes_up": 3_737_150, "bytes_down": 3_737_120, "rss": 500_000_000}
    (run / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    shown = page_of(run)
    assert "In every round the clients sent 3.7 MB and received 3.7 MB together." in shown.text
    assert not {"bytes-up", "bytes-down", "loss-bytes"} & idents((run / "report.html").read_text())
    for event in events:
        if event["event"] == "round":
            event["bytes_down"] = 1_000_000 * int(str(event["round"]))
    (run / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    shown = page_of(run)
    assert "In every round the clients sent 3.7 MB together." in shown.text
    assert {"bytes-down", "loss-bytes"} <= idents((run / "report.html").read_text())


def test_the_training_loss_says_what_it_is(tmp_path: Path) -> None:
    text = report.write(fake_run(tmp_path, rounds=2)).read_text()
    assert ">training loss</text>" in drawing(text, "spread")
    assert "the mean over their local steps of the round, on the rows they train on" in text
    assert "client loss" not in text


def test_a_time_stays_on_one_line(tmp_path: Path) -> None:
    lead = re.search(r'<p class="lead">([^<]*)</p>', report.write(fake_run(tmp_path, rounds=2)).read_text())
    assert lead is not None
    assert re.search(r"\d [a-zA-Z]+B? were", lead[1]) is None
    assert re.search("\\d\u00a0[kMG]B were exchanged in \\d+m?\u00a0?", lead[1])


# Options


def test_options_that_were_chosen_stand_first(tmp_path: Path) -> None:
    run = restated(fake_run(tmp_path, rounds=1), changed=["model", "rounds", "set.lr", "gone"])
    text = report.write(run).read_text()
    chosen = text.split("Chosen for this run")[1].split("Left at the default")[0]
    assert dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", chosen)) == {
        "model": "smollm2-135m",
        "rounds": "1",
        "set.lr": "0.0003",
    }
    rest = text.split("Left at the default")[1].split("</section>")[0]
    assert "<dt>set.alpha</dt>" in rest
    assert "<dt>set.lr</dt>" not in rest


def test_the_status_is_that_of_the_end(tmp_path: Path) -> None:
    text = report.write(fake_run(tmp_path, rounds=1)).read_text()
    assert 'class="pill done">✓ done' in text


# Privacy


def test_a_page_with_samples_says_so_before_it_is_shared(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rounds=1)
    assert "This page shows the text of 3 held-out rows of the clients" in page_of(run).text
    final = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(final | {"samples": []}))
    assert "This page shows" not in page_of(run).text


# Before and after, per client


def with_clients(run: Path, **of: object) -> Path:
    final = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(final | {"per_client": of}))
    return run


def test_who_got_worse_is_seen(tmp_path: Path) -> None:
    run = fake_run(tmp_path, clients=4, rounds=1, asked=4)
    restated(run, names=["north", "south", "east", "west"])
    with_clients(run, rows="held-out", n=[4, 4, 4, 4], base=[4.0, 3.0, 2.0, 1.0], tuned=[3.5, 3.25, 2.0, 0.5])
    text = report.write(run).read_text()
    self_contained(Page(text), text)
    assert "2 of 4 clients got better, 1 worse (south +0.250)" in text
    assert "The worst tenth: 4.000 before, 3.500 after." in text
    assert "Measured on 4 held-out rows of each:" in text
    drawn = drawing(text, "per-client")
    names = re.findall(r'text-anchor="end">(\w+)</text>', drawn)
    assert names == ["south", "east", "north", "west"]  # the worst change first
    assert [drawn.count(f'class="link c{c}"') for c in (charts.BETTER, charts.WORSE, charts.SAME)] == [
        2,
        1,
        1,
    ]
    table = page_of(run).table("client", "before", "after")
    assert table[0][:3] == ["south", "3.000", "3.250"]
    over = page_of(run).table("", "before", "after", "change")
    assert over[0] == ["mean over clients", "2.500", "2.312", "−0.188"]


def test_training_rows_are_said_to_be_trained_on(tmp_path: Path) -> None:
    run = with_clients(
        fake_run(tmp_path, clients=2, rounds=1, asked=2),
        rows="training",
        n=[2, 3],
        base=[1, 2],
        tuned=[0.5, 1],
    )
    text = page_of(run).text
    assert "Measured on 2 to 3 training rows of each, which were trained on" in text
    assert "none worse" in text


@pytest.mark.parametrize(
    "damaged",
    [{"rows": 3, "n": "x"}, {"n": [1], "base": [None], "tuned": [1]}, {"n": [1, 1], "base": [1, 1]}],
)
def test_a_damaged_record_of_clients_is_left_out(tmp_path: Path, damaged: dict[str, object]) -> None:
    run = with_clients(fake_run(tmp_path, clients=2, rounds=1, asked=2), **damaged)
    assert "per-client" not in idents(report.write(run).read_text())


def test_the_worst_tenth_is_of_one_client_at_least() -> None:
    assert clients.worst_tenth([1.0, 5.0, 2.0]) == 5.0
    assert clients.worst_tenth([float(i) for i in range(20)]) == 18.5


def test_speed_stands_with_the_costs(tmp_path: Path) -> None:
    run = fake_run(tmp_path, clients=2, rounds=1, asked=2)
    events = lines_of(run)
    for event in events:
        if event["event"] == "client":
            event |= {"steps": 10, "tokens": 4000, "seconds": 2.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    shown = {row[0]: row[1] for t in page_of(run).tables for row in t if len(row) == 2}
    assert shown["local steps per second"] == "5"
    assert shown["tokens trained on per second"] == "2,000"
    plain = {
        row[0]
        for t in page_of(fake_run(tmp_path, "0009-fedit-y", rounds=1)).tables
        for row in t
        if len(row) == 2
    }
    assert "local steps per second" not in plain


# Plots as files


def read_csv(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def test_plots_lie_beside_the_page_as_svg_and_csv(tmp_path: Path) -> None:
    run = fake_run(tmp_path, clients=4, rounds=3, asked=4)
    with_clients(run, rows="held-out", n=[4] * 4, base=[4.0, 3.0, 2.0, 1.0], tuned=[3.5, 3.25, 2.0, 0.5])
    restated(run, names=["north", "=cmd()", "a,b", 'say "x"'])
    text = report.write(run).read_text()
    names = idents(text)
    assert {p.stem for p in (run / "plots").glob("*.svg")} == names
    for name in names:
        drawn = ElementTree.parse(run / "plots" / f"{name}.svg").getroot()
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    rounds = read_csv(run / "plots" / "rounds.csv")
    events = {e["round"]: e for e in lines_of(run) if e["event"] == "eval"}
    assert [float(r["loss"]) for r in rounds] == [events[n]["loss"] for n in range(4)]
    clients = read_csv(run / "plots" / "clients.csv")
    assert [c["client"] for c in clients] == [
        "north",
        "'=cmd()",
        "a,b",
        'say "x"',
    ]  # no formula for a spreadsheet
    assert [float(c["loss_after"]) for c in clients] == [3.5, 3.25, 2.0, 0.5]
    rows_of = read_csv(run / "plots" / "client-rows.csv")
    assert [int(r["rows"]) for r in rows_of] == lines_of(run)[0]["rows_per_client"]
    losses = read_csv(run / "plots" / "client-losses.csv")
    assert len(losses) == 12


def test_links_in_the_page_hold_the_same_files(tmp_path: Path) -> None:
    run = fake_run(tmp_path, clients=4, rounds=2, asked=4)
    shown = page_of(run)
    found = dict(zip(shown.values("download"), shown.values("href"), strict=True))
    files = {p.name: p.read_text() for p in (run / "plots").iterdir()}
    assert {n for n in files if n.endswith(".svg")} == {n for n in found if n.endswith(".svg")}
    for name, url in found.items():
        assert base64.b64decode(url.partition(",")[2]).decode() == files[name]
    assert "rounds.csv" in found


def test_no_text_of_rows_is_in_the_plots(tmp_path: Path) -> None:
    run = fake_run(tmp_path, rounds=1)
    report.write(run)
    assert not [p for p in (run / "plots").iterdir() if "walk-in cooler" in p.read_text()]


def test_a_very_large_drawing_is_not_in_the_page_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "LARGEST", 0)
    run = fake_run(tmp_path, rounds=2)
    assert {n.rpartition(".")[2] for n in page_of(run).values("download")} == {"csv"}
    assert (run / "plots" / "loss-round.svg").is_file()
