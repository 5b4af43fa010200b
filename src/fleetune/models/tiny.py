"""Make tiny random models in code, for tests and benchmarks: the same on every machine, no download."""

import math
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fleetune.models.net.model import Model, digest, named_tensors, tokenizer_digest, uniform

_TEMPLATE: Final = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Make a tokenizer of the 256 bytes and two turn marks, with a chat template; the end mark is eos and pad."""
    start, end = "<|im_start|>", "<|im_end|>"
    marks = {"bos_token": start, "eos_token": end, "pad_token": end}
    backend = _bytes(start, end)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=_TEMPLATE, model_max_length=1024, **marks
    )


def tiny_pair_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """Make a tokenizer of the 256 bytes that marks texts and pairs as BERT's does (with segments), or RoBERTa's."""
    start, end, pad = ("[CLS]", "[SEP]", "[PAD]") if kind == "bert" else ("<s>", "</s>", "<pad>")
    backend = _bytes(start, end, pad)
    ends, inputs = ((end, 257), (start, 256)), ["input_ids", "attention_mask"]
    if kind == "bert":
        inputs.insert(1, "token_type_ids")
        backend.post_processor = processors.BertProcessing(*ends)
    else:
        backend.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    marks = {"cls_token": start, "sep_token": end, "pad_token": pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=128, model_input_names=inputs, **marks
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
    """Make a random llama (grouped-query attention, tied embeddings) with `tiny_tokenizer`, on the CPU."""
    config = transformers.AutoConfig.for_model(
        "llama",
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
    return _made(config, transformers.AutoModelForCausalLM, tiny_tokenizer(), seed)


def tiny_bert(seed: int = 0, *, labels: tuple[str, ...] = ("no", "yes"), layers: int = 2) -> Model:
    """Make a random BERT classifier of `labels`, 32 wide, with segments and a pooler."""
    return _encoder("bert", seed, labels, layers, max_position_embeddings=128)


def tiny_roberta(seed: int = 0, *, labels: tuple[str, ...] = ("no", "yes"), layers: int = 2) -> Model:
    """Make a random RoBERTa classifier of `labels`, 32 wide: positions start after the padding's, a deeper head."""
    return _encoder("roberta", seed, labels, layers, max_position_embeddings=387, type_vocab_size=1)


def _encoder(kind: str, seed: int, labels: tuple[str, ...], layers: int, **sizes: int) -> Model:
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=264,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=258,
        id2label=dict(enumerate(labels)),
        label2id={word: i for i, word in enumerate(labels)},
        problem_type="single_label_classification",
        **sizes,
    )
    return _made(
        config, transformers.AutoModelForSequenceClassification, tiny_pair_tokenizer(kind), seed, labels
    )


def _made(
    config: Any, auto: Any, words: PreTrainedTokenizerBase, seed: int, labels: tuple[str, ...] = ()
) -> Model:
    """Return a net of this configuration, with our own random matrices, as a model."""
    with torch.random.fork_rng(devices=[]):
        net = auto.from_config(config).eval().requires_grad_(False)
    for name, tensor in named_tensors(net):
        if tensor.dim() == 2:
            table = "embed" in name or "lm_head" in name
            spread = math.sqrt(3 / config.hidden_size) * (0.5 if table else 1.0)
            tensor.copy_(torch.from_numpy(uniform(f"tiny/{seed}/{name}", tuple(tensor.shape), spread)))
    name = f"tiny-{config.model_type}"
    base = digest(named_tensors(net))
    return Model(net, words, name, Path(name), base, tokenizer_digest(words), "fp32", "cpu", labels=labels)
