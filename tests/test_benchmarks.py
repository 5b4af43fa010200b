"""Every benchmark that is run as a program says with --help what it does, and does nothing of it; leaks are measured right."""

import importlib
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if '__name__ == "__main__"' in path.read_text("utf-8")
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_printed_and_nothing_is_run(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))  # the benchmarks are no package of the wheel
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    except ModuleNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.fixture
def privacy(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("dp_accounting")
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.privacy")


def test_membership_is_told_by_losses_that_move_and_by_no_others(privacy):
    rng = np.random.default_rng(0)
    member, hardness = rng.random((16, 150)) < 0.5, 10 * rng.standard_normal(150)
    noise = rng.standard_normal((16, 150))
    for shift, least, most in ((0.0, 0.44, 0.56), (1.0, 0.68, 0.78), (30.0, 0.99, 1.0)):
        seen = hardness + noise - shift * member  # of the best test: Phi(1 / sqrt 2) = 0.76 for 1
        assert least <= privacy.area(privacy.likelihood_ratios(seen, member), member) <= most


def test_exposure_is_log_R_minus_log_rank(privacy):
    bits = privacy.exposure(np.array([-1.0, 0.5, 126.5, 999.0]), np.arange(255.0))
    np.testing.assert_allclose(bits, [8, 7, 1, 0])


def test_canaries_are_compared_with_themselves(privacy):
    rng = np.random.default_rng(0)
    likely = np.arange(10.0)  # the likelier a canary is anyway, the more often it is in
    member = rng.random((16, 10)) < likely / 9
    inside, out = privacy.inside_and_out(likely + 0.5 * member, member)
    assert inside - out == pytest.approx(0.5)


def test_a_row_is_found_as_often_as_theory_says(privacy):
    vectors, x = 3 * np.eye(32), np.linspace(-9, 25, 20_001)
    below = np.array([0.5 * (1 + math.erf(t / math.sqrt(2))) for t in x])
    # of 32 normals of one variance, one has mean 1 / noise: is it the largest?
    for noise in (0.1, 0.5, 1.0, 100.0):
        chance = np.trapezoid(np.exp(-0.5 * (x - 1 / noise) ** 2) / math.sqrt(2 * math.pi) * below**31, x)
        assert privacy.guessed(vectors, 0.7, noise) == pytest.approx(chance, abs=0.04)
    assert privacy.guessed(vectors, math.inf, 0.0) == 1.0


def test_the_quick_benchmark_finds_rows_without_noise(privacy, monkeypatch):
    small = {"LENGTH": 32, "ROUNDS": 1, "SECRETS": 15, "EPSILONS": (0.0, 8.0), "AUDITED": 4, "GUESSES": 8}
    for name, value in (small | {"HELD": 16, "TESTED": 16}).items():
        monkeypatch.setattr(privacy, name, value)
    rows = {row.name: row for row in privacy.run(privacy.Setting(quick=True)).rows}
    assert rows["Row found: fedkseed, no noise"].ours > 0.9
    assert rows["Gain kept, 10 clients: fedkseed, no noise"].ratio == 1
    assert 0 <= rows["Membership AUC: fedkseed, epsilon 8"].ours <= 1
    assert 0 <= rows["Canary exposure: fedkseed, epsilon 8"].ours <= 4
