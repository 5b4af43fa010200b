"""Generate answers greedily or by sampling, and score given answers.  An encoder's answer is the label word that it chooses.

The model is called as a module, so that forward hooks and PEFT layers take part.  Label words are scored by their mean
log-probability as in MeZO (arXiv 2305.17333).  Scores in percent: Rouge-L of Lin (2004) by `rouge-score`, as Natural Instructions
(arXiv 2204.07705) use it; F1 and exact match of SQuAD (arXiv 1606.05250).
"""

import functools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from fleetune.common.display import counted
from fleetune.common.memory import give_back
from fleetune.data.encode import Encoded, encode, encode_texts, prompt_ids
from fleetune.data.encode import stop_ids as tokenizer_stop_ids
from fleetune.data.read_rows import Example
from fleetune.errors import DataError, RecipeError
from fleetune.evaluation import losses
from fleetune.models.loading import MAX_LABELS
from fleetune.models.net.model import Model

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def generate(
    model: Model,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    max_length: int = 1 << 20,
    on_rows: losses.OnRows = losses.unheard,
) -> list[str]:
    """Return the model's greedy answer to each example's prompt, without special tokens and outer white space.

    128 new tokens is FedKSeed's evaluation.  A prompt longer than `max_length`, or too long for the context less
    `max_new_tokens`, is cut as `prompt_ids` does.  An encoder's answers are its label words.  `on_rows` is called after
    each batch that a decoder has answered.
    """
    if model.labels:
        return predict(model, examples, batch_size=batch_size)
    room = max(1, min(max_length, losses.context_length(model) - max_new_tokens))
    prompts = [prompt_ids(example, model.tokenizer, room) for example in examples]
    return generate_from_ids(
        model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, on_rows=on_rows
    )


def predict(
    model: Model, examples: Sequence[Example], *, max_length: int = 1 << 20, batch_size: int = 8
) -> list[str]:
    """Return the label word that an encoder chooses for each example, the first of equals."""
    rows = [
        Encoded(ids, len(ids), segments, 0) for ids, segments in encode_texts(model, examples, max_length)
    ]
    best = losses.all_class_logits(model, rows, batch_size).argmax(1)
    return [model.labels[int(i)] for i in best]


def require_text_model(model: Model, what: str) -> None:
    """Raise RecipeError when `what` needs generated text and `model` is an encoder."""
    if model.labels:
        raise RecipeError(
            [
                f"{what} needs a model that writes text, and '{model.name}' is an encoder: it chooses a label word"
            ],
            hint="measure loss and accuracy, or use a causal language model",
        )


def generate_from_ids(
    model: Model,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    on_rows: losses.OnRows = losses.unheard,
) -> list[str]:
    """Return the greedy continuation of each prompt (int ids [T], not empty) as text, in the order of the prompts.

    Stops at the tokenizer's or the model's end of sequence or the chat template's end of turn, or after
    `max_new_tokens`.  Prompts of like length share a batch, padded on the left; the attention mask hides the
    padding and positions count from the first real token.  RecipeError for an encoder.
    """
    require_text_model(model, "generation")
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, **_ends(model))
    return [decode_answer(model, ids) for ids in _continued(model, prompts, config, batch_size, on_rows)]


def sample_from_ids(
    model: Model, prompts: Sequence[np.ndarray], *, temperature: float, max_new_tokens: int, seed: int
) -> list[np.ndarray]:
    """Sample a continuation of each prompt (int ids [T], not empty): int32 [N] each, N >= 1.

    Up to and with the first token that ends an answer, or `max_new_tokens`.  A function of the weights, the prompts and
    `seed` alone; torch's generators are afterwards what they were.  RecipeError for an encoder.
    """
    require_text_model(model, "sampling")
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        **_ends(model),
    )
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if model.device == "cuda" else []):
        torch.manual_seed(seed)
        drawn = _continued(model, prompts, config, len(prompts))
    stops = stop_ids(model)
    return [until_end(np.asarray(ids, np.int32), stops) for ids in drawn]


def _ends(model: Model) -> dict[str, Any]:
    return {"eos_token_id": sorted(stop_ids(model)) or None, "pad_token_id": losses.pad_id(model)}


def _continued(
    model: Model,
    prompts: Sequence[np.ndarray],
    config: GenerationConfig,
    batch_size: int,
    on_rows: losses.OnRows = losses.unheard,
) -> list[list[int]]:
    """Return what `config` makes the model write after each prompt, padding after its end included."""
    written: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with losses.eval_mode(model.net), _settings(model.net, config):
        for start in range(0, len(order), batch_size):
            give_back()  # keys and values that grew token by token left holes into which nothing else fits
            at = order[start : start + batch_size]
            ids, mask = _left_padded([prompts[i] for i in at], losses.pad_id(model), model.device)
            # PEFT and Hugging Face both type `generate` loosely
            generator = cast(Any, model.net)
            out = generator.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for i, row in zip(at, out[:, ids.shape[1] :].tolist(), strict=True):
                written[i] = row
            on_rows(start + len(at), len(order))
    return written


def decode_answer(model: Model, ids: Sequence[int]) -> str:
    """Return the text of an answer's tokens up to its end, without special tokens and outer white space."""
    stops = stop_ids(model)
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return str(model.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)).strip()


@contextmanager
def _settings(net: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Run the body with `config` as the only generation settings.

    `generate` fills what a given configuration leaves open from the checkpoint's own (beams, penalties, a
    temperature), so these are put aside; PEFT keeps a second copy on its wrapper.
    """
    modules = [module for module in net.modules() if "generation_config" in vars(module)]
    owners = {module: vars(module)["generation_config"] for module in modules}
    for module in owners:
        vars(module)["generation_config"] = config
    try:
        yield
    finally:
        for module, own in owners.items():
            vars(module)["generation_config"] = own


def _left_padded(prompts: Sequence[np.ndarray], pad_id: int, device: str) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, int64 [B, T] both, the prompts flush right."""
    length = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), length), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def stop_ids(model: Model) -> frozenset[int]:
    """Return the tokens that end an answer: end of turn (template), end of text (tokenizer and model)."""
    own = losses.base_of(model.net).generation_config
    ends = own.eos_token_id if own is not None else None
    found = {*tokenizer_stop_ids(model.tokenizer), *(ends if isinstance(ends, list) else [ends])}
    return frozenset(int(token) for token in found if token is not None)


# --- label words ------------------------------------------------------------------------------------------


def answer_ids(model: Model, answer: str) -> np.ndarray:
    """Return the tokens of `answer` as an assistant's turn, without the end of the turn: int ids [T]."""
    row = encode(Example((("user", "question"),), answer, {}), model.tokenizer, losses.context_length(model))
    return without_end(model, row.ids[row.n_prompt :])


def without_end(model: Model, ids: np.ndarray) -> np.ndarray:
    """Return `ids` up to the first token that ends an answer."""
    return ids[: _end(ids, stop_ids(model))]


def until_end(ids: np.ndarray, stops: Collection[int]) -> np.ndarray:
    """Return `ids` up to and with the first of the tokens `stops`."""
    return ids[: _end(ids, stops) + 1]


def _end(ids: np.ndarray, stops: Collection[int]) -> int:
    found = np.flatnonzero(np.isin(ids, list(stops)))
    return int(found[0]) if len(found) else len(ids)


def answer_scores(
    model: Model, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], *, batch_size: int = 8
) -> np.ndarray:
    """Return the mean log-probability (nats) of each answer's tokens after each prompt: float64 [prompts, answers].

    The mean, not the sum, so that a label of more tokens is not at a disadvantage (MeZO's score).
    """
    rows = [
        Encoded(ids=np.concatenate([prompt, answer]).astype(np.int32), n_prompt=len(prompt))
        for prompt in prompts
        for answer in answers
    ]
    sums, counts = losses.all_row_losses(model, rows, batch_size)
    means: np.ndarray = -sums / np.maximum(counts, 1)
    return means.reshape(len(prompts), len(answers))


def label_accuracy(
    model: Model,
    examples: Sequence[Example],
    labels: Sequence[str] = (),
    *,
    max_length: int = 512,
    batch_size: int = 8,
) -> float:
    """Return the share of examples, in percent, whose own label scores best among all label words.

    An example's label is its response.  `labels` defaults to the different responses of `examples`, sorted.
    The choice is the argmax of the labels' mean log-probability after the prompt, the first of equals; an
    encoder has its own label words and chooses with its head.
    DataError when a response is not among the labels, or the responses look like free text.
    """
    own = [example.response.strip() for example in examples]
    labels = model.labels or labels
    words = [label.strip() for label in labels] or sorted(set(own))
    unknown = sorted(set(own) - set(words))
    if unknown or not words or "" in words or len(words) > MAX_LABELS:
        raise DataError(
            f"accuracy needs rows whose response is one of the labels; {counted(len(words), 'label')}, and"
            f" {counted(len(unknown), 'other response')} such as {unknown[:1]}",
            hint=f"give at most {MAX_LABELS} label words that cover the data, or measure rouge_l instead",
        )
    if model.labels:
        chosen = predict(model, examples, max_length=max_length, batch_size=batch_size)
        return 100.0 * sum(a == b for a, b in zip(chosen, own, strict=True)) / len(own)
    tokens = [answer_ids(model, word) for word in words]
    room = max(1, max_length - max(map(len, tokens)))
    prompts = [prompt_ids(example, model.tokenizer, room) for example in examples]
    best = answer_scores(model, prompts, tokens, batch_size=batch_size).argmax(1)
    return 100.0 * sum(words[int(i)] == word for i, word in zip(best, own, strict=True)) / len(own)


# --- scores ---------------------------------------------------------------------------------------------------


@functools.cache
def _rouge() -> Any:
    # imported here: it loads nltk, half a second that only Rouge should wait for
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean Rouge-L F1 over the pairs, in percent (Lin 2004; `rouge-score`, Porter stemmer on).

    The package keeps only a-z and 0-9 of a lower-cased text, so text in another script scores 0.
    """
    return _mean_score(lambda a, r: float(_rouge().score(r, a)["rougeL"].fmeasure), answers, references)


def token_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F1 of the two bags of words, in percent, on normalised text (SQuAD's evaluation script).

    Where either is empty after normalising, the pair scores 1 if both are, else 0 (SQuAD 2.0's rule).
    """
    return _mean_score(_f1, answers, references)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of answers equal to their reference after normalising, in percent (SQuAD's script)."""
    return _mean_score(lambda a, r: float(normalise(a) == normalise(r)), answers, references)


def normalise(text: str) -> str:
    """Lower the case; drop ASCII punctuation, English articles and extra spaces (SQuAD's `normalize_answer`)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(answer: str, reference: str) -> float:
    got, want = normalise(answer).split(), normalise(reference).split()
    if not got or not want:
        return float(got == want)
    same = sum((Counter(got) & Counter(want)).values())
    return 2 * same / (len(got) + len(want))


def _mean_score(
    score: Callable[[str, str], float], answers: Sequence[str], references: Sequence[str]
) -> float:
    if not answers:
        raise DataError("no answers to score", hint="evaluate on at least one row")
    pairs = zip(answers, references, strict=True)
    return 100.0 * math.fsum(score(answer, reference) for answer, reference in pairs) / len(answers)
