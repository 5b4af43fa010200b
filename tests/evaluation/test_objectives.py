"""Objectives: the built-in ones against the same number reached another way, and functions by import path."""

import sys
from pathlib import Path

import pytest
import torch
from losses_harness import labelled, says

from fleetune.data.encode import Batch, collate, encode_all, prompt_ids
from fleetune.data.read_rows import Example
from fleetune.errors import DataError, RecipeError
from fleetune.evaluation import objectives
from fleetune.evaluation.answers import generate, label_accuracy, rouge_l, token_f1
from fleetune.evaluation.objectives import BUILT_IN, get, loss_tensor, split
from fleetune.models import Model, tiny_llama


def _batch(model: Model, examples: list[Example]) -> Batch:
    return collate(encode_all(examples, model.tokenizer, 256)[0], 257)


def test_a_batch_splits_into_prompts_and_references(tiny: Model) -> None:
    examples = labelled("yes", "no, never", "maybe")
    prompts, references = split(_batch(tiny, examples))
    for example, prompt, reference in zip(examples, prompts, references, strict=True):
        assert prompt.tolist() == prompt_ids(example, tiny.tokenizer, 256).tolist()
        assert tiny.tokenizer.decode(reference.tolist()) == example.response + "<|im_end|>"


def test_loss_tensor_has_the_models_own_gradient() -> None:
    model = tiny_llama(seed=1)
    model.net.requires_grad_(True)
    batch = _batch(model, labelled("yes", "no, never"))
    model.net(**batch._asdict()).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.net.named_parameters()}
    model.net.zero_grad()
    loss = loss_tensor(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(get()(model, batch), abs=1e-6)
    for name, p in model.net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_accuracy_of_a_rigged_model() -> None:
    model = tiny_llama()
    says(model, {"y": 0.4, "e": 0.2, "s": 0.2, "n": 0.1, "o": 0.1})
    batch = _batch(model, labelled("yes", "no", "no", "yes", "yes"))
    assert get("accuracy")(model, batch) == pytest.approx(-0.6)
    assert get("accuracy:no,yes")(model, batch) == pytest.approx(-0.6)
    assert get("accuracy:no, yes, sey")(model, _batch(model, labelled("yes"))) == -1.0
    assert get("accuracy:no,yes")(model, _batch(model, labelled("no"))) == 0.0


def test_accuracy_is_evaluates_accuracy(tiny: Model) -> None:
    examples = labelled("yes", "no", "maybe", "no", "yes", "maybe")
    percent = label_accuracy(tiny, examples, ["maybe", "no", "yes"])
    assert get("accuracy:maybe,no,yes")(tiny, _batch(tiny, examples)) == pytest.approx(-percent / 100)
    assert 0 < percent < 100


@pytest.mark.parametrize(("name", "score"), [("rouge_l", rouge_l), ("f1", token_f1)])
def test_scores_of_greedy_answers(name: str, score: objectives.Score) -> None:
    model = tiny_llama()
    a, b, c = model.tokenizer("a b")["input_ids"]
    # whatever the prompt, the model says "a b" and ends its turn
    after = {b: c, c: 257}
    state = {"last": -1}

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        state["last"] = a if out.shape[0] > 0 and state["last"] in (-1, 257) else after.get(state["last"], b)
        made = torch.zeros_like(out)
        made[..., state["last"]] = 1.0
        return made

    model.net.lm_head.register_forward_hook(hook)
    examples = labelled("a b", "b", "x", "a b c")
    answers = generate(model, examples, max_new_tokens=9)
    assert answers == ["a b"] * 4
    expected = score(answers, [example.response for example in examples]) / 100
    assert 0.3 < expected < 0.9
    assert get(name)(model, _batch(model, examples)) == pytest.approx(-expected)


def test_values_repeat_and_the_model_is_left_as_it_was() -> None:
    model = tiny_llama(seed=3)
    batch = _batch(model, labelled("yes", "no", "no"))
    before = [p.clone() for p in model.net.parameters()]
    model.net.train()
    state = torch.get_rng_state()
    for name in BUILT_IN:
        assert get(name)(model, batch) == get(name)(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.net.modules())
    assert all(torch.equal(p, q) for p, q in zip(model.net.parameters(), before, strict=True))


OWN = """
import torch
from losses_harness import labelled, says
from dataclasses import dataclass

CONSTANT = 3
calls = []

@dataclass
class Weight:
    value: "float" = 2.0

def mine(model, batch):
    calls.append((torch.is_inference_mode_enabled(), model.net.training))
    return Weight().value * float((batch.labels != -100).sum())

def count(model, batch):
    return float(len(calls))

def tensor(model, batch):
    return torch.tensor(1.0)

def flag(model, batch):
    return True

def nan(model, batch):
    return float("nan")

def infinite(model, batch):
    return -float("inf")

def numpy_number(model, batch):
    import numpy
    return numpy.float32(0.5)

def fails(model, batch):
    return 1 / 0

def ends(model, batch):
    raise SystemExit(0)

def refuses(model, batch):
    from fleetune.errors import DataError
    raise DataError("not these rows")

def one(model):
    return 1.0

def swapped(batch, model):
    return 1.0

async def later(model, batch):
    return 1.0

def pieces(model, batch):
    yield 1.0
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "my objectives.py"
    file.write_text(OWN)
    return file


def test_a_function_in_a_file(tiny: Model, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = _batch(tiny, labelled("yes", "no"))
    objective = get(f"{own}:mine")
    assert objective(tiny, batch) == 2.0 * (4 + 3)
    monkeypatch.chdir(own.parent)
    assert get(f"{own.name}:mine")(tiny, batch) == 14.0
    own.write_text(OWN.replace("2.0", "3.0"))
    assert get(f"{own}:mine")(tiny, batch) == 21.0  # an edited file is read again
    assert objective(tiny, batch) == 14.0
    assert get(f"{own}:count")(tiny, batch) == 1.0  # the same file is the same module


def test_a_function_in_a_package(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_objectives"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "text.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    batch = _batch(tiny, labelled("yes"))
    assert get("some_objectives.text:mine")(tiny, batch) == 8.0
    assert vars(sys.modules["some_objectives.text"])["calls"] == [(True, False)]
    value = get("some_objectives.text:numpy_number")(tiny, batch)
    assert value == 0.5
    assert type(value) is float
    assert get("fleetune.evaluation.losses:batch_loss")(tiny, batch) == get("loss")(tiny, batch)


def test_objectives_that_cannot_be_are_refused_when_they_are_chosen(own: Path, tmp_path: Path) -> None:
    ends = tmp_path / "ends.py"
    ends.write_text("import sys\ndef f(model, batch): ...\nsys.exit()\n")
    wrong = ["loss:3", "accuracy:yes", "accuracy:yes,yes", "accuracy:yes,,no", "f1:0", "f1:x", "rouge_l:-3"]
    paths = ["lsos", ":f", "module:", f"{tmp_path / 'none.py'}:f", f"{ends}:f", "no_such_package_here.sub:f"]
    odd = ("missing", "CONSTANT", "one", "swapped", "Weight", "later", "pieces")
    functions = [f"{own}:{name}" for name in odd]
    for name in (*wrong, *paths, *functions):
        with pytest.raises(RecipeError) as caught:
            get(name)
        assert caught.value.hint
    assert not [name for name in sys.modules if vars(sys.modules[name]).get("__file__") == str(ends)]


SAID = {"tensor": "Tensor", "flag": "bool", "nan": "nan", "infinite": "-inf", "ends": "SystemExit"}
SAID |= {"fails": r"(?m)ZeroDivisionError: .*my objectives.py:\d+\)$"}


@pytest.mark.parametrize(("function", "says"), SAID.items())
def test_bad_results_are_recipe_errors(tiny: Model, own: Path, function: str, says: str) -> None:
    objective = get(f"{own}:{function}")
    with pytest.raises(RecipeError, match=says) as caught:
        objective(tiny, _batch(tiny, labelled("yes")))
    assert caught.value.hint
    with pytest.raises(DataError, match="not these rows"):  # our own pass through
        get(f"{own}:refuses")(tiny, _batch(tiny, labelled("yes")))


def test_accuracy_refuses_answers_that_no_word_covers(tiny: Model) -> None:
    for name, labels in (("accuracy:yes,no", ("yes", "maybe")), ("accuracy", ("yes",))):
        with pytest.raises(RecipeError, match="cover"):
            get(name)(tiny, _batch(tiny, labelled(*labels)))
    assert get("accuracy")(tiny, _batch(tiny, labelled("yes", "yes"))) == -1.0


ROWS = {"loss": 8, "accuracy": 64, "accuracy:yes,no": 16, "rouge_l": 136, "f1:64": 72, "f1:4": 8}


@pytest.mark.parametrize(("name", "rows"), ROWS.items())
def test_an_objective_is_counted_in_rows(name: str, rows: int) -> None:
    assert objectives.rows_of(name, 8) == rows


def test_the_mean_over_rows_is_weighted_by_rows(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text("def length(model, batch): return float(len(batch.labels))")
    rows, _ = encode_all(labelled("yes", "no", "no", "yes", "no"), tiny.tokenizer, 64)
    # batches of 2, 2 and 1 rows, each of which says its own length
    assert objectives.mean_value(tiny, rows, f"{tmp_path}/rows.py:length", batch_size=2) == 9 / 5
