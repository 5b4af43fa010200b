# SPDX-License-Identifier: Apache-2.0
"""Pruned llamas, whose blocks differ in width: written as deci and read back, and what is none is refused."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import gguf as package
import numpy as np
import pytest
import torch
from deploy_harness import LLAMA3, compressed, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune import models
from fleetune.deploy.export import write as export
from fleetune.errors import ModelError
from fleetune.models import Model
from fleetune.models.families import widths
from fleetune.models.families.widths import KeptUnits

pytestmark = pytest.mark.usefixtures("own_cache")

IDS: Final = torch.tensor([[260, 12, 200, 7, 256, 258, 31, 90, 261]])


def logits(net: Any) -> torch.Tensor:
    """Of a few tokens."""
    with torch.no_grad():
        found: torch.Tensor = net(IDS).logits
    return found


def narrowed(found: list[tuple[int, int]], ratio: int = 2, whole: int = 2, **sizes: Any) -> Model:
    """A llama whose blocks have these numbers of key heads and MLP channels, taken from all over."""
    model = tiny(
        num_hidden_layers=len(found), num_attention_heads=ratio * whole, num_key_value_heads=whole, **sizes
    )
    rng = np.random.default_rng(len(found))

    def some(all_of: int, count: int) -> list[int]:
        return sorted(rng.choice(all_of, count, replace=False).tolist())

    widths.cut(
        model.net,
        [KeptUnits(some(whole, heads), some(model.net.config.intermediate_size, c)) for heads, c in found],
    )
    return model


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


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            {"attention.head_count": [4, 0, 4], "attention.head_count_kv": [2, 0, 2]},
            "block 1 has 0 query heads",
        ),
        ({"feed_forward_length": [128, 0, 32]}, "block 1 .* MLP of 0 channels"),
        ({"attention.head_count_kv": [2, 2, 2]}, "block 1 has 2 query heads, 2 key heads"),
        ({"attention.value_length": [32]}, r"16 wide, and attention.value_length is 32"),
    ],
)
def test_what_is_no_narrower_llama_is_refused_up_front(said: dict[str, list[int]], why: str) -> None:
    with exported(narrowed([(2, 128), (1, 96), (2, 32)]), "gguf:f32") as (path, _):
        reader = package.GGUFReader(path, "r+")
        for key, numbers in said.items():
            field = reader.fields[f"deci.{key}"]
            for part, number in zip(field.data, numbers, strict=True):
                field.parts[part][0] = number
        reader.data.flush()
        for use in (models.load_config, models.load):
            with pytest.raises(ModelError, match=f"is no llama with narrower blocks: .*{why}") as caught:
                use(str(path))
            assert f"fleetune serve {path}" in str(caught.value.hint)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_llama_of_different_widths_is_a_deci(quantised: bool, tmp_path: Path) -> None:
    model = narrowed([(2, 128), (1, 96)])
    if quantised:
        compressed(model, tmp_path / "m")
    else:
        models.save(model.net, model.tokenizer, tmp_path / "m")
    report = export(tmp_path / "m", "gguf" if quantised else "gguf:f32", tmp_path / "m.gguf")
    assert report.exact == report.tensors or quantised
    reader = package.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [4, 2]
    assert fields["deci.attention.head_count_kv"] == [2, 1]
    assert fields["deci.feed_forward_length"] == [128, 96]
    assert fields["deci.attention.key_length"] == fields["deci.attention.value_length"] == 16
    assert fields["deci.rope.dimension_count"] == 16
    assert fields["deci.block_count"] == 2
    found = {t.name: t for t in reader.tensors}
    assert {
        n: tuple(map(int, found[n].shape))
        for n in (
            "blk.0.attn_q.weight",
            "blk.1.attn_q.weight",
            "blk.1.attn_k.weight",
            "blk.1.attn_output.weight",
            "blk.1.ffn_down.weight",
        )
    } == {
        "blk.0.attn_q.weight": (64, 64),
        "blk.1.attn_q.weight": (64, 32),
        "blk.1.attn_k.weight": (64, 16),
        "blk.1.attn_output.weight": (32, 64),
        "blk.1.ffn_down.weight": (96, 64),
    }
