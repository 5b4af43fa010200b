"""A compressed model beside the dense one, in `compress` and its files, and as `eval` sees it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_harness import LORA, tuned

from command_line import Capture, ok
from command_line import call_json as call
from fleetune import models
from fleetune.data.encode import encode_all
from fleetune.evaluation.losses import text_rows
from fleetune.models import Model
from fleetune.subject import Compressed
from fleetune.tuning.result import finished

RTN = ["--method", "rtn", "--set", "group=8"]
TEXT = ["--eval-text", "text.txt"]
NAMES = ["kl_divergence", "kl_divergence_error", "same_top", "same_top_error", "kl_tokens"]


def expected(dense: Model, model: Model, rows: Any) -> list[float]:
    """KL divergence and same top token from all logits, in float64."""
    kl, same = list[float](), list[bool]()
    for row in rows:
        ids, first = torch.from_numpy(np.asarray(row.ids, np.int64))[None], max(row.n_prompt, 1) - 1
        with torch.inference_mode():
            P, Q = (m.net(input_ids=ids).logits[0, first:-1].double() for m in (dense, model))
        p, q = P.log_softmax(-1), Q.log_softmax(-1)
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        same += (P.argmax(-1) == Q.argmax(-1)).tolist()
    return [np.mean(kl), np.std(kl, ddof=1) / len(kl) ** 0.5, 100 * np.mean(same), len(kl)]


def stated(values: dict[str, float]) -> list[float]:
    return [values[name] for name in NAMES if name != "same_top_error"]


def close(values: dict[str, float], wanted: list[float]) -> None:
    assert stated(values) == pytest.approx(wanted, rel=1e-3)
    assert values["kl_divergence"] > 0


def test_a_compressed_model_is_compared_with_the_dense_one(tiny: str, at: Path, capsys: Capture) -> None:
    code, told, err = call(capsys, "compress", tiny, *RTN, *TEXT)
    assert code == 0, err
    before, after = told[-1]["before"], told[-1]["after"]
    assert list(before) == ["perplexity"]
    assert list(after) == ["perplexity", *NAMES]
    (folder,) = (at / "runs").iterdir()
    dense, texts = models.load(tiny), [(at / "text.txt").read_text()]
    close(after, expected(dense, models.load_artefact(folder / "model"), text_rows(dense, texts)))
    assert json.loads((folder / "compress.json").read_text())["result"]["after"] == after
    assert sorted(p.name for p in folder.iterdir()) == ["compress.json", "model"]
    size = 4 * 264 * after["kl_tokens"] + 128
    assert f"{after['kl_tokens']:,} tokens to compare by: {size / 1000:.0f} kB of logits" in err
    for more in ([], ["--low-memory"]):
        _, again, _ = call(capsys, "compress", tiny, *RTN, *TEXT, *more)
        wanted = pytest.approx(stated(after), rel=1e-3) if more else stated(after)
        assert stated(again[-1]["after"]) == wanted


def test_a_run_is_compared_on_rows_that_calibrated_nothing(tiny: str, at: Path, capsys: Capture) -> None:
    tuned(capsys, tiny, LORA)
    told = ok(capsys, "compress", "1", "--windows", "2", "--length", "16", "--set", "group=8")
    folder = Path(told[-1]["folder"])
    dense = finished.load(at / "runs" / "0001-fedit-tiny", offline=True)
    rows = encode_all(Compressed(folder).held_out(offline=True), dense.tokenizer, 128)[0]
    close(told[-1]["after"], expected(dense, models.load_artefact(folder / "model"), rows))


def other_tokens(at: Path) -> str:
    """A model whose tokenizer gives the tokens other numbers."""
    models.tiny_llama().save(at / "other")
    file = at / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[5:7]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))
    for sums in (at / "other").glob("*SUMS"):
        sums.unlink()
    return str(at / "other")


def test_a_reference_with_other_tokens_is_refused_before_a_model_is_loaded(
    tiny: str, at: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    other = other_tokens(at)
    monkeypatch.setattr(models, "load", no_model)
    code, told, _ = call(capsys, "measure", tiny, "--reference", other, "--text", "text.txt")
    assert code == 2
    assert "have different tokens" in told[-1]["message"]
    assert "the model that it was made from" in told[-1]["hint"]


LOSS = ["rows.jsonl", "--tasks", "loss"]


def test_a_compressed_model_is_measured_in_the_type_named(tiny: str, at: Path, capsys: Capture) -> None:
    assert call(capsys, "compress", tiny, *RTN)[0] == 0
    assert call(capsys, "export", "1", "--to", "hf", "--path", "plain")[0] == 0
    losses = {}
    for dtype in ("fp32", "bf16"):
        for subject in ("1", "runs/0001-rtn-tiny/model", "plain"):
            seen = ok(capsys, "eval", subject, *LOSS, "--dtype", dtype, "--device", "cpu")
            losses[subject, dtype] = seen[-1]["loss"]
        assert losses["1", dtype] == losses["runs/0001-rtn-tiny/model", dtype] == losses["plain", dtype]
    assert losses["1", "fp32"] != losses["1", "bf16"]
