# SPDX-License-Identifier: Apache-2.0
"""GGUF files of pruned llamas as models again: every type, every command that takes a model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from deci_harness import logits, narrowed
from deploy_harness import LLAMA3, compressed, piece_tokenizer, tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleetune import models
from fleetune.cli.main import main
from fleetune.deploy.export import write as export
from fleetune.models import Model
from fleetune.models.families import widths
from fleetune.models.families.widths import Width
from fleetune.models.net import chat_template


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for what the importer converts."""
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))


@contextmanager
def exported(model: Model, to: str) -> Iterator[tuple[Path, Model]]:
    """The model's GGUF file, written from its directory, and what it loads as."""
    with tempfile.TemporaryDirectory() as folder:
        models.save(model.net, model.tokenizer, Path(folder) / "m")
        path = export(Path(folder) / "m", to, Path(folder) / "m.gguf").path
        yield path, models.load(str(path), device="cpu")


def as_stored(name: str, weight: torch.Tensor, to: str) -> torch.Tensor:
    """A plain weight's values in a file, worked out here: fp32, fp16, or steps of amax / 127 in fp16 to 32 columns."""
    if to == "gguf:f32" or weight.dim() == 1:
        return weight
    if to == "gguf:f16" or weight.shape[1] % 32:
        return weight.half().float()
    blocks = weight.numpy().reshape(-1, 32)
    step = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)
    scaled = (blocks * inverse).astype(np.float64)
    codes = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int8)  # halves away from zero
    return torch.from_numpy(
        (step.astype(np.float16).astype(np.float32) * codes.astype(np.float32)).reshape(weight.shape)
    )


@st.composite
def llamas(draw: st.DrawFn) -> Model:
    """Any small llama, with one to four blocks of any widths."""
    ratio, whole = draw(st.sampled_from([(1, 4), (2, 2), (3, 2), (4, 1), (3, 1)]))
    block = st.tuples(st.integers(1, whole), st.integers(1, 12).map(lambda n: 8 * n))
    return narrowed(
        draw(st.lists(block, min_size=1, max_size=4)),
        ratio,
        whole,
        hidden_size=48 if ratio == 3 else 64,
        intermediate_size=96,
        head_dim=draw(st.sampled_from([6, 16, 32])),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-5, 3e-6])),
        rope_parameters=draw(st.sampled_from([LLAMA3, {"rope_type": "default", "rope_theta": 500000.0}])),
    )


@settings(max_examples=16, deadline=None)
@given(llamas(), st.sampled_from(["gguf:f32", "gguf:f16", "gguf:q8_0"]))
def test_a_pruned_llama_comes_back_from_its_file(model: Model, to: str) -> None:
    with exported(model, to) as (path, back):
        config = models.load_config(str(path))
        for name, tensor in models.named_tensors(model.net):
            tensor.copy_(as_stored(name, tensor, to))
        own = model.net.config
        for read in (config, back.net.config):
            assert widths.block_widths(read) == widths.block_widths(own)
            assert widths.has_block_widths(read) == (
                len(set(widths.block_widths(own))) > 1 or widths.has_block_widths(own)
            )
            for name in (
                "head_dim",
                "hidden_size",
                "vocab_size",
                "rms_norm_eps",
                "max_position_embeddings",
                "tie_word_embeddings",
                "attention_bias",
                "mlp_bias",
                "model_type",
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
                "hidden_act",
            ):
                assert getattr(read, name) == getattr(own, name), name
            assert dict(read.rope_parameters) == dict(own.rope_parameters)
        assert back.digest == models.digest(models.named_tensors(model.net))
        assert torch.equal(logits(back.net), logits(model.net))


@settings(max_examples=5, deadline=None)
@example(narrowed([(2, 128), (1, 96), (2, 32)], head_dim=32), "gguf")
@given(
    st.lists(st.tuples(st.integers(1, 2), st.sampled_from([32, 96, 128])), min_size=2, max_size=3).map(
        lambda found: narrowed([*found, (2, 64)], head_dim=32)
    ),
    st.sampled_from(["gguf", "gguf:q4_0", "gguf:f32"]),
)
def test_codes_come_back_from_a_pruned_llamas_file(model: Model, to: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        compressed(model, Path(folder) / "m")
        report = export(Path(folder) / "m", to, Path(folder) / "m.gguf")
        back = models.load(str(report.path), device="cpu")
    if to != "gguf:f32":  # the embedding is rounded
        assert report.types["Q4_0"] == 7 * model.net.config.num_hidden_layers
        ends = model.net.model.embed_tokens.weight
        ends.copy_(as_stored("", ends, "gguf:q8_0"))
    assert back.digest == models.digest(models.named_tensors(model.net))
    assert torch.equal(logits(back.net), logits(model.net))


@pytest.mark.parametrize("pieces", [False, True])
def test_tokens_and_template_come_back(pieces: bool) -> None:
    """A byte-level tokenizer with an unknown token is read here, one of pieces as always; no unused row is a token."""
    ends: dict[str, Any] = (
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "vocab_size": 288} if pieces else {}
    )
    model = narrowed([(2, 64), (1, 64)], **ends)
    if pieces:
        model.tokenizer = piece_tokenizer()
    with exported(model, "gguf:f32") as (_, back):
        assert len(back.tokenizer) == len(model.tokenizer)
        assert back.tokenizer.chat_template == (model.tokenizer.chat_template or chat_template.TEMPLATES[1])
        for text in ("hello 123 he's\n\n  ll", "<|im_start|>x<|im_end|>", " hello hell"):
            ids = model.tokenizer(text).input_ids
            assert back.tokenizer(text).input_ids == ids
            assert back.tokenizer.decode(ids) == model.tokenizer.decode(ids)
        for mark in ("bos", "eos", "unk"):
            assert getattr(back.tokenizer, f"{mark}_token") == getattr(model.tokenizer, f"{mark}_token")


def test_the_tokenizer_is_that_of_the_same_models_llama_file() -> None:
    """To its digest, so that a ledger's base is known again; the vocabulary has no rows without tokens."""
    digests = set()
    for found in ([(2, 64), (1, 64)], [(1, 64), (1, 64)]):
        with exported(narrowed(found, vocab_size=262), "gguf:f32") as (_, back):
            digests.add(back.tokenizer_digest)
    assert len(digests) == 1


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}, {}])
def test_a_llama_with_biases_comes_back(biases: dict[str, Any]) -> None:
    model = tiny(**biases)
    with exported(model, "gguf:f32") as (path, back):
        assert package.GGUFReader(path).fields["general.architecture"].contents() == "llama"
    assert torch.equal(logits(back.net), logits(model.net))
    assert back.digest == models.digest(models.named_tensors(model.net))


# ---------------------------------------------------------------- commands


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pruned llama's file in the folder that we are in, with a text and rows."""
    monkeypatch.chdir(tmp_path)
    model = narrowed([(2, 128), (1, 96), (2, 32)], head_dim=32)
    models.save(model.net, model.tokenizer, Path("m"))
    Path("text.txt").write_text("The heron stood still in the shallow water. " * 8)
    rows = [{"instruction": f"count to {i}", "response": " ".join(map(str, range(i)))} for i in range(1, 9)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return export(Path("m"), "gguf:f32", Path("m.gguf")).path


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor of a file: type and bytes."""
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in package.GGUFReader(path).tensors}


def test_export_takes_the_file_again_bit_for_bit(file: Path) -> None:
    assert main(["export", "m.gguf", "--to", "hf", "--path", "hf"]) == 0
    assert main(["export", "m.gguf", "--to", "gguf:f32", "--path", "again.gguf"]) == 0
    assert tensors(Path("again.gguf")) == tensors(file)
    own, back = (models.load(folder, device="cpu") for folder in ("./m", "./hf"))
    assert back.digest == own.digest
    assert json.loads(Path("hf/config.json").read_bytes())["model_type"] == "fleetune_llama"


def perplexity(capsys: pytest.CaptureFixture[str], name: str) -> float:
    assert main(["eval", name, "--tasks", "perplexity", "--text", "text.txt", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return float(events[-1]["perplexity"])


@pytest.mark.parametrize("method", ["rtn", "optq"])
def test_what_is_compressed_from_the_file_is_that_of_the_directory(
    file: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert perplexity(capsys, "m.gguf") == perplexity(capsys, "./m")
    few = ["--text", "text.txt", "--length", "64", "--windows", "2"]
    for name, to in (("m.gguf", "a"), ("./m", "b")):
        assert main(["compress", name, "--method", method, "--set", "group=32", *few, "--out", to]) == 0
        made = next(Path(to).iterdir())
        assert main(["export", str(made), "--to", "gguf", "--path", f"{to}.gguf"]) == 0
    assert tensors(Path("a.gguf")) == tensors(Path("b.gguf"))
    assert {kind for kind, _ in tensors(Path("a.gguf")).values()} == {"Q4_0", "Q8_0", "F32"}
    back = models.load("a.gguf", device="cpu")
    assert widths.block_widths(back.net.config)[1] == Width(2, 1, 96)


def test_the_file_teaches_learns_and_is_tuned(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--set={x}" for x in ("teacher=m.gguf", "steps=1", "batch_size=1", "max_new_tokens=2")]
    few = ["--data", "rows.jsonl", "--length", "64"]
    assert main(["compress", "m.gguf", "--method", "gkd", *given, *few]) == 0
    assert widths.block_widths(models.load("runs/0001-gkd-m/model").net.config)[1] == Width(2, 1, 96)
    quick = ["--limit=8", "--held-out=2", "--max-length=64", "--samples=0", "--rounds=1", "--clients=2"]
    tune = ["tune", "m.gguf", "rows.jsonl", "--method=fedkseed", "--set=tau=2", "--set=K=4", *quick]
    assert main(tune) == 0, capsys.readouterr().err
