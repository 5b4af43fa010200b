# SPDX-License-Identifier: Apache-2.0
"""Every family of the table as .gguf: llama.cpp's next tokens are transformers', and what it does not hold is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from family_harness import CASES, LONGROPE, TEXT, build, divergence, rotated, save

from fleetune import models
from fleetune.deploy.export import export
from fleetune.deploy.measure import llamacpp
from fleetune.errors import FleetuneError, UsageError
from fleetune.models.families import table

needs_engine = pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
SAME = 1e-5  # nats: llama.cpp's cache of keys and values is fp16
SEEN = 30 * SAME  # what one tensor in another order must be off by at least


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in package.GGUFReader(path).fields.items()}


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in CASES.values()} == set(table.FAMILIES)


@needs_engine
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_transformers_does(case: str, tmp_path: Path) -> None:
    net = save(case, tmp_path / "m")
    report = export(tmp_path / "m", "gguf:f32", tmp_path / "x.gguf")
    assert report.exact == report.tensors
    assert divergence(net, report.path) <= SAME


@needs_engine
@pytest.mark.parametrize("case", [case for case in CASES if case == CASES[case][0]])
def test_a_tensor_in_another_order_shows(case: str, tmp_path: Path) -> None:
    """What keeps the test above honest: no tensor of the last block but one can be mixed up without a trace."""
    net = save(case, tmp_path / "m")
    path = export(tmp_path / "m", "gguf:f32", tmp_path / "x.gguf").path
    for tensor in package.GGUFReader(path).tensors:
        if tensor.name.startswith("blk.") and not tensor.name.startswith("blk.1."):
            continue
        changed = tmp_path / "changed.gguf"
        shutil.copy(path, changed)
        values = np.roll(np.array(tensor.data), 1, axis=0)
        with changed.open("r+b") as file:
            file.seek(int(tensor.data_offset))
            file.write(values.tobytes())
        assert divergence(net, changed) > SEEN, tensor.name


@needs_engine
def test_longrope_s_long_factors_are_used_in_a_long_context(tmp_path: Path) -> None:
    net = save("phi3, longrope", tmp_path / "m")
    path = export(tmp_path / "m", "gguf:f32", tmp_path / "x.gguf").path
    assert divergence(net, path, TEXT * 2) <= SAME  # beyond the original length of 64
    assert divergence(net, path, TEXT) <= SAME


# ---------------------------------------------------------------- a window that llama.cpp does not have


@pytest.mark.parametrize("family", ["mistral", "phi3", "starcoder2"])
def test_a_context_ends_where_a_window_would_matter(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / "m")
    report = export(tmp_path / "m", "gguf:f32", tmp_path / "x.gguf")
    architecture = table.FAMILIES[family].architecture
    assert fields(report.path)[f"{architecture}.context_length"] == 64
    assert report.notes == (
        f"llama.cpp has no window in a {family}: the file states a context of 64 tokens instead of 128, up to which it is "
        "the same",
    )
    save(family, tmp_path / "n", sliding_window=200)  # longer than the context
    report = export(tmp_path / "n", "gguf:f32", tmp_path / "y.gguf")
    assert fields(report.path)[f"{architecture}.context_length"] == 128
    assert report.notes == ()


# ---------------------------------------------------------------- refusals

OTHERWISE: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' in a llama"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True in a qwen3"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True in a qwen3"),
    ("smollm3", {"no_rope_layer_interval": 3}, "no_rope_layers other than each 4th"),
    ("smollm3", {"attention_bias": True}, "attention_bias=True in a smollm3"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm=True in a phi"),
    ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings=True in a olmo2"),
    ("granite", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rotary scaling 'linear'"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True in a stablelm"),
    ("starcoder2", {"use_bias": False}, "use_bias=False in a starcoder2"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True in a gpt2"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias=False in a gpt_neox"),
    ("falcon", {"alibi": True}, "alibi=True in a falcon"),
    ("falcon", {"bias": True}, "bias=True in a falcon"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
    ("ernie4_5", {"use_bias": True}, "use_bias=True in a ernie4_5"),
    ("cohere", {"use_qk_norm": True}, "use_qk_norm=True with 4 blocks"),
    ("cohere2", {"layer_types": ["sliding_attention"] * 4}, "layer_types other than each 4th"),
    ("nemotron", {"hidden_act": "silu"}, "hidden_act='silu' in a nemotron"),
    ("lfm2", {"conv_bias": True}, "conv_bias=True in a lfm2"),
    ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partly rotated"),
    ("phi3", {"head_dim": 32}, "heads are 192 wide together where the model is 96"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "changes", "why"), OTHERWISE)
def test_what_llama_cpp_does_not_hold_is_named(
    case: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    save(case, tmp_path / "m", **changes)
    with pytest.raises(UsageError, match=why) as caught:
        export(tmp_path / "m", "gguf", tmp_path / "x.gguf")
    assert "--to hf" in (caught.value.hint or "")
    assert not (tmp_path / "x.gguf").exists()
