"""The rounds and the clients on the page: every number is that of the metrics."""

import json
import re
from pathlib import Path

from report_harness import CATEGORIES, fake_run, lines_of, page_of, restated, write_lines

from fleetune.common.display import human_bytes, human_time
from fleetune.report import course, single, svg


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
    text = (run24 / "report.html").read_text()
    assert text.count('class="mark c0"') == 11


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
    page = page_of(run)
    assert page.table("client", "before", "after")[0][:3] == ["south", "3.000", "3.250"]
    with_clients(run, rows="training", n=[2, 3], base=[1, 2], tuned=[0.5, 1])
    assert "Measured on 2 to 3 training rows of each, which were trained on" in page_of(run).text


def test_worst_tenth_is_of_one_client_at_least():
    assert course.worst_tenth([1.0, 5.0, 2.0]) == 5.0
    assert course.worst_tenth([float(i) for i in range(20)]) == 18.5
