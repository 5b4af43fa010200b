# SPDX-License-Identifier: Apache-2.0
"""Every family that has a place in MLX: what config.json and the tensors' names say, refusals, and mlx-lm where it is.

`mlx_families.json` holds what mlx-lm 0.32 reads and has: `python -m benchmarks.mlx_families --facts` writes it.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no package of the wheel

from benchmarks import mlx_families as bench  # noqa: E402
from benchmarks.tiny_families import DECODERS  # noqa: E402

from fleetune.deploy.formats import _mlx_families as families  # noqa: E402
from fleetune.deploy.formats import mlx  # noqa: E402
from fleetune.models.artefact import Quantised  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
FACTS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "mlx_families.json").read_text())
FIRST = bench.first_cases()


def config(family: str, **changes: Any) -> Any:
    """The configuration of a family's first case, with changes."""
    sizes = DECODERS[family] | (bench.CASES[FIRST[family]].changes if family in FIRST else {})
    return AutoConfig.for_model(family, **copy.deepcopy(sizes | changes))  # it writes into what it is given


def test_every_family_of_the_table_has_cases_and_facts() -> None:
    assert list(FACTS) == list(FIRST)
    assert set(FACTS) == set(mlx.ARCHITECTURES)
    assert set(mlx.ARCHITECTURES) <= set(DECODERS)  # the families of docs/models.md


@pytest.mark.parametrize("family", FACTS)
def test_what_mlx_lm_reads_of_a_family(family: str, tmp_path: Path) -> None:
    path, _ = bench.compressed(FIRST[family], tmp_path, "ggml")
    said = json.loads((path / "config.json").read_text())
    facts = FACTS[family]
    assert {name: said.get(name, "missing") for name in facts["read"]} == facts["read"]
    assert [name for name in facts["missing"] if name in said] == []
    AutoTokenizer.from_pretrained(path)  # as mlx-lm reads it, which has transformers check config.json
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert sorted({bench.block_free(name) for name in file.keys()}) == facts["tensors"]  # noqa: SIM118


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("opt", {}, "'opt': it is written for llama, mistral,"),
        ("falcon", {}, "'falcon': it is written for"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' in a llama"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window=True in a qwen2"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True in a qwen3"),
        ("qwen2", {"num_attention_heads": 4}, "a qwen2 whose heads are 64 wide together where the model is 96"),
        ("llama", bench._rope(rope_type="yarn", factor=2.0), "rotary scaling 'yarn' in a llama"),
        ("starcoder2", bench._LINEAR, "rotary scaling 'linear' in a starcoder2"),
        ("glm", bench._rope(partial_rotary_factor=0.5), "partly rotated heads in a glm"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping=None in a gemma2"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 in a gemma3_text"),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"] + ["full_attention"] * 5},
         "layer_types without a regular place for full_attention in a gemma3_text"),
        ("cohere2", {"layer_types": ["sliding_attention"] * 6}, "layer_types without a regular place"),
        ("cohere", {"tie_word_embeddings": False}, "tie_word_embeddings=False in a cohere"),
        ("exaone4", {"sliding_window": 16}, "sliding_window=16 with blocks of full_attention in an exaone4"),
        ("hunyuan_v1_dense", bench._rope(rope_type="dynamic", factor=2.0), "'dynamic' without alpha"),
        ("gpt_neox", {"intermediate_size": 160}, "an MLP of 160, not 384, in a gpt_neox"),
        ("gptj", {"n_inner": 160}, "an MLP of 160, not 384, in a gptj"),
        ("gpt_bigcode", {"multi_query": False}, "multi_query=False in a gpt_bigcode"),
        ("lfm2", {"layer_types": ["conv"] * 4}, "layer_types without full_attention in a lfm2"),
        ("mamba", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 in a mamba"),
        ("mixtral", {"head_dim": 32}, "a mixtral whose heads are 192 wide together where the model is 96"),
        ("mixtral", bench._LINEAR, "rotary scaling 'linear' in a mixtral"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob=True in a qwen2_moe"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 in a qwen2_moe"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=[1] in a qwen2_moe"),
        ("qwen2_moe", {"qkv_bias": False}, "qkv_bias=False in a qwen2_moe"),
        ("qwen2_moe", {"tie_word_embeddings": True}, "tie_word_embeddings=True in a qwen2_moe"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias=True in a qwen3_moe"),
        ("qwen3_moe", bench._LLAMA3, "rotary scaling 'llama3' in a qwen3_moe"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 in a olmoe"),
        ("granitemoe", {"hidden_act": "gelu"}, "hidden_act='gelu' in a granitemoe"),
        ("granitemoeshared", bench._LINEAR, "rotary scaling 'linear' in a granitemoeshared"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias=True in a ernie4_5_moe"),
        ("ernie4_5_moe", {"moe_norm_min": 1e-6}, "moe_norm_min=1e-06 in a ernie4_5_moe"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 4}, "layer_types without sliding_attention in a gpt_oss"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit=5.0 in a gpt_oss"),
        ("gpt_oss", bench._YARN | bench._rope(**bench._YARN["rope_parameters"] | {"beta_fast": 8.0}),
         "rotary scaling 'yarn' with beta_fast=8.0"),
    ],
)  # fmt: skip
def test_what_a_family_has_no_place_for(family: str, changes: dict[str, Any], why: str) -> None:
    assert families.misfit(config(family)) is None or family not in FACTS
    assert why in str(families.misfit(config(family, **changes)))


@pytest.mark.parametrize(
    ("family", "changes", "field", "value"),
    [
        (
            "ernie4_5_moe",
            {"moe_layer_end_index": -1},
            "moe_layer_end_index",
            3,
        ),  # as published; to mlx-lm it is no block
        ("qwen3_moe", {"head_dim": None}, "head_dim", 16),
        ("qwen3_moe", {}, "num_experts", 5),
        ("granitemoeshared", {"shared_intermediate_size": 0}, "model_type", "granitemoe"),
    ],
)
def test_what_config_json_states_whatever_a_model_left_out(
    family: str, changes: dict[str, Any], field: str, value: Any
) -> None:
    assert families.fields(config(family, **changes))[field] == value


@pytest.mark.parametrize("case", bench.CASES)
def test_what_is_written_is_not_refused(case: str) -> None:
    family, changes, _ = bench.CASES[case]
    assert families.misfit(config(family, **changes)) is None


@pytest.mark.parametrize(
    ("family", "changes", "notes"),
    [
        ("llama", {}, []),
        ("mistral", {"sliding_window": None}, []),
        (
            "mistral",
            {"sliding_window": 4096},
            ["no window in a mistral: it gives the same up to 4,096 tokens"],
        ),
        ("gemma", {}, ["the GELU of a gemma exactly, transformers as 'gelu_pytorch_tanh'"]),
        ("gpt_neox", {}, ["the GELU of a gpt_neox by tanh, transformers as 'gelu'"]),
        ("gpt_neox", {"hidden_act": "gelu_fast"}, []),
        ("gpt_bigcode", {"activation_function": "gelu"}, []),
        (
            "mixtral",
            {"sliding_window": 4096},
            ["no window in a mixtral: it gives the same up to 4,096 tokens"],
        ),
        ("gpt_oss", bench._YARN, []),
        (
            "gpt_oss",
            bench._rope(**bench._YARN["rope_parameters"] | {"truncate": False}),
            ["mlx-lm rounds the ends of YaRN's ramp to whole frequencies"],
        ),
    ],
)
def test_notes(family: str, changes: dict[str, Any], notes: list[str]) -> None:
    found = list(families.notes(config(family, **changes)))
    assert len(found) == len(notes)
    assert all(part in note for part, note in zip(notes, found, strict=True))


def test_layers_on_other_grids_have_mlx_lm_s_names() -> None:
    import torch

    none = torch.zeros(0)
    grids = {
        f"gpt_neox.layers.{block}.mlp.dense_4h_to_h.weight": Quantised(none, none, none, bits, 32)
        for block, bits in enumerate((4, 4, 8))
    }
    found = mlx.quantization(config("gpt_neox"), grids)
    assert found == {
        "group_size": 32,
        "bits": 4,
        "model.h.2.mlp.dense_4h_to_h": {"group_size": 32, "bits": 8},
    }


@pytest.mark.parametrize("case", FIRST.values())
def test_mlx_lm_gives_transformers_next_tokens(case: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    path, plain = bench.compressed(case, tmp_path, "asymmetric")
    found = bench.divergences(path, bench.expected(plain))
    assert max(found["fp32"], found["cached"]) <= bench.CASES[case].most
