"""Encoders: whose head a directory gets, accuracy by head and by label words, and a whole run of one."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import fleetune
from command_line import FEW
from fleetune import models
from fleetune.data import Example
from fleetune.data.encode import encode, encode_rows
from fleetune.errors import DataError, ModelError, RecipeError
from fleetune.evaluation.answers import answer_ids, label_accuracy, predict
from fleetune.evaluation.losses import class_rows, response_loss
from fleetune.evaluation.measures import evaluate, measure_rows
from fleetune.models.tiny import tiny_pair_tokenizer
from fleetune.runs.rundir import events
from fleetune.tuning.recipe.recipe import label_words, make

SIZES: dict[str, Any] = {"vocab_size": 264, "pad_token_id": 258}
SMALL = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 1, "num_attention_heads": 4}
BERT, ROBERTA = hf.BertConfig(**SIZES, **SMALL), hf.RobertaConfig(**SIZES, **SMALL)
DISTIL = hf.DistilBertConfig(**SIZES, dim=32, hidden_dim=72, n_layers=1, n_heads=4)
KINDS: dict[str, tuple[Any, Any, set[str]]] = {
    "bert": (hf.BertModel, BERT, {"classifier"}),
    "bert, masked": (hf.BertForMaskedLM, BERT, {"classifier", "bert.pooler.dense"}),
    "roberta": (hf.RobertaModel, ROBERTA, {"classifier.dense", "classifier.out_proj"}),
    "distilbert, masked": (hf.DistilBertForMaskedLM, DISTIL, {"pre_classifier", "classifier"}),
}


def folder(path: Path, net: hf.PreTrainedModel, kind: str = "bert") -> Path:
    models.save(net, tiny_pair_tokenizer("bert" if kind.startswith("bert") else "roberta"), path)
    return path


def trained_head(path: Path, labels: tuple[str, ...] = ("no", "yes")) -> models.Model:
    """A classifier whose head is like no start, as a directory; the model in memory."""
    model = models.tiny_bert(3, labels=labels)
    with torch.no_grad():
        model.net.classifier.bias.copy_(torch.arange(float(len(labels))) - 0.3)
    models.save(model.net, model.tokenizer, path)
    return model


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_bare_encoder_gets_a_new_head_and_keeps_everything_else(tmp_path: Path, kind: str) -> None:
    make, config, new = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make(config)
    path = folder(tmp_path / "bare", net, kind)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    model = models.load(str(path), labels=("no", "yes", "perhaps"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.labels == ("no", "yes", "perhaps")
    prefix = model.net.base_model_prefix + "."
    old = {n if n.startswith(prefix) else prefix + n: p for n, p in net.named_parameters()}
    fresh = set()
    for name, parameter in model.net.named_parameters():
        if name in old:
            assert torch.equal(parameter, old[name]), name
        else:
            fresh.add(name.rpartition(".")[0])
            if name.endswith("bias"):
                assert not parameter.any()
            else:
                assert 0 < parameter.abs().max() <= 0.02 * math.sqrt(3)  # uniform with deviation 0.02
    assert fresh == new
    torch.manual_seed(2)
    again = models.load(str(path), labels=("no", "yes", "perhaps"))
    assert again.digest == model.digest  # the same head, whatever the generators
    assert again.net.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}


def test_a_saved_classifier_keeps_its_head_and_the_order_of_its_labels(tmp_path: Path) -> None:
    saved = trained_head(tmp_path / "own", ("zebra", "ant", "fox"))
    for labels in ((), ("ant", "fox"), ("fox", "ant", "zebra")):
        model = models.load(str(tmp_path / "own"), labels=labels)
        assert model.labels == ("zebra", "ant", "fox")
        assert model.digest == models.digest(models.named_tensors(saved.net))
        assert torch.equal(model.net.classifier.bias, saved.net.classifier.bias)


def test_other_labels_mean_a_new_head_and_a_warning(tmp_path: Path, caplog: Any) -> None:
    saved = trained_head(tmp_path / "own")
    with caplog.at_level(logging.WARNING):
        model = models.load(str(tmp_path / "own"), labels=("north", "south"))
    assert "it gets a new head" in caplog.text
    assert model.labels == ("north", "south")
    assert not model.net.classifier.bias.any()
    assert not torch.equal(model.net.classifier.weight, saved.net.classifier.weight)
    assert torch.equal(model.net.bert.pooler.dense.weight, saved.net.bert.pooler.dense.weight)
    assert models.load(str(tmp_path / "own"), labels=("a", "b", "c", "d")).net.classifier.weight.shape[0] == 4


def test_an_encoder_that_lacks_more_than_its_head_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "bare", hf.BertModel(BERT))
    tensors = load_file(path / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*bert\.encoder\.layer\.0\.output\.dense\.weight"):
        models.load(str(path), labels=("no", "yes"))


PAIRS = [
    Example((("user", f"{q}|{s}"),), "yes" if s in q else "no", {}, (q, s))
    for q, s in [("what a", "a"), ("b?", "cc" * 20), ("abc", "b"), ("x" * 9, "y"), ("is z", "z"), ("m", "nn")]
]


def by_hand(model: models.Model, example: Example) -> np.ndarray:
    """One row by itself through the net, float64 log-probabilities of the label words."""
    made = model.tokenizer(*example.texts, return_tensors="pt")
    with torch.no_grad():
        return F.log_softmax(model.net(**made).logits[0].double(), 0).numpy()


@pytest.mark.parametrize("make", [models.tiny_bert, models.tiny_roberta])
def test_loss_and_accuracy_of_a_head(make: Any) -> None:
    """Each row alone, by plain transformers; neither padding nor the batch size has a part in it."""
    model = make(5)
    said = [by_hand(model, e) for e in PAIRS]
    targets = [model.labels.index(e.response) for e in PAIRS]
    accuracy = 100 * np.mean([int(p.argmax()) == t for p, t in zip(said, targets, strict=True)])
    loss = -np.mean([p[t] for p, t in zip(said, targets, strict=True)])
    assert 0 < accuracy < 100
    rows, _ = encode_rows(model, PAIRS, 512)
    assert response_loss(model, rows) == pytest.approx(loss, abs=1e-5)
    assert class_rows(model, rows)[1].mean() == pytest.approx(accuracy / 100)
    for size in (1, 4, 8):
        assert label_accuracy(model, PAIRS, batch_size=size) == pytest.approx(accuracy)
    wanted = pytest.approx({"loss": loss, "accuracy": accuracy}, abs=1e-5)
    assert measure_rows(model, rows, PAIRS, (), 512)[0] == wanted
    assert evaluate(model, PAIRS).values == wanted
    assert predict(model, PAIRS) == [model.labels[int(p.argmax())] for p in said]


def test_accuracy_by_label_words_of_a_causal_model_on_the_same_rows() -> None:
    """Mean log-probability of each word's tokens after the question, one row at a time."""
    model, right = models.tiny_llama(2), 0
    for example in PAIRS:
        scores = []
        for word in ("no", "yes"):
            row = encode(Example(example.messages, word), model.tokenizer, 512)
            n = row.n_prompt + len(answer_ids(model, word))
            with torch.no_grad():
                logits = model.net(torch.tensor([row.ids.tolist()])).logits[0].double()
            said = F.log_softmax(logits, -1)
            scores.append(np.mean([said[t - 1, int(row.ids[t])].item() for t in range(row.n_prompt, n)]))
        right += ("no", "yes")[int(np.argmax(scores))] == example.response
    accuracy = 100 * right / len(PAIRS)
    assert label_accuracy(model, PAIRS, ["no", "yes"]) == pytest.approx(accuracy)
    rows, _ = encode_rows(model, PAIRS, 512)
    assert measure_rows(model, rows, PAIRS, ("no", "yes"), 512)[0]["accuracy"] == pytest.approx(accuracy)
    assert set(measure_rows(model, rows, PAIRS, (), 512)[0]) == {"loss"}  # no words, no accuracy


def test_what_an_encoder_cannot_do_is_refused() -> None:
    model = models.tiny_bert()
    for task in ("rouge_l", "perplexity", "exact_match"):
        with pytest.raises(RecipeError, match=f"task '{task}' needs a model that writes text"):
            evaluate(model, PAIRS, [task])
    with pytest.raises(DataError, match=r"1 other response such as \['maybe'\]"):
        label_accuracy(model, [Example((("user", "q"),), "maybe", {}, ("q",))])


def data(path: Path) -> str:
    labels = ("not_entailment", "entailment")
    rows = [
        {"question": f"what {c}", "sentence": f"it is {c if i % 2 else 'q'}", "label": labels[i % 2]}
        for i, c in enumerate("abcdefghijklmnop")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_run_of_an_encoder_on_labelled_rows(tmp_path: Path) -> None:
    path = folder(tmp_path / "bare", hf.BertModel(BERT))
    few: dict[str, Any] = FEW | {"rounds": 2, "samples": 2, "out": tmp_path / "runs", "max_length": 32}
    few |= {"method": "fedpetuning", "settings": {"module": "bitfit", "batch_size": 4}}
    found = fleetune.tune(path, data(tmp_path / "qnli.jsonl"), **few)
    assert set(found.done.base) == set(found.done.tuned) == {"loss", "accuracy"}
    run = found.folder
    assert 'labels = "no,yes"' in (run / "run.toml").read_text()  # written out, so that a resume has them
    measured = [e for e in events(run) if e["event"] == "eval"]
    assert [e["round"] for e in measured] == [0, 1, 2]
    assert all(0 <= e["accuracy"] <= 100 for e in measured)
    assert measured[0]["loss"] == pytest.approx(math.log(2), abs=0.05)  # a new head knows nothing
    samples = json.loads((run / "eval.json").read_text())["samples"]
    assert {s["base"] for s in samples} <= {"no", "yes"}
    assert (run / "adapter").is_dir()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"rouge_rows": 4}, RecipeError, "rouge_rows = 4 needs a model that writes text"),
        ({"labels": "left,right"}, DataError, "labels = left,right: 16 of 16 rows have another answer"),
        ({"data": "demo", "limit": 80}, ModelError, "chooses among 2 to 64 label words; 80 were given"),
    ],
)
def test_a_run_that_an_encoder_cannot_do_ends(tmp_path: Path, changes: dict, error: type, said: str) -> None:
    path = folder(tmp_path / "bare", hf.BertModel(BERT))
    options = {"model": str(path), "data": data(tmp_path / "a.jsonl"), "method": "fedpetuning", "clients": 2}
    with pytest.raises(error, match=said):
        fleetune.tune(make(options | changes), out=tmp_path / "runs")


def test_a_label_word_may_have_a_comma(tmp_path: Path) -> None:
    """Tuned, written down, read back and measured."""
    path = folder(tmp_path / "bare", hf.BertModel(BERT))
    names = ["a, b", "c\\,d", "e"]
    rows = [{"text": f"t{i}", "label": names[i % 3]} for i in range(18)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few: dict[str, Any] = FEW | {"method": "fedpetuning", "out": tmp_path / "runs"}
    run = fleetune.tune(path, tmp_path / "a.jsonl", settings={"module": "bitfit"}, max_length=16, **few)
    recipe = fleetune.open(run).recipe
    assert recipe.labels == "a\\, b,c\\\\,d,e"
    assert label_words(recipe.labels) == run.model().labels == tuple(names)
    measured = fleetune.evaluate(run, tasks="accuracy", labels=recipe.labels)
    assert measured["accuracy"] == pytest.approx(run.done.tuned["accuracy"])
    rows = [{"text": f"t{i}", "label": ["a\\", "c"][i % 2]} for i in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecipeError, match="ends with a backslash"):
        fleetune.tune(path, tmp_path / "a.jsonl", **few)
