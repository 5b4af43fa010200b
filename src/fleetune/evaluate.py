# SPDX-License-Identifier: Apache-2.0
"""How good a model is: response loss, perplexity, scores of greedy answers, accuracy by label words.

Every number is a function of the weights and the rows alone: the model runs in eval mode under
`torch.inference_mode`, nothing draws random numbers, sums are float64, and neither the batch size nor the
padding changes a value by more than float noise.  The model is always called as a module (`net(...)`,
`net.generate(...)`), so forward hooks and PEFT layers take part.  Scores of answers are in percent, as the
papers print them; losses are in nats a token.

The logits are the memory of an evaluation: 8 rows of 512 tokens over 49,152 pieces are 805 MB in float32,
and a loss over all of them takes two such arrays.  Here a short-lived hook hands the output head only the
positions whose next token is scored, at most `CHUNK_BYTES` of logits at a time (`token_losses`).

Sources: strided perplexity as in the Hugging Face guide "Perplexity of fixed-length models"; Rouge-L of Lin
(2004) by the `rouge-score` package with its Porter stemmer, as Natural Instructions (arXiv 2204.07705) and
FedKSeed (arXiv 2312.06353) use it; F1 and exact match of SQuAD (arXiv 1606.05250); label words scored by
their mean log-probability as in MeZO (arXiv 2305.17333, section 2.1 of its code's `get_score`).
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel

from fleetune.data.encode import MASKED, Batch, Encoded, collate, encode, encode_all, prompt_ids
from fleetune.data.encode import stop_ids as tokenizer_stop_ids
from fleetune.data.examples import Example
from fleetune.errors import DataError, RecipeError
from fleetune.models import Model

CHUNK_BYTES = 32 * 2**20  # float32 logits alive at a time
MAX_LABELS = 64  # more different answers than this are free text, not label words

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Run the body in eval mode without gradients; afterwards every module's training flag is what it was."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


# --- losses -----------------------------------------------------------------------------------------------


class _Narrow:
    """Two hooks on the output head: only the `wanted` positions go in, and only the first `limit` of them.

    After the forward `rows` holds the head's input at all wanted positions, float [N, H], and `output` what
    the head made of the first `limit` of them.  `rows` stays None when the head was not called on [B, T, H].
    """

    def __init__(self, wanted: Tensor, limit: int) -> None:
        self.wanted = wanted
        self.limit = limit
        self.rows: Tensor | None = None
        self.output: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        batch, length = self.wanted.shape
        if not args or args[0].ndim != 3 or args[0].shape[0] != batch or args[0].shape[1] < length:
            return None
        # A soft prompt puts its virtual tokens in front, so positions count from the right.
        self.rows = args[0][:, -length:][self.wanted]
        return (self.rows[: self.limit].unsqueeze(0), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.output = output

    def run(self, net: nn.Module, head: nn.Module | None, batch: Batch) -> Tensor:
        """The logits of one forward: [1, min(N, limit), V], or [B, T, V] where the head was not caught."""
        hooks = []
        if head is not None:
            # First in, last out: hooks that others have put on the head see exactly what the head sees.
            hooks.append(head.register_forward_pre_hook(self.before, prepend=True))
            hooks.append(head.register_forward_hook(self.after))
        try:
            out = net(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return cast(Tensor, out.logits)


def _base(net: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside `net` (which PEFT may have wrapped)."""
    for module in net.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"{type(net).__name__} holds no Hugging Face model")


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] in float32: logits [n, V], targets int64 [n] -> [n]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _split(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[start : start + size] for start in range(0, max(1, len(rows)), size)]


def _head_nll(head: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    return _nll(head(rows.unsqueeze(0))[0], targets)


def token_losses(net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The cross-entropy (nats) of each scored token, and its row: float32 [N], int64 [N], in row order.

    The label at position t is predicted at t-1, so a label at position 0 is never scored.  The head runs over
    the N predicting positions in chunks; a model that does more after its head than hand the logits on (a
    soft cap, a scale) is run again with all N in one chunk, which is slower and always right.  With gradients
    enabled the result can be back-propagated; later chunks are then recomputed rather than kept.
    """
    wanted = F.pad(batch.labels[:, 1:] != MASKED, (0, 1))
    targets = batch.labels[:, 1:][wanted[:, :-1]]
    places = wanted.nonzero()
    base = _base(net)
    head = base.get_output_embeddings()
    limit = max(1, CHUNK_BYTES // (4 * int(base.config.get_text_config().vocab_size)))
    narrow = _Narrow(wanted, limit)
    logits = narrow.run(net, head, batch)
    if narrow.rows is not None and len(targets) > limit and logits is not narrow.output:
        narrow = _Narrow(wanted, len(targets))
        logits = narrow.run(net, head, batch)
    if narrow.rows is None:
        logits = logits[:, -wanted.shape[1] :]
        pieces = zip(_split(places, limit), _split(targets, limit), strict=True)
        parts = [_nll(logits[at[:, 0], at[:, 1]], target) for at, target in pieces]
        return torch.cat(parts), places[:, 0]
    parts = [_nll(logits[0], targets[: narrow.limit])]
    del logits
    narrow.output = None  # the chunks below take its place
    pieces = zip(_split(narrow.rows, narrow.limit), _split(targets, narrow.limit), strict=True)
    for rows, target in itertools.islice(pieces, 1, None):
        if torch.is_grad_enabled():
            parts.append(cast(Tensor, checkpoint(_head_nll, head, rows, target, use_reentrant=False)))
        else:
            parts.append(_head_nll(cast(nn.Module, head), rows, target))
    return torch.cat(parts), places[:, 0]


def row_losses(model: Model, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The summed cross-entropy (nats) and the number of scored tokens of each row: float64 [B], int64 [B].

    Scored are the positions with a label other than -100, except position 0, which nothing predicts.
    """
    with frozen(model.net):
        losses, rows = token_losses(model.net, batch)
    size, at = len(batch.labels), rows.cpu().numpy()
    sums = np.bincount(at, weights=losses.cpu().numpy().astype(np.float64), minlength=size)
    return sums, np.bincount(at, minlength=size)


def batch_loss(model: Model, batch: Batch) -> float:
    """Mean cross-entropy over the response tokens of one batch, in nats (one forward, float64 sum).

    NaN when the batch has no scored token.
    """
    sums, counts = row_losses(model, batch)
    return float(sums.sum() / counts.sum()) if counts.sum() else math.nan


def pad_id(model: Model) -> int:
    """What to fill up rows with; masked everywhere, so any id in the vocabulary would do."""
    for token in (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _all_row_losses(model: Model, rows: Sequence[Encoded], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`row_losses` over any number of rows, longest first (little padding, and memory peaks at the start)."""
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    for start in range(0, len(order), batch_size):
        at = order[start : start + batch_size]
        batch = collate([rows[i] for i in at], pad_id(model), model.device)
        sums[at], counts[at] = row_losses(model, batch)
    return sums, counts


def response_loss(model: Model, rows: Sequence[Encoded], *, batch_size: int = 8) -> float:
    """Mean cross-entropy over all response tokens of `rows`, in nats.

    Token-weighted: a long answer counts for more than a short one, as in training.  DataError when there is
    no response token at all.
    """
    sums, counts = _all_row_losses(model, rows, batch_size)
    if not counts.sum():
        raise DataError(
            f"no response tokens to score in {len(rows)} row(s)",
            hint="give rows with an answer, or a larger maximum length",
        )
    return float(sums.sum() / counts.sum())


def perplexity(
    model: Model,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
) -> float:
    """exp(mean cross-entropy a token) of plain text, by windows of `window` tokens that move by `stride`.

    As in the Hugging Face guide: a window scores only the tokens that no window before it has, and the rest
    of it is their context, so each token is scored once with at least window - stride tokens before it.
    Defaults: window = the model's context, at most 1,024; stride = half of it.  Texts are separate documents:
    no window spans two.  A text is tokenised as the tokenizer does by itself: where that puts a beginning-of-
    sequence token in front, it is context only and every token of the text is scored; where it puts none,
    the text's first token is context only.  DataError when nothing is left to score.
    """
    length = window or min(_context(model), 1024)
    step = stride or max(1, length // 2)
    if length < 2 or not 1 <= step < length:
        raise RecipeError(
            [f"perplexity: window {length} and stride {step} do not fit together"],
            hint="choose a window of at least 2 tokens and a stride from 1 to window - 1",
        )
    rows = [row for text in texts for row in _windows(_text_ids(model, text), length, step)]
    if not rows:
        raise DataError(f"no token to score in {len(texts)} text(s)", hint="give a longer text")
    mean = response_loss(model, rows, batch_size=batch_size)
    return math.exp(mean) if mean < 700 else math.inf


def _windows(ids: np.ndarray, window: int, stride: int) -> Iterator[Encoded]:
    """A text's windows as rows whose "prompt" is the context: what an earlier window has scored."""
    scored = 1
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        if end <= scored:
            return
        yield Encoded(ids=ids[start:end], n_prompt=scored - start)
        scored = end


def _text_ids(model: Model, text: str) -> np.ndarray:
    # verbose=False: a text longer than the context is what the windows are for, not worth a warning
    return np.asarray(model.tokenizer(text, verbose=False)["input_ids"], np.int32)


def _context(model: Model) -> int:
    """The longest sequence the model is made for; 2,048 where its configuration does not say."""
    return int(getattr(_base(model.net).config.get_text_config(), "max_position_embeddings", None) or 2048)


# --- answers ----------------------------------------------------------------------------------------------


def generate(
    model: Model, examples: Sequence[Example], *, max_new_tokens: int = 128, batch_size: int = 8
) -> list[str]:
    """The model's greedy answer to each example's prompt, without special tokens and outer white space.

    128 new tokens is FedKSeed's evaluation.  A prompt too long for the context less `max_new_tokens` is cut
    as `prompt_ids` does.
    """
    room = max(1, _context(model) - max_new_tokens)
    prompts = [prompt_ids(example, model.tokenizer, room) for example in examples]
    return generate_from_ids(model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)


def generate_from_ids(
    model: Model, prompts: Sequence[np.ndarray], *, max_new_tokens: int = 128, batch_size: int = 8
) -> list[str]:
    """The greedy continuation of each prompt (int ids [T], not empty) as text, in the order of the prompts.

    Stops at the tokenizer's or the model's end of sequence or the chat template's end of turn, or after
    `max_new_tokens`.  Prompts of like length share a batch, padded on the left; the attention mask hides the
    padding and positions count from the first real token.
    """
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids(model)) or None,
        pad_token_id=pad_id(model),
    )
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with frozen(model.net), _greedy(model.net, config):
        for start in range(0, len(order), batch_size):
            at = order[start : start + batch_size]
            ids, mask = _left_padded([prompts[i] for i in at], pad_id(model), model.device)
            # PEFT and Hugging Face both type `generate` loosely
            generator = cast(Any, model.net)
            out = generator.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for i, row in zip(at, out[:, ids.shape[1] :].tolist(), strict=True):
                answers[i] = decode_answer(model, row)
    return answers


def decode_answer(model: Model, ids: Sequence[int]) -> str:
    """The text of an answer's tokens up to its end, without special tokens and outer white space."""
    stops = stop_ids(model)
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return str(model.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)).strip()


@contextmanager
def _greedy(net: nn.Module, config: GenerationConfig) -> Iterator[None]:
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
    """Token ids and attention mask, int64 [B, T] both, the prompts flush right."""
    length = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), length), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def stop_ids(model: Model) -> frozenset[int]:
    """The tokens that end an answer: end of turn (template), end of text (tokenizer and model)."""
    own = _base(model.net).generation_config
    ends = own.eos_token_id if own is not None else None
    found = {*tokenizer_stop_ids(model.tokenizer), *(ends if isinstance(ends, list) else [ends])}
    return frozenset(int(token) for token in found if token is not None)


# --- scores of answers ------------------------------------------------------------------------------------


@functools.cache
def _rouge() -> Any:
    # imported here: it loads nltk, half a second that only Rouge should wait for
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean Rouge-L F1 over the pairs, in percent (Lin 2004; `rouge-score`, Porter stemmer on).

    The package keeps only a-z and 0-9 of a lower-cased text, so text in another script scores 0.
    """
    return _mean_score(lambda a, r: float(_rouge().score(r, a)["rougeL"].fmeasure), answers, references)


def token_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of the two bags of words, in percent, on normalised text (SQuAD's evaluation script).

    Where either is empty after normalising, the pair scores 1 if both are, else 0 (SQuAD 2.0's rule).
    """
    return _mean_score(_f1, answers, references)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers equal to their reference after normalising, in percent (SQuAD's script)."""
    return _mean_score(lambda a, r: float(normalise(a) == normalise(r)), answers, references)


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces (SQuAD's `normalize_answer`)."""
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


# --- label words ------------------------------------------------------------------------------------------


def answer_ids(model: Model, answer: str) -> np.ndarray:
    """The tokens of `answer` as an assistant's turn has them, without the end of the turn: int ids [T]."""
    row = encode(Example((("user", "question"),), answer, {}), model.tokenizer, _context(model))
    return without_end(model, row.ids[row.n_prompt :])


def without_end(model: Model, ids: np.ndarray) -> np.ndarray:
    """`ids` up to the first token that ends an answer."""
    ends = np.flatnonzero(np.isin(ids, list(stop_ids(model))))
    return ids[: ends[0]] if len(ends) else ids


def answer_scores(
    model: Model, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], *, batch_size: int = 8
) -> np.ndarray:
    """The mean log-probability (nats) of each answer's tokens after each prompt: float64 [prompts, answers].

    The mean, not the sum, so that a label of more tokens is not at a disadvantage (MeZO's score).
    """
    rows = [
        Encoded(ids=np.concatenate([prompt, answer]).astype(np.int32), n_prompt=len(prompt))
        for prompt in prompts
        for answer in answers
    ]
    sums, counts = _all_row_losses(model, rows, batch_size)
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
    """The share of examples, in percent, whose own label scores best among all label words.

    An example's label is its response.  `labels` defaults to the different responses of `examples`, sorted.
    The choice is the argmax of the labels' mean log-probability after the prompt, the first of equals.
    DataError when a response is not among the labels, or the responses look like free text.
    """
    own = [example.response.strip() for example in examples]
    words = [label.strip() for label in labels] or sorted(set(own))
    unknown = sorted(set(own) - set(words))
    if unknown or not words or "" in words or len(words) > MAX_LABELS:
        raise DataError(
            f"accuracy needs rows whose response is one of the labels; {len(words)} label(s), and"
            f" {len(unknown)} other response(s) such as {unknown[:1]}",
            hint=f"give at most {MAX_LABELS} label words that cover the data, or measure rouge_l instead",
        )
    tokens = [answer_ids(model, word) for word in words]
    room = max(1, max_length - max(map(len, tokens)))
    prompts = [prompt_ids(example, model.tokenizer, room) for example in examples]
    best = answer_scores(model, prompts, tokens, batch_size=batch_size).argmax(1)
    return 100.0 * sum(words[int(i)] == word for i, word in zip(best, own, strict=True)) / len(own)


# --- all together -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What the tasks measure on; the greedy answers are made once for all tasks that want them."""

    model: Model
    examples: Sequence[Example]
    max_length: int
    batch_size: int
    max_new_tokens: int
    labels: Sequence[str]
    texts: Sequence[str]

    @functools.cached_property
    def answers(self) -> tuple[list[str], list[str]]:
        """The model's answers and the references."""
        made = generate(
            self.model, self.examples, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
        )
        return made, [example.response for example in self.examples]


def _loss_task(work: _Work) -> float:
    rows, _ = encode_all(work.examples, work.model.tokenizer, work.max_length)
    return response_loss(work.model, rows, batch_size=work.batch_size)


def _perplexity_task(work: _Work) -> float:
    return perplexity(work.model, work.texts or [example.response for example in work.examples])


def _accuracy_task(work: _Work) -> float:
    return label_accuracy(
        work.model, work.examples, work.labels, max_length=work.max_length, batch_size=work.batch_size
    )


TASKS: Mapping[str, Callable[[_Work], float]] = MappingProxyType(
    {
        "loss": _loss_task,
        "rouge_l": lambda work: rouge_l(*work.answers),
        "f1": lambda work: token_f1(*work.answers),
        "exact_match": lambda work: exact_match(*work.answers),
        "accuracy": _accuracy_task,
        "perplexity": _perplexity_task,
    }
)
_SHORT = MappingProxyType({"rouge": "rouge_l", "em": "exact_match", "acc": "accuracy", "ppl": "perplexity"})


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks' full names, each once; RecipeError naming every unknown one, with the nearest known."""
    names = tuple(dict.fromkeys(_SHORT.get(task, task) for task in tasks))
    problems = []
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            problems.append(f"unknown task {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if problems:
        raise RecipeError(problems, hint=f"the tasks are {', '.join(TASKS)}")
    return names


def evaluate(
    model: Model,
    examples: Sequence[Example],
    tasks: Sequence[str] = ("loss", "rouge_l"),
    *,
    max_length: int = 512,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    answer_rows: int | None = None,
    labels: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> dict[str, float]:
    """Task name -> value on held-out `examples`: loss in nats, perplexity, the rest in percent.

    `tasks` are keys of `TASKS` or their short names (rouge, em, acc, ppl).  `answer_rows`: how many examples,
    from the first, are answered for rouge_l, f1 and exact_match (default: all; answers are the slow part).
    `labels`: the label words of "accuracy" (default: the different responses).  `texts`: what "perplexity"
    reads (default: the responses).  RecipeError for an unknown task, DataError for rows that do not fit one.
    """
    names = check_tasks(tasks)
    work = _Work(model, examples, max_length, batch_size, max_new_tokens, labels, texts)
    answered = replace(work, examples=examples[:answer_rows])
    of_answers = {"rouge_l", "f1", "exact_match"}
    return {name: TASKS[name](answered if name in of_answers else work) for name in names}


class Sample(NamedTuple):
    """One fixed prompt and what the model says to it."""

    prompt: str
    reference: str
    answer: str
    client: str


def samples(
    model: Model, examples: Sequence[Example], *, max_new_tokens: int = 128, batch_size: int = 8
) -> list[Sample]:
    """The model's greedy answers to fixed examples, to be set beside another model's on the same ones.

    `prompt` is the last user turn; `client` is the row's field of that name, or empty.
    """
    answers = generate(model, examples, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [
        Sample(example.messages[-1][1], example.response, answer, example.meta.get("client", ""))
        for example, answer in zip(examples, answers, strict=True)
    ]
