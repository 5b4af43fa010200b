# SPDX-License-Identifier: Apache-2.0
"""GGUF files of pruned llamas as models again: every type, every command that takes a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from deci_harness import logits, narrowed
from deploy_harness import LLAMA3, compressed
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleetune import models
from fleetune.deploy.export import write as export
from fleetune.models import Model
from fleetune.models.families import widths


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
            kept = (
                "head_dim",
                "hidden_size",
                "rms_norm_eps",
                "tie_word_embeddings",
                "attention_bias",
                "mlp_bias",
            )
            for name in (*kept, "vocab_size", "model_type", "eos_token_id", "hidden_act"):
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


# ---------------------------------------------------------------- commands
