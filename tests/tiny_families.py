"""Tiny random models of many families, made from transformers' configurations in code: nothing is downloaded.

Every model is 32 wide with two layers and our tokenizer of 256 bytes.  Biases, norms and other vectors are moved off
their start (0 or 1), so that one which is used where another should be shows in the outputs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from fleetune import models
from fleetune.models import tiny_tokenizer
from fleetune.models.tiny import tiny_pair_tokenizer

VOCAB: Final = 264
TOKENS: Final = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
_WIDTHS: Final = {"hidden_size": 32, "intermediate_size": 72, "max_position_embeddings": 256}
_PLAIN: Final = _WIDTHS | {"num_hidden_layers": 2, "num_attention_heads": 4}
_UNNAMED: Final = {k: v for k, v in _PLAIN.items() if k != "intermediate_size"}
_GROUPED: Final = _PLAIN | {"num_key_value_heads": 2}
_OLD: Final = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_GEMMA: Final = _GROUPED | {"head_dim": 8}
_RANK: Final = {"time_step_rank": 8, "intermediate_size": 64}
_WINDOW: Final = {"sliding_window": 16, "query_pre_attn_scalar": 8}
_EXPERTS: Final = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_PLAIN_ROTARY: Final = {"rope_type": "default", "rope_theta": 1e4}
_LOCAL: Final = {"num_local_experts": 4, "num_experts_per_tok": 2}

DECODERS: Final[dict[str, dict[str, Any]]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED | {"head_dim": 8, "sliding_window": 16},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "qwen3_moe": _GROUPED | _EXPERTS | {"head_dim": 8},
    "gemma": _GEMMA,
    "gemma2": _GEMMA | _WINDOW,
    "gemma3_text": _GEMMA | _WINDOW,
    "phi": _PLAIN,
    "phi3": _GROUPED,
    "gpt2": _OLD,
    "gpt_neox": _PLAIN,
    "gptj": _OLD | {"rotary_dim": 4},
    "opt": _UNNAMED | {"ffn_dim": 72, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": _UNNAMED | {"ffn_hidden_size": 72},
    "stablelm": _GROUPED,
    "olmo2": _GROUPED,
    "granite": _GROUPED | {"attention_multiplier": 0.35, "residual_multiplier": 0.5},
    "smollm3": _GROUPED | {"no_rope_layer_interval": 2},
    "starcoder2": _GROUPED,
    "exaone4": _GROUPED | {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "seed_oss": _GROUPED | {"head_dim": 8},
    "arcee": _GROUPED,
    "hunyuan_v1_dense": _GROUPED | {"head_dim": 8},
    "gpt_bigcode": _OLD,
    "glm": _GROUPED | {"head_dim": 8},
    "mixtral": _GROUPED | _LOCAL,
    "qwen2_moe": _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 40},
    "olmoe": _PLAIN | _EXPERTS,
    "granitemoe": _GROUPED | _LOCAL,
    "granitemoeshared": _GROUPED | _LOCAL | {"shared_intermediate_size": 40},
    "ernie4_5_moe": _GROUPED | {"head_dim": 8, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    "lfm2": _GROUPED | {"block_multiple_of": 8, "layer_types": ["conv", "full_attention"]},
    "cohere": _GROUPED,
    "cohere2": _GROUPED | {"sliding_window": 16},
    "glm4": _GROUPED | {"head_dim": 8},
    "ernie4_5": _GROUPED | {"head_dim": 8},
    "nemotron": _GROUPED | {"head_dim": 8},
    "gpt_oss": _GROUPED | _LOCAL | {"head_dim": 8, "rope_parameters": _PLAIN_ROTARY},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4} | _RANK,
}
_ENCODER: Final = _PLAIN | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODERS: Final[dict[str, dict[str, Any]]] = {
    "bert": _ENCODER,
    "albert": _ENCODER | {"embedding_size": 16},
    "modernbert": _PLAIN | {"local_attention": 16, "cls_token_id": 256, "sep_token_id": 257},
    "deberta-v2": _ENCODER
    | {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}
    | {"type_vocab_size": 0, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "roberta": _ENCODER | {"max_position_embeddings": 520, "type_vocab_size": 1},
    "distilbert": {"dim": 32, "hidden_dim": 72, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 256}
    | dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0),
    "electra": _ENCODER | {"embedding_size": 16},
}
Ones = Callable[[torch.Tensor], bool]
LABELS: Final = ("no", "yes")


def sizes(hidden: int, inner: int, layers: int, heads: int, keys: int, **more: Any) -> dict[str, Any]:
    """Return a decoder's sizes by transformers' names; `keys` are the heads of keys and values."""
    wide = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return wide | {"num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": VOCAB} | more


def build(family: str, **changes: Any) -> PreTrainedModel:
    """Make the net of a family, the same at every call; `changes` are of its configuration."""
    encoder = family in ENCODERS
    sizes = (DECODERS | ENCODERS)[family] | _ids(family) | changes
    config = AutoConfig.for_model(family, vocab_size=VOCAB, **sizes)
    if encoder:
        config.id2label = dict(enumerate(LABELS))
        config.label2id = {word: i for i, word in enumerate(LABELS)}
    kind = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net: PreTrainedModel = kind.from_config(config)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.dim() < 2 else 0.1))
    return net.eval()


def model_of(net: PreTrainedModel, words: Any, name: str) -> models.Model:
    """Return a net with a tokenizer as a model."""
    digests = models.digest(models.named_tensors(net)), models.tokenizer_digest(words)
    return models.Model(net, words, name, Path(name), *digests, "fp32", "cpu")


def drawn(config: Any, words: Any, name: str, seed: int, scale: float, one: Ones, **how: Any) -> models.Model:
    """Return a model whose numbers are drawn about 0, or about 1 in the tensors that `one` names."""
    with torch.random.fork_rng(devices=[]):
        net = AutoModelForCausalLM.from_config(config, **how)
    net.eval().requires_grad_(False)
    rng = np.random.default_rng(seed)
    for _, tensor in models.named_tensors(net):
        values = rng.standard_normal(tuple(tensor.shape), dtype=np.float32) * scale
        tensor.copy_(torch.from_numpy(values + one(tensor)))
    return model_of(net, words, name)


def save(family: str, folder: Path) -> Path:
    """Write a family's model as a Hugging Face directory, unless it is there; return the directory."""
    path = folder / family
    if not (path / "config.json").is_file():
        roberta = family in ("roberta", "distilbert", "modernbert")  # no segments
        pairs = tiny_pair_tokenizer("roberta" if roberta else "bert")
        models.save(build(family), pairs if family in ENCODERS else tiny_tokenizer(), path)
    return path


def _ids(family: str) -> dict[str, int]:
    return {"pad_token_id": 258} if family in ENCODERS else TOKENS
