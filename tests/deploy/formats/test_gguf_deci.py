# SPDX-License-Identifier: Apache-2.0
"""Pruned llamas, whose blocks differ in width: written as deci and read back, files by other hands, refusals elsewhere."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import gguf as package
import numpy as np
import pytest
import torch
from deploy_harness import LLAMA3, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune import models
from fleetune.deploy.export import write as export
from fleetune.errors import ModelError
from fleetune.models import Model
from fleetune.models.families import widths
from fleetune.models.families.widths import KeptUnits, Width

IDS: Final = torch.tensor([[260, 12, 200, 7, 256, 258, 31, 90, 261]])
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
FOUND: Final = [Width(4, 2, 128), Width(2, 1, 96), Width(4, 2, 32)]


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


def pruned() -> Model:
    """With the widths of FOUND."""
    return narrowed([(w.num_key_value_heads, w.intermediate_size) for w in FOUND])


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp rotates them: 2 i and 2 i + 1 of a head are the model's i and i + d / 2."""
    out, d = np.empty_like(weight), len(weight) // heads
    for h in range(heads):
        for i in range(d // 2):
            out[h * d + 2 * i], out[h * d + 2 * i + 1] = weight[h * d + i], weight[h * d + d // 2 + i]
    return out


def foreign(
    path: Path, model: Model, found: list[Width], said: Mapping[str, Any] = NOTHING, arch: str = "deci"
) -> Path:
    """A file as llama.cpp's converter writes it, by hand; `said` replaces metadata, None leaves a key out."""
    heads, key_heads, channels = (list(numbers) for numbers in zip(*found, strict=True))
    keys = {
        "block_count": len(found),
        "context_length": 1024,
        "embedding_length": model.net.config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": key_heads,
        "feed_forward_length": channels,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
        "vocab_size": 264,
    }
    writer = package.GGUFWriter(path, arch)
    for key, value in {**keys, **said}.items():
        if value is not None:
            add = {
                int: writer.add_int32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }
            add[type(value)](f"{arch}.{key}", value)
    _add_words(writer, model)
    for name, tensor in model.net.named_parameters():
        stored, heads_of = _place(model, name.removesuffix(".weight"))
        values = np.ascontiguousarray(tensor.numpy())
        writer.add_tensor(stored, interleaved(values, heads_of) if heads_of else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_words(writer: Any, model: Model) -> None:
    words = model.tokenizer.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*sorted(words, key=words.__getitem__), "[a]", "[b]"])
    writer.add_token_types([1] * 259 + [3] * 3 + [5] * 2)
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(260)
    writer.add_eos_token_id(261)
    writer.add_unk_token_id(259)


def _place(model: Model, name: str) -> tuple[str, int]:
    """A parameter's name in the file, and the heads in which its rows are interleaved (0: they are not)."""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if name in ends:
        return f"{ends[name]}.weight", 0
    blocks = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    _, _, i, rest = name.split(".", 3)
    own = model.net.model.layers[int(i)].self_attn
    rotated = {"self_attn.q_proj": own.q_proj, "self_attn.k_proj": own.k_proj}
    heads = rotated[rest].out_features // own.head_dim if rest in rotated else 0
    return f"blk.{i}.{blocks[rest]}.weight", heads


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


# ---------------------------------------------------------------- commands


HEADS: Final = "attention.head_count"
KEYS: Final = "attention.head_count_kv"
CHANNELS: Final = "feed_forward_length"


def test_a_file_of_others_is_read_by_its_lists(tmp_path: Path) -> None:
    model = pruned()
    back = models.load(str(foreign(tmp_path / "m.gguf", model, FOUND)), device="cpu")
    assert widths.block_widths(back.net.config) == FOUND
    assert torch.equal(logits(back.net), logits(model.net))
    assert back.tokenizer("hello 12").input_ids == model.tokenizer("hello 12").input_ids
    written = json.loads((back.path / "config.json").read_bytes())
    assert (written["model_type"], written["num_attention_heads"], written["num_key_value_heads"]) == (
        "fleetune_llama",
        4,
        2,
    )


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({HEADS: [4, 0, 4], KEYS: [2, 0, 2]}, "block 1 has 0 query heads"),
        ({CHANNELS: [128, 0, 32]}, "block 1 .* MLP of 0 channels"),
        ({KEYS: [2, 2, 2]}, "block 1 has 2 query heads, 2 key heads"),
        ({"attention.value_length": 32}, r"16 wide, and attention.value_length is 32"),
    ],
)
def test_what_is_no_narrower_llama_is_refused_up_front(
    tmp_path: Path, said: dict[str, Any], why: str
) -> None:
    path = foreign(tmp_path / "m.gguf", pruned(), FOUND, said)
    for use in (models.load_config, models.load):
        with pytest.raises(ModelError, match=rf"m.gguf is no llama with narrower blocks: .*{why}") as caught:
            use(str(path))
        assert f"fleetune serve {path}" in str(caught.value.hint)
