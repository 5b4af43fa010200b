"""Axes with few round ticks, marks where their values are, labels and legends that fit."""

import itertools
import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleetune.report import svg


@example([1.0, 8.216234970987793e-205])
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20))
def test_axes_hold_their_values_between_few_round_ticks(values):
    axis = svg.numbers(values, "x")
    assert -1e-6 <= axis.at(min(values)) <= axis.at(max(values)) <= 1 + 1e-6
    places = [value for value, _ in axis.ticks]
    assert places == sorted(places)
    assert 2 <= len(places) <= 8
    steps = {round((b - a) / (places[1] - places[0]), 6) for a, b in itertools.pairwise(places)}
    assert steps == {1.0}


@given(st.floats(1e-6, 1e9), st.integers(1, 12))
def test_steps_are_one_two_or_five(span, count):
    step = svg.nice_step(span, count)
    first = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(first - digit) for digit in (1, 2, 5)) < 1e-6
    assert count / 2.6 <= span / step <= count * (1 + 1e-6)


def test_ticks_are_round_numbers():
    assert [t for _, t in svg.integers([0, 3], "x").ticks] == ["0", "1", "2", "3"]
    assert next(t for _, t in svg.numbers([2.386, 2.391], "x").ticks) == "2.386"
    assert [t for _, t in svg.counts([1], "x").ticks] == ["0", "1"]


@pytest.mark.parametrize(("values", "broken"), [([3.9, 4.3], 1), ([0.0, 4.0], 0), ([-2.0, -1.0], 1)])
def test_axes_that_leave_out_zero_are_marked_and_said(values, broken):
    text = svg.Plot("a", "title", "words.", svg.integers([0, 1], "round"), svg.numbers(values, "loss")).svg()
    assert ('class="break"' in text) == ("The vertical axis does not begin at 0." in text) == broken


@given(st.lists(st.floats(0, 300), max_size=12))
def test_spread_pushes_labels_apart(ys):
    moved = svg.spread(sorted(ys), 14.0, 20.0, 260.0)
    assert moved == sorted(moved)
    assert all(b - a >= 14.0 - 1e-9 for a, b in itertools.pairwise(moved))
    assert all(y <= 260.0 + 1e-9 for y in moved)
    if len(ys) == 1 and 20 <= ys[0] <= 260:
        assert moved == ys


def test_tick_labels_do_not_overlap():
    ticks = tuple((float(i), f"{i * 1000}") for i in range(61))
    x, y = svg.PlotAxis(0, 60, ticks, "round"), svg.numbers([1, 2], "loss")
    text = svg.Plot("a", "title", "description", x, y).svg()
    found = re.findall(r'<text x="([\d.]+)" y="257" text-anchor="middle">(\d+)</text>', text)
    spans = [(float(x), svg.CHAR * len(t)) for x, t in found]  # middle and width
    assert len(spans) > 5
    assert all(b[0] - a[0] > (a[1] + b[1]) / 2 for a, b in itertools.pairwise(spans))


def test_lines_are_broken_where_a_value_is_missing():
    plot = svg.Plot("a", "title", "description", svg.integers([0, 4], "round"), svg.numbers([1, 2], "loss"))
    plot.line([(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.5), (4, 1.0)], 0, ["t"] * 5)
    path = re.search(r'class="line c0" d="([^"]*)"', plot.svg())
    assert re.sub(r"[\d. ]", "", path[1]) == "MLML"
    assert plot.svg().count('<circle class="mark') == 4


def test_points_are_where_their_values_are():
    plot = svg.Plot("a", "title", "words", svg.integers([0, 10], "round"), svg.numbers([0.0, 1.0], "loss"))
    right = svg.WIDTH - plot.right
    assert [plot.px(x) for x in (0, 5, 10)] == pytest.approx([plot.left, (plot.left + right) / 2, right])
    assert (plot.py(1.0), plot.py(0.0)) == pytest.approx((26.0, 240.0))
    log = svg.PlotAxis(1e3, 1e6, (), "bytes", log=True)
    assert log.at(1e4) - log.at(1e3) == pytest.approx(log.at(1e6) - log.at(1e5)) == pytest.approx(1 / 3)


def test_the_name_of_a_line_has_its_colour():
    plot = svg.Plot("a", "title", "words", svg.integers([0, 10], "round"), svg.numbers([0.0, 1.0], "loss"))
    plot.line([(0, 1.0), (10, 0.5)], -1)
    plot.end((10, 0.5), "mean", -1)
    assert re.findall(r'class="(?:line|own) (\w+)"', plot.svg()) == ["ink", "ink"]


def test_legends_break_where_they_do_not_fit():
    drawn, height = svg.legend([(f"category {i}", i) for i in range(8)], 4.0, 100.0)
    found = re.findall(r'<text x="([\d.]+)" y="[\d.]+">([^<]+)<', drawn)
    ends = [float(x) + svg.WIDEST * len(t) for x, t in found]
    assert len(ends) == 8
    assert max(ends) <= svg.WIDTH
    assert height == 16 + 17
    assert svg.legend([], 0, 0) == ("", 0.0)
