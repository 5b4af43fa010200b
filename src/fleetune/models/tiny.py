# SPDX-License-Identifier: Apache-2.0
"""Make tiny random models in code, for tests and benchmarks: the same on every machine, no download.

The weights are uniform with the usual spread, from raw Philox words keyed by seed and name: whatever the
version of torch, and no global generator is touched.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fleetune.models.net.model import Model, digest, named_tensors, tokenizer_digest, uniform

_TEMPLATE: Final = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Make a tokenizer of the 256 bytes and two turn marks, with a chat template; the end mark is eos and pad."""
    backend = _bytes("<|im_start|>", "<|im_end|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=_TEMPLATE,
        model_max_length=1024,
    )


def tiny_pair_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """Make a tokenizer of the 256 bytes that marks texts and pairs as BERT's does (with segments), or RoBERTa's."""
    start, end, pad = ("[CLS]", "[SEP]", "[PAD]") if kind == "bert" else ("<s>", "</s>", "<pad>")
    backend = _bytes(start, end, pad)
    if kind == "bert":
        backend.post_processor = processors.BertProcessing((end, 257), (start, 256))
    else:
        backend.post_processor = processors.RobertaProcessing(
            (end, 257), (start, 256), add_prefix_space=False
        )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token=start,
        sep_token=end,
        pad_token=pad,
        model_max_length=128,
        model_input_names=inputs if kind == "bert" else [inputs[0], inputs[2]],
    )


def _bytes(*special: str) -> Tokenizer:
    """Return the 256 bytes as tokens 0 to 255, and the special ones after them."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return backend


def tiny_llama(
    seed: int = 0, *, vocab: int = 264, hidden: int = 32, layers: int = 2, heads: int = 4, kv_heads: int = 2
) -> Model:
    """Make a random llama (grouped-query attention, tied embeddings) with `tiny_tokenizer`, on the CPU.

    ValueError for sizes that do not fit (vocab < 258, hidden not a multiple of 2 heads).
    """
    if vocab < 258 or hidden % (2 * heads) or heads % kv_heads:
        raise ValueError(f"tiny_llama cannot have vocab {vocab}, hidden {hidden}, heads {heads}/{kv_heads}")
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden + 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    with torch.random.fork_rng(devices=[]):
        net = LlamaForCausalLM(config)
    return _made("tiny-llama", net, tiny_tokenizer(), seed)


def tiny_bert(seed: int = 0, *, labels: tuple[str, ...] = ("no", "yes"), layers: int = 2) -> Model:
    """Make a random BERT classifier of `labels`, 32 wide, with segments and a pooler."""
    sizes = _encoder_sizes(labels, layers)
    with torch.random.fork_rng(devices=[]):
        net = BertForSequenceClassification(
            BertConfig(max_position_embeddings=128, pad_token_id=258, **sizes)
        )
    return _made("tiny-bert", net, tiny_pair_tokenizer("bert"), seed, labels)


def tiny_roberta(seed: int = 0, *, labels: tuple[str, ...] = ("no", "yes"), layers: int = 2) -> Model:
    """Make a random RoBERTa classifier of `labels`, 32 wide: positions start after the padding's, a deeper head."""
    sizes = _encoder_sizes(labels, layers) | {"type_vocab_size": 1}
    with torch.random.fork_rng(devices=[]):
        net = RobertaForSequenceClassification(
            RobertaConfig(max_position_embeddings=387, pad_token_id=258, **sizes)
        )
    return _made("tiny-roberta", net, tiny_pair_tokenizer("roberta"), seed, labels)


def _encoder_sizes(labels: tuple[str, ...], layers: int) -> dict[str, object]:
    return {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": dict(enumerate(labels)),
        "label2id": {word: i for i, word in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def _made(
    name: str,
    net: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    labels: tuple[str, ...] = (),
) -> Model:
    """Return the net, with our own random matrices, as a model."""
    net.eval()
    net.requires_grad_(False)
    for tensor_name, tensor in named_tensors(net):
        if tensor.dim() == 2:
            table = "embed" in tensor_name or "lm_head" in tensor_name
            spread = math.sqrt(3 / net.config.hidden_size) * (0.5 if table else 1.0)
            values = uniform(f"tiny/{seed}/{tensor_name}", tuple(tensor.shape), spread)
            tensor.copy_(torch.from_numpy(values))
    return Model(
        net,
        tokenizer,
        name,
        Path(name),
        digest(named_tensors(net)),
        tokenizer_digest(tokenizer),
        "fp32",
        "cpu",
        labels=labels,
    )
