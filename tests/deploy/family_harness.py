"""Tiny random models of every family that has a place in GGUF, and their logits in llama.cpp beside transformers'."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deploy_harness import ENDS, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fleetune import models
from fleetune.deploy import llamacpp
from fleetune.models.families import table

TEXT = [int(token) for token in np.random.default_rng(5).integers(0, 259, 48)]
# no two of the widths are alike, and blocks of 32 divide them all
PLAIN: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4}
PLAIN |= {"num_attention_heads": 6, "max_position_embeddings": 128}
GROUPED = PLAIN | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 32}  # heads that are wider together than the model
OLD: dict[str, Any] = {"n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 128}
WINDOW = {"sliding_window": 64}  # longer than the text
SHORT, LONG = [1.0 + i / 8 for i in range(8)], [2.0 + i / 4 for i in range(8)]
ORIGINAL = {"original_max_position_embeddings": 256}
ROTARY = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG} | ORIGINAL
LONGROPE: dict[str, Any] = {"max_position_embeddings": 1024, **ORIGINAL, "rope_parameters": ROTARY}
HALF = {"partial_rotary_factor": 0.5, "short_factor": SHORT[:4], "long_factor": LONG[:4]}
PARTLY = LONGROPE | {"rope_parameters": ROTARY | HALF}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALES = {"attention_multiplier": 0.2, "residual_multiplier": 0.6}
SCALES |= {"embedding_multiplier": 3.0, "logits_scaling": 0.7}
LONGER = {"rope_type": "yarn", "rope_theta": 3000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
LONGER |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
YARN = {"max_position_embeddings": 4096, "rope_parameters": LONGER}
LFM2 = GROUPED | {"intermediate_size": 230, "block_multiple_of": 32}
LFM2 |= {"layer_types": ["conv", "full_attention", "conv", "conv"]}
# of another width than the block's
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 3}
ERNIE = {"moe_num_experts": 5, "moe_k": 3, "moe_intermediate_size": 64}
OSS = WIDE | LOCAL | {"sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}}
GEMMA = WIDE | {"query_pre_attn_scalar": 32, "sliding_window": 16}

# a name: the model type and what its configuration has
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE),
    "llama, biases": (
        "llama",
        GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, llama3": ("llama", GROUPED | {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", WIDE | WINDOW),
    "mistral, no window": ("mistral", GROUPED | {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", WIDE),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3_text": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    "smollm3": ("smollm3", GROUPED),
    "phi3": ("phi3", GROUPED | WINDOW),
    "phi3, longrope": ("phi3", GROUPED | LONGROPE),
    "phi3, longrope in part": ("phi3", GROUPED | {"tie_word_embeddings": True, **PARTLY}),
    "phi": ("phi", GROUPED | {"partial_rotary_factor": 0.5}),
    "olmo2": ("olmo2", GROUPED),
    "granite": ("granite", GROUPED | SCALES),
    "gpt2": ("gpt2", OLD | {"n_inner": 160}),
    "glm4": ("glm4", WIDE),
    "ernie4_5": ("ernie4_5", WIDE),
    "lfm2": ("lfm2", LFM2),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", WIDE),
    "mixtral": ("mixtral", WIDE | LOCAL | WINDOW),
    "qwen3_moe": ("qwen3_moe", WIDE | EXPERTS | {"norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", GROUPED | EXPERTS | {"shared_expert_intermediate_size": 128}),
    "olmoe": ("olmoe", PLAIN | EXPERTS),
    "granitemoe": ("granitemoe", GROUPED | SCALES | LOCAL),
    "granitemoeshared": ("granitemoeshared", GROUPED | SCALES | LOCAL | {"shared_intermediate_size": 128}),
    "granitemoeshared, none": ("granitemoeshared", GROUPED | SCALES | LOCAL),
    "gpt_oss": ("gpt_oss", OSS),
    "gpt_oss, yarn": ("gpt_oss", OSS | YARN),
    "ernie4_5_moe": ("ernie4_5_moe", WIDE | ERNIE),
    "ernie4_5_moe, none shared": (
        "ernie4_5_moe",
        WIDE | ERNIE | {"moe_layer_start_index": 2, "moe_num_shared_experts": 0},
    ),
}


def config_of(case: str, **changes: Any) -> Any:
    family, sizes = CASES[case]
    config = AutoConfig.for_model(family, **({"vocab_size": 264} | ENDS | sizes | changes))
    if "rope_parameters" not in sizes | changes:
        _set_bases(getattr(config, "rope_parameters", None))
    return config


def build(case: str, **changes: Any) -> PreTrainedModel:
    """The net of a case; every bias and norm is off its start, and logits have a spread of about one."""
    config = config_of(case, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)  # of what is not drawn below
        net: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), dtype=np.float32))
            if tensor.dim() == 1 or "norm" in name:
                tensor.add_((2.0 if name.endswith("sinks") else 0.3) * noise)
            else:
                tensor.copy_(noise * (0.12 if "head" in name or "embed" in name or "wte" in name else 0.13))
    return net.eval().requires_grad_(False)


def _set_bases(rope: dict[str, Any] | None) -> None:
    """Give rotary settings bases that llama.cpp does not take where a file says nothing (10,000)."""
    if rope and "full_attention" in rope:
        rope["full_attention"]["rope_theta"], rope["sliding_attention"]["rope_theta"] = 3000.0, 700.0
    elif rope:
        rope["rope_theta"] = 3000.0


def save(case: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Write a case as a directory, and return its net."""
    net = build(case, **changes)
    models.save(net, tokenizer(), folder)
    return net


class Engine(llamacpp.LlamaCpp):
    """llama.cpp with an adapter in every context where there is one, and for a mixture with attention in fp32.

    A mixture whose attention is rounded to fp16 chooses other experts where two score nearly alike.
    """

    def __init__(self, file: Path, *, lora: Path | None, precise: bool) -> None:
        super().__init__(file, 1)
        self._precise, self._adapters = precise, None
        if lora is not None:
            adapter = self._lib.llama_adapter_lora_init(self._model, str(lora).encode())
            assert adapter != self._ffi.NULL
            self._adapters = self._ffi.new("struct llama_adapter_lora *[]", [adapter])

    def _settings(self, length: int) -> Any:
        settings = super()._settings(length)
        if self._precise:
            settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
            settings.flash_attn_type = 0  # disabled
        return settings

    def open(self, length: int) -> None:
        super().open(length)
        if self._adapters is not None:
            scales = self._ffi.new("float[]", [1.0])
            assert self._lib.llama_set_adapters_lora(self._context, self._adapters, 1, scales) == 0


@torch.inference_mode()
def divergence(
    net: PreTrainedModel, file: Path, ids: Sequence[int] = TEXT, *, lora: Path | None = None
) -> float:
    """The mean Kullback-Leibler divergence, in nats, of llama.cpp's next tokens from transformers'."""
    own = net(input_ids=torch.tensor([list(ids)])).logits[0, :-1].double().log_softmax(-1)
    engine = Engine(file, lora=lora, precise=table.count_experts(net.config) > 0)
    try:
        found = np.concatenate([piece.copy() for piece in engine.scored_logits([(list(ids), 0)])])
    finally:
        engine.close()
    theirs = torch.from_numpy(found).double().log_softmax(-1)
    return float((own.exp() * (own - theirs)).sum(-1).mean())
