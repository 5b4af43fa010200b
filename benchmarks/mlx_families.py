# SPDX-License-Identifier: Apache-2.0
"""Run a tiny compressed model of every family in mlx-lm, from `--to mlx`, beside transformers.

    pip install mlx mlx-lm              on Linux also mlx-cpu
    python -m benchmarks.mlx_families [CASE ...] [--facts tests/deploy/mlx_families.json]

A model is random, its weights rounded to fp16, and compressed by rtn to 4 bits in groups of 32 on the grids ggml and
asymmetric.  What counts is the mean Kullback-Leibler divergence, in nats, of mlx-lm's next tokens from those of transformers
with the same compressed model:

    fp32     with mlx-lm's weights and activations in fp32, the whole text at once
    cached   the same, as in generation: a first part, then token by token with mlx-lm's cache
    16 bits  as mlx-lm loads what was written: the grid ggml, in fp16

The first two must be at most `SAME`.  Those of a family whose GELU is the other one in mlx-lm, whose embedding it scales by a
number in bf16, or whose ramp of YaRN it rounds, may reach `NEAR`.

`--facts` writes, for the first case of each family, the fields of config.json that mlx-lm reads, and the tensors of its model:
what the test suite holds an export against where mlx-lm is not installed.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import fleetune
from benchmarks.tiny_families import build
from fleetune import models
from fleetune.models import tiny_tokenizer

SAME: Final = 1e-10  # nats
NEAR: Final = 1e-5
READ: Final = 40  # tokens of the text that are read at once; the others come one by one
TEXT: Final = [int(token) for token in np.random.default_rng(5).integers(0, 256, 64)]
LEFT_OUT: Final = "e_score_correction_bias"  # mlx-lm has none in ERNIE 4.5's mixtures: an export with another than 0 is refused
GRIDS: Final = ("ggml", "asymmetric")


def _rope(**more: Any) -> dict[str, Any]:
    """Return rotary settings whose base is no library's default."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0, **more}}


def _rope_of_windows(**more: Any) -> dict[str, Any]:
    both = {"full_attention": 3000.0, "sliding_attention": 700.0}
    found = {kind: _rope(rope_theta=theta)["rope_parameters"] for kind, theta in both.items()}
    found["full_attention"] |= more
    return {"rope_parameters": found}


_SIZES: Final[dict[str, Any]] = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 6,
    "max_position_embeddings": 128,
}  # fmt: skip
_PLAIN: Final = _SIZES | _rope()
_GROUPED: Final = _PLAIN | {"num_key_value_heads": 2, "head_dim": 16}
_WIDE: Final = _GROUPED | {"head_dim": 32}  # heads that are wider together than the model
_OLD: Final = {"n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 128}
_PARTLY: Final = _GROUPED | _rope(partial_rotary_factor=0.5)
_LLAMA3: Final = _rope(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)  # fmt: skip
_YARN: Final = _rope(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=32.0, beta_slow=1.0, truncate=True
)  # fmt: skip
_PUBLISHED_YARN: Final = _rope(  # gpt-oss-20b's
    rope_type="yarn", rope_theta=150000.0, factor=32.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0,
    truncate=False,
)  # fmt: skip
_LINEAR: Final = _rope(rope_type="linear", factor=3.0)
_BIASES: Final = {"attention_bias": True, "mlp_bias": True}
_LONG: Final = {"sliding_window": 100}  # longer than the text
_SHORT: Final = {"sliding_window": 16}
_SCALES: Final = {
    "attention_multiplier": 0.2, "residual_multiplier": 0.6, "embedding_multiplier": 3.0, "logits_scaling": 0.7,
}  # fmt: skip
_GEMMA: Final = _WIDE | {"query_pre_attn_scalar": 24}
_GEMMA3: Final = _GEMMA | _SHORT | {"num_hidden_layers": 7} | _rope_of_windows()
_GEMMA3_64: Final = _GEMMA3 | {"hidden_size": 64, "num_attention_heads": 4}  # the root of 64 is exact in bf16
_EXPERTS: Final = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
_LOCAL: Final = {"num_local_experts": 5, "num_experts_per_tok": 3}
_ERNIE: Final = {"moe_num_experts": 5, "moe_k": 3, "moe_intermediate_size": 64}
_OSS: Final = _WIDE | _LOCAL | _SHORT
_LFM2: Final = {k: v for k, v in _GROUPED.items() if k != "head_dim"} | {
    "intermediate_size": 230, "block_multiple_of": 32, "layer_types": ["conv", "full_attention", "conv", "conv"],
}  # fmt: skip


class Case(NamedTuple):
    """A family and fields of its configuration; `most` is the bound."""

    family: str
    changes: dict[str, Any]
    most: float = SAME


CASES: Final[dict[str, Case]] = {
    "llama": Case("llama", _WIDE),
    "llama, biases, tied": Case("llama", _GROUPED | _BIASES | {"tie_word_embeddings": True}),
    "llama, llama3": Case("llama", _GROUPED | _LLAMA3),
    "llama, linear": Case("llama", _GROUPED | _LINEAR),
    "mistral": Case("mistral", _WIDE | _LONG),
    "mistral, no window, tied": Case("mistral", _WIDE | {"sliding_window": None, "tie_word_embeddings": True}),
    "mistral, llama3": Case("mistral", _WIDE | {"sliding_window": None} | _LLAMA3),
    "qwen2": Case("qwen2", _GROUPED),
    "qwen2, llama3": Case("qwen2", _GROUPED | _LLAMA3),
    "qwen3": Case("qwen3", _WIDE | {"tie_word_embeddings": True}),
    "qwen3, linear": Case("qwen3", _WIDE | _LINEAR),
    "gemma": Case("gemma", _WIDE, NEAR),
    "gemma2": Case("gemma2", _GEMMA | _LONG | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3_text": Case("gemma3_text", _GEMMA3, NEAR),
    "gemma3_text, exact scale": Case("gemma3_text", _GEMMA3_64),
    "gemma3_text, linear, own head": Case(
        "gemma3_text", _GEMMA3_64 | {"tie_word_embeddings": False} | _rope_of_windows(rope_type="linear", factor=8.0)
    ),
    "phi": Case("phi", _PARTLY),
    "phi3": Case("phi3", _GROUPED | _LONG),
    "phi3, in part, tied": Case("phi3", _PARTLY | {"sliding_window": None, "tie_word_embeddings": True}),
    "gpt_neox": Case("gpt_neox", _PLAIN | {"intermediate_size": 384} | _rope(partial_rotary_factor=0.5), NEAR),
    "gpt_neox, in turn, tanh": Case(
        "gpt_neox",
        _PLAIN | {"intermediate_size": 384, "use_parallel_residual": False, "hidden_act": "gelu_fast"},
    ),
    "gptj": Case("gptj", _OLD | {"rotary_dim": 8}),
    "stablelm": Case("stablelm", _PARTLY),
    "stablelm, parallel, norms": Case(
        "stablelm", _PARTLY | {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True}
    ),
    "olmo2": Case("olmo2", _GROUPED),
    "olmo2, llama3, biases, tied": Case(
        "olmo2", _GROUPED | _LLAMA3 | {"attention_bias": True, "tie_word_embeddings": True}
    ),
    "granite": Case("granite", _GROUPED | _SCALES),
    "granite, llama3, biases, tied": Case("granite", _GROUPED | _SCALES | _LLAMA3 | _BIASES | {"tie_word_embeddings": True}),
    "smollm3": Case("smollm3", _GROUPED | {"no_rope_layers": [1, 0, 1, 1]}),
    "smollm3, linear, biases": Case("smollm3", _GROUPED | _LINEAR | _BIASES | {"tie_word_embeddings": False}),
    "starcoder2": Case("starcoder2", _GROUPED | _LONG, NEAR),
    "starcoder2, exact, own head": Case(
        "starcoder2", _GROUPED | {"sliding_window": None, "hidden_act": "gelu", "tie_word_embeddings": False}
    ),
    "exaone4": Case("exaone4", _GROUPED | {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "exaone4, windows, llama3": Case(
        "exaone4", _WIDE | _SHORT | _LLAMA3 | {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
                                               "num_hidden_layers": 6},
    ),
    "seed_oss": Case("seed_oss", _WIDE),
    "seed_oss, llama3, out, tied": Case(
        "seed_oss",
        _WIDE | _LLAMA3
        | {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "hunyuan_v1_dense": Case("hunyuan_v1_dense", _WIDE),
    "hunyuan_v1_dense, alpha, biases": Case(
        "hunyuan_v1_dense", _WIDE | {"attention_bias": True} | _rope(rope_type="dynamic", alpha=50.0, factor=1.0)
    ),
    "gpt_bigcode": Case("gpt_bigcode", _OLD | {"n_inner": None}, NEAR),
    "gpt_bigcode, exact, own head": Case(
        "gpt_bigcode", _OLD | {"n_inner": 160, "activation_function": "gelu", "tie_word_embeddings": False}
    ),
    "glm, whole heads": Case("glm", _GROUPED | _rope(partial_rotary_factor=1.0)),
    "lfm2": Case("lfm2", _LFM2),
    "cohere": Case("cohere", _GROUPED | {"logit_scale": 0.5}),
    "cohere, norms, biases": Case("cohere", _GROUPED | {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5}),
    "cohere2": Case("cohere2", _GROUPED | _SHORT | {"num_hidden_layers": 6, "logit_scale": 0.5}),
    "glm4": Case("glm4", _WIDE | _rope(partial_rotary_factor=0.5)),
    "glm4, no biases": Case("glm4", _PARTLY | {"attention_bias": False}),
    "ernie4_5": Case("ernie4_5", _WIDE),
    "ernie4_5, biases, own head": Case("ernie4_5", _GROUPED | {"use_bias": True, "tie_word_embeddings": False}),
    "nemotron": Case("nemotron", _GROUPED | _rope(partial_rotary_factor=0.5)),
    "nemotron, whole heads, biases, tied": Case(
        "nemotron", _WIDE | _BIASES | _rope(partial_rotary_factor=1.0) | {"tie_word_embeddings": True}
    ),
    "mamba": Case(
        "mamba", {"hidden_size": 96, "num_hidden_layers": 3, "state_size": 4, "time_step_rank": 32, "intermediate_size": 192}
    ),
    "mixtral": Case("mixtral", _GROUPED | _LOCAL | _LONG),
    "mixtral, no window, tied": Case("mixtral", _GROUPED | _LOCAL | {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2_moe": Case("qwen2_moe", _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 128}),
    "qwen3_moe": Case("qwen3_moe", _WIDE | _EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe, not in all blocks, tied": Case(
        "qwen3_moe",
        _WIDE | _EXPERTS | {"decoder_sparse_step": 2, "mlp_only_layers": [3], "tie_word_embeddings": True},
    ),
    "olmoe": Case("olmoe", _PLAIN | _EXPERTS),
    "olmoe, llama3, norm, biases, tied": Case(
        "olmoe",
        _GROUPED | _EXPERTS | _LLAMA3 | {"norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "granitemoe": Case("granitemoe", _GROUPED | _SCALES | _LOCAL),
    "granitemoe, llama3, biases, tied": Case(
        "granitemoe", _GROUPED | _SCALES | _LOCAL | _LLAMA3 | {"attention_bias": True, "tie_word_embeddings": True}
    ),
    "granitemoeshared": Case("granitemoeshared", _GROUPED | _SCALES | _LOCAL | {"shared_intermediate_size": 128}),
    "granitemoeshared, none, tied": Case(
        "granitemoeshared",
        _GROUPED | _SCALES | _LOCAL | {"shared_intermediate_size": 0, "tie_word_embeddings": True},
    ),
    "ernie4_5_moe": Case("ernie4_5_moe", _WIDE | _ERNIE),
    "ernie4_5_moe, none shared, own head": Case(
        "ernie4_5_moe",
        _GROUPED | _ERNIE
        | {"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_num_shared_experts": 0, "tie_word_embeddings": False},
    ),
    "gpt_oss": Case("gpt_oss", _OSS),
    "gpt_oss, yarn": Case("gpt_oss", _OSS | _YARN),
    "gpt_oss, yarn as published": Case("gpt_oss", _OSS | {"head_dim": 64} | _PUBLISHED_YARN, NEAR),
}  # fmt: skip


def compressed(case: str, folder: Path, grid: str) -> tuple[Path, Path]:
    """Compress a case's model; return the folder for MLX, and that of the same weights in fp32 for transformers."""
    # copied, since transformers completes the rotary settings that it is given
    net = build(CASES[case].family, **copy.deepcopy(CASES[case].changes))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.zeros_like(parameter) if name.endswith(LEFT_OUT) else parameter.half())
    models.save(net, tiny_tokenizer(), folder / "model")
    run = fleetune.compress(
        folder / "model", method="rtn", settings={"grid": grid, "group": 32}, out=folder / "runs"
    )
    paths = [fleetune.export(run, to=to, path=folder / to).path for to in ("mlx", "hf")]
    return paths[0], paths[1]


@torch.inference_mode()
def expected(folder: Path) -> Tensor:
    """Return transformers' logarithms of the next tokens' probabilities: fp64 [length of the text, vocabulary]."""
    net = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found: Tensor = net(input_ids=torch.tensor([TEXT])).logits[0].double().log_softmax(-1)
    return found


def divergences(folder: Path, own: Tensor) -> dict[str, float]:
    """Return the divergences of what mlx-lm makes of a folder from `own`."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    def divergence(logits: Any) -> float:
        theirs = torch.from_numpy(np.array(logits.astype(mx.float32))[0]).double().log_softmax(-1)
        return float((own.exp() * (own - theirs)).sum(-1).mean())

    net, _ = load_model(folder)
    found = dict[str, float]()
    found["16 bits"] = divergence(net(mx.array([TEXT])))
    net.set_dtype(mx.float32)
    found["fp32"] = divergence(net(mx.array([TEXT])))
    cache = make_prompt_cache(net)
    parts = [TEXT[:READ], *([token] for token in TEXT[READ:])]
    found["cached"] = divergence(
        mx.concatenate([net(mx.array([part]), cache=cache) for part in parts], axis=1)
    )
    return found


def facts(case: str) -> dict[str, Any]:
    """Return what mlx-lm reads of a case's config.json, which fields it looks for in vain, and its tensors.

    A tensor of a block stands once, with N for the block's number.
    """
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes, load_model

    with tempfile.TemporaryDirectory() as folder:
        path, _ = compressed(case, Path(folder), "ggml")
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        asked = inspect.signature(_get_classes(config)[1]).parameters
        names = {block_free(name) for name, _ in tree_flatten(load_model(path)[0].parameters())}
    return {
        "read": {name: config[name] for name in asked if name in config},
        "missing": [name for name in asked if name not in config],
        "tensors": sorted(names),
    }


def block_free(name: str) -> str:
    """Return a tensor's name with N for each number in it."""
    return re.sub(r"\.\d+\.", ".N.", name)


def first_cases() -> dict[str, str]:
    """Return family -> its first case."""
    return {
        family: next(c for c, case in CASES.items() if case.family == family)
        for family in dict.fromkeys(case.family for case in CASES.values())
    }


def row(case: str) -> dict[str, float]:
    """Return the divergences of a case: the largest over the grids in fp32, that of the grid ggml in 16 bits."""
    found: dict[str, float] = {}
    for grid in GRIDS:
        with tempfile.TemporaryDirectory() as folder:
            mlx, plain = compressed(case, Path(folder), grid)
            for name, value in divergences(mlx, expected(plain)).items():
                if name != "16 bits" or grid == "ggml":
                    found[name] = max(found.get(name, 0.0), value)
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the divergences as a table."""
    lines = ["| case | fp32 | cached | 16 bits |", "|---|---|---|---|"]
    for case, found in rows.items():
        cells = (f"{found[name]:.0e}" for name in ("fp32", "cached", "16 bits"))
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the cases, or some of them; 1 when one is beyond its bound."""
    parser = argparse.ArgumentParser("benchmarks.mlx_families", description="Every family in mlx-lm.")
    parser.add_argument("cases", nargs="*", metavar="CASE", default=list(CASES))
    parser.add_argument("--facts", type=Path, metavar="FILE", help="write what mlx-lm reads, and run nothing")
    options = parser.parse_args()
    logging.disable_progress_bar()
    if options.facts:
        found = {family: facts(case) for family, case in first_cases().items()}
        lines = (
            f"{json.dumps(family)}: {json.dumps(what, sort_keys=True)}" for family, what in found.items()
        )
        options.facts.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
        return 0
    rows: dict[str, dict[str, float]] = {}
    for case in options.cases:
        rows[case] = row(case)
        print(f"{case:36}", *(f"{name} {value:.1e}" for name, value in rows[case].items()), file=sys.stderr)
    beyond = [c for c, found in rows.items() if not max(found["fp32"], found["cached"]) <= CASES[c].most]
    print(table(rows))
    for case in beyond:
        print(f"{case} is beyond {CASES[case].most}")
    return int(bool(beyond))


if __name__ == "__main__":
    sys.exit(main())
