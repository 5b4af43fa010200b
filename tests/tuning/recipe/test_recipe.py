"""Recipes: there and back through TOML, every problem at once, suggestions, bounds."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.errors import RecipeError
from fleetune.tuning.recipe.recipe import Recipe, make, read, to_toml

ODD = 'a "quoted" name|back\\slash|line\nbreak|\r\n|tab\t|nul\0|del\x7f|\x85\u2028|é🦊|# no comment|\'\'\'|"""|[set]|a = 1|'
texts = st.text(max_size=20) | st.sampled_from([*ODD.split("|"), "\ufeffmark"])
values = texts | st.booleans() | st.integers() | st.floats(allow_nan=False)
shares = st.floats(0, 1, exclude_max=True)
whole = st.fixed_dictionaries(
    {"model": texts, "data": texts},
    optional={
        "method": texts,
        "set": st.dictionaries(texts, values, max_size=4),
        "clients": st.integers(0, 10**6),
        "rounds": st.integers(1, 10**6),
        "participation": st.floats(0, 1, exclude_min=True),
        "partition": texts,
        "held_out": st.floats(0, 1, exclude_min=True) | st.integers(1, 10**9),
        "limit": st.integers(0, 2**53),
        "seed": st.integers(0, 2**63 - 1),
        "dtype": st.sampled_from(["fp32", "bf16", "fp16"]),
        "device": st.sampled_from(["auto", "cpu", "cuda", "mps"]),
        "drop": shares,
        "stragglers": shares,
        "deadline": st.floats(0),
        "eval_every": st.integers(0, 99),
        "max_length": st.integers(8, 99),
    },
)


def typed(recipe: Recipe) -> dict[str, Any]:
    """The values with their types: True is not 1 here, nor 1 1.0, nor 0.0 -0.0."""
    return {n: repr(sorted(v.items()) if isinstance(v, dict) else v) for n, v in asdict(recipe).items()}


@given(given_values=whole)
@settings(max_examples=60)
def test_any_recipe_comes_back_from_its_toml(tmp_path_factory, given_values):
    recipe = make(given_values)
    text = to_toml(recipe)
    path: Path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode())
    again = make(read(path))
    assert typed(again) == typed(recipe)
    assert to_toml(again) == text
    for name, value in given_values.items():
        assert getattr(recipe, name) == value


def test_all_problems_are_told_at_once():
    wrong = {"modle": "x", "data": "d", "rounds": 0, "dtype": "int8"}
    with pytest.raises(RecipeError) as caught:
        make(wrong | {"participation": 2, "zzz": 1, "seed": "a"})
    problems = caught.value.problems
    assert len(problems) == 7
    assert "unknown option 'modle'. Did you mean 'model'?" in problems
    assert "unknown option 'zzz'." in problems
    assert "model is missing" in problems
    for start in ("rounds = 0: ", "dtype = 'int8': ", "participation = 2: ", "seed = 'a': "):
        assert sum(p.startswith(start) for p in problems) == 1, start
    assert all(p in caught.value.message for p in problems)
    assert "fleetune tune --help" in (caught.value.hint or "")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("typo", "meant"), [("heldout", "held_out"), ("zzzz", None)])
def test_a_typo_gets_a_suggestion(typo, meant):
    with pytest.raises(RecipeError) as caught:
        make({"model": "m", "data": "d", typo: 1})
    want = f"unknown option '{typo}'." + (f" Did you mean '{meant}'?" if meant else "")
    assert caught.value.problems == [want]


BOUNDS = [  # option, values at the edge that are good, values just beyond
    ("clients", (0, 1_000_000), (-1, 1_000_001)),
    ("rounds", (1, 1_000_000), (0, 1_000_001)),
    ("participation", (1e-9, 1), (0, -0.1, 1.0001, math.nan)),
    ("held_out", (1e-9, 0.5, 1, 500), (0, -1, 1.5, math.nan, math.inf)),
    ("limit", (0, 2**53), (-1, 2**53 + 1, 99999999999999999999)),
    ("max_length", (8,), (7,)),
    ("seed", (0, 2**63 - 1), (-1, 2**63)),
    ("dtype", ("fp32", "bf16", "fp16"), ("FP32", "float32", "", "fp32 ", "fp32\n", 32)),
    ("device", ("auto", "cpu", "cuda", "mps"), ("cuda:0", "tpu", "")),
    ("drop", (0, 0.99), (-0.1, 1, math.nan)),
    ("stragglers", (0, 0.99), (-0.1, 1, math.nan)),
    ("deadline", (0, 2.5), (-1, math.nan)),
    ("quorum", (1,), (0,)),
    ("eval_every", (0,), (-1,)),
    ("eval_rows", (1,), (0,)),
    ("rouge_rows", (0,), (-1,)),
    ("samples", (0,), (-1,)),
    ("answer_tokens", (1,), (0,)),
    ("threads", (0, 4096), (-1, 4097, 2147483648)),
]


@pytest.mark.parametrize(("name", "good", "bad"), BOUNDS, ids=[b[0] for b in BOUNDS])
def test_bounds(name, good, bad):
    for value in good:
        assert getattr(make({"model": "m", "data": "d", name: value}), name) == value
    for value in bad:
        with pytest.raises(RecipeError) as caught:
            make({"model": "m", "data": "d", name: value})
        assert [p.split(" = ")[0] for p in caught.value.problems] == [name], value
        assert repr(value) in caught.value.problems[0]


@pytest.mark.parametrize("name", ["data", "model", "eval_data", "set.objective"])
def test_a_name_that_run_toml_cannot_hold_is_refused(name):
    (section, _, key), value = name.partition("."), "m\udcff.py:f"
    with pytest.raises(RecipeError) as caught:
        make({"model": "m", "data": "d", section: {key: value} if key else value})
    assert caught.value.problems == [f"{name} = {value!r} is not text in UTF-8, and a run writes it down"]
    "\n".join(caught.value.problems).encode()  # what is said can be printed


def test_reading_says_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe at .*none\.toml"):
        read(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match=f"cannot read {tmp_path}"):
        read(tmp_path)
    bad = tmp_path / "bad.toml"
    for content in (b"model = smollm2", b"model = 'a'\nmodel = 'b'", b"\xff\xfe", b"[set"):
        bad.write_bytes(content)
        with pytest.raises(RecipeError, match=r"bad\.toml is not TOML") as caught:
            read(bad)
        assert caught.value.hint
