"""What is refused: settings, requests and models, by the type of the error and one word of it."""

from pathlib import Path
from typing import Any

import pytest
from pruner_harness import pruner
from pruner_harness import tiny as prunable

from fleetune import compression, models
from fleetune.cli.main import main
from fleetune.errors import RecipeError

SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("optq", {"bits": 6}, "bits = 6"),
    ("optq", {"grid": "q7_k"}, "none of ggml"),
    ("optq", {"grid": "iq4_nl", "bits": 3}, "16 values"),
    ("rtn", {"grid": "q6_k", "bits": 8}, "codes of 6 bits"),
    ("optq", {"grid": "q2_k", "group": 64}, "groups of 16"),
    ("optq", {"damping": "2"}, "between 0 and 1"),
    ("optq", {"grid": "universal", "bits": 8}, "5 bits at most"),
    ("rtn", {"group": -1}, "below 0"),
    ("sparsegpt", {"sparsity": 1}, "sparsity = 1"),
    ("sparsegpt", {"n": 4, "m": 4}, "0 < n < m"),
    ("sparsegpt", {"n": 2, "m": 64, "bits": 4}, "whole patterns"),
    ("sparsegpt", {"grid": "iq4_nl", "bits": 4}, "has no 0"),
    ("sparsegpt", {"grid": "q6_k", "bits": 4}, "for optq and rtn"),
    ("sparsegpt", {"sparcity": 0.5}, "'sparsity'"),
    ("gkd", {}, "no teacher"),
    ("gkd", {"teacher": "t", "beta": 1.5}, "beta = 1.5"),
    ("gkd", {"teacher": "t", "temperature": 0}, "positive"),
    ("gkd", {"teacher": "t", "clip": -1}, "negative"),
    ("llm-pruner", {"ratio": 1}, "between 0 and 1"),
    ("llm-pruner", {"scope": "all"}, "not one of"),
    ("llm-pruner", {"first": -1}, "below 0"),
    ("llm-pruner", {"dropout": 1}, "shares"),
]
MODELS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"first": 2, "last": 2}, {}, "spare all 4"),
    ({"round_to": 64}, {}, "40 channels"),
    ({"ratio": 0.04}, {}, "takes nothing"),
    ({}, {"kind": "mistral"}, "'mistral'"),
]
REQUESTS = [
    ("", "needs a model"),
    ("m --method gptqq", "gptqq"),
    ("m --set bit=4", "'bits'"),
    ("m --set group=7", "divide"),
    ("./nothing --set grid=q6_k --set bits=4", "bits = 6"),
    ("./nothing --length 1 --bpw 5", "gradient"),
    ("m --method optq --set group=8 --text short.txt", "window needs"),
    ("m --text no.txt", "no.txt"),
    ("m --text rows.jsonl", "--data rows.jsonl"),
    ("m --data short.bin", "no reader"),
    ("m --text text.txt --data rows.jsonl", "both given"),
    ("m --windows 0", "below 1"),
    ("m --length 9999 --set group=8", "longer than"),
    ("bert", "encoder"),
    ("--resume 9", "'9'"),
    ("m --bytes 1MB --bpw 5", "both say"),
    ("m --bytes 1MB --set bits=5", "chooses bits"),
    ("m --bytes 1MB --method rtn", "rtn does not"),
    ("m --bytes 1MB --method llm-pruner", "leaves floats"),
    ("m --bpw nan", "below 33"),
    ("m --method rtn --train-scales 5", "takes none"),
    ("m --method sparsegpt --train-scales 5", "no scales"),
    ("m --low-memory --set group=8", "its own text"),
    ("m --low-memory --method gkd --set teacher=same --data rows.jsonl", "in memory"),
    ("m --calibrate clients", "only a run"),
    ("m --clients 2", "--calibrate clients"),
    ("m --method gkd --set teacher=same", "needs rows"),
    ("m --method gkd --set teacher=same --text text.txt", "not on plain text"),
    ("m --method gkd --set teacher=same --data rows.jsonl", "learn from itself"),
    ("m --method gkd --set teacher=bert --data rows.jsonl", "encoder"),
    ("m --method gkd --set teacher=./nobody --data rows.jsonl", "nobody"),
    ("m --method gkd --set teacher=same --set keep_layers=2 --data rows.jsonl", "2 of 2 blocks"),
]


@pytest.mark.parametrize(("name", "values", "word"), SETTINGS)
def test_settings_that_make_no_sense_are_refused(name: str, values: dict[str, Any], word: str) -> None:
    with pytest.raises(RecipeError, match=word.replace("(", r"\(")):
        compression.make(name, values)


@pytest.mark.parametrize(("values", "sizes", "word"), MODELS)
def test_models_that_cannot_be_pruned_are_refused(values: dict, sizes: dict, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        pruner(**values).check(prunable(**sizes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("m", models.tiny_llama()), ("bert", models.tiny_bert())):
        models.save(model.net, model.tokenizer, folder / name)
    return folder


@pytest.mark.parametrize(("line", "word"), REQUESTS)
def test_requests_that_make_no_sense_are_refused_before_a_folder_is_made(
    line: str, word: str, saved: Path, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("short.txt", "short.bin"):
        (at / name).write_text("A.")
    for name in ("m", "bert"):
        (at / name).symlink_to(saved / name)
    assert main(["compress", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert word in err
    assert "Traceback" not in err
    assert out == ""
    assert not (at / "runs").exists()
