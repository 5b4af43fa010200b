# SPDX-License-Identifier: Apache-2.0
"""Three zero-shot tasks made of text and rows that are at hand, as a Markdown table.

    python -m benchmarks.zeroshot MODEL [MODEL ...] --text TEXT.txt --rows ROWS.jsonl

MODEL is a name, a folder, a GGUF file, or the folder that `fleetune compress` left.  A line of the text that is no
heading is a paragraph; rows are read as everywhere.  Items are the same for all models, whatever their tokenizer:

- continuation, in the form of HellaSwag (arXiv 1905.07830): the first 32 words of a paragraph, and which of four pieces
  of 12 words goes on there; the wrong ones go on in three other paragraphs.
- last word, in the form of LAMBADA (arXiv 1606.06031): a paragraph up to its first sentence that ends after 40 to 80
  words with a word of four or more lower-case letters.  Greedy decoding has to get all tokens of that word right.
- answer choice: the prompt of a row, and which of four answers is its own; the wrong ones belong to three other rows of
  its category.  Rows are of the categories closed_qa, information_extraction and open_qa (equal shares), or have none;
  prompts have at most 800 characters, answers 120.

A choice is that of the highest mean log-likelihood of its tokens.  Each right piece or answer is a wrong one of three
other items, so a model that only knows what is likely anywhere is at chance.  ± is one standard error; that of the
share takes into account that the items are the same.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from fleetune import data
from fleetune.cli.commands import compress
from fleetune.data import Encoded, Example, collate, keyed_order, prompt_ids
from fleetune.data.encode import MASKED
from fleetune.deploy import export
from fleetune.evaluation.answers import answer_ids, require_text_model
from fleetune.evaluation.losses import context_length, eval_mode, pad_id, predictors
from fleetune.models import Model

T = TypeVar("T")
CATEGORIES = ("closed_qa", "information_extraction", "open_qa", "")
OPENING, PIECE = 32, 12  # words
PASSAGE = range(40, 81)  # words before the last one
LAST = re.compile(r"(?<= )([a-z]{4,}) ?\.(?= |$)")
PROMPT, ANSWER = 800, 120  # characters at most
CHOICES, BATCH = 4, 8
TASKS = {"continuation": 100 / CHOICES, "last word": 0.0, "answer choice": 100 / CHOICES}  # chance


class Piece(NamedTuple):
    """A text and what comes next in it."""

    before: str
    after: str


class Items(NamedTuple):
    """What all models are asked.  Of choices the right one is the first."""

    continuations: list[tuple[str, list[str]]]
    words: list[Piece]
    answers: list[tuple[Example, list[str]]]


# ---------------------------------------------------------------- items


def among(items: Sequence[tuple[T, str]]) -> list[tuple[T, list[str]]]:
    """Each item with its own text and those of the next ones in the circle that differ from it."""
    found = []
    for i, (asked, own) in enumerate(items):
        others = dict.fromkeys(text for _, text in (*items[i + 1 :], *items[:i]) if text != own)
        if len(others) < CHOICES - 1:
            raise SystemExit(f"{len(items)} items are too few to choose among: give more text or rows")
        found.append((asked, [own, *list(others)[: CHOICES - 1]]))
    return found


def drawn(items: Sequence[T], count: int, seed: int, stream: int) -> list[T]:
    """`count` of the items, or all of them in another order."""
    return [items[i] for i in keyed_order(seed, stream, len(items))[:count]]


def continuations(paragraphs: Sequence[str]) -> Iterator[Piece]:
    """The beginnings of those that are long enough."""
    for words in map(str.split, paragraphs):
        if len(words) >= OPENING + PIECE:
            yield Piece(" ".join(words[:OPENING]), " " + " ".join(words[OPENING : OPENING + PIECE]))


def last_words(paragraphs: Sequence[str]) -> Iterator[Piece]:
    """Of those that have such a sentence, all before its last word, and that word."""
    for paragraph in paragraphs:
        for match in LAST.finditer(paragraph):
            before = paragraph[: match.start()].rstrip()
            if len(before.split()) in PASSAGE:
                yield Piece(before, " " + match[1])
                break


def answers(rows: Sequence[Example], count: int, seed: int) -> Iterator[tuple[Example, list[str]]]:
    """Rows with their answers, `count` in all, from each category alike."""
    short = [r for r in rows if len(r.messages[-1][1]) <= PROMPT and len(r.response.strip()) <= ANSWER]
    of = {c: [(r, r.response.strip()) for r in short if r.meta.get("category", "") == c] for c in CATEGORIES}
    present = [found for found in of.values() if found]
    if not present:
        raise SystemExit(f"none of {len(rows)} rows is short enough and of one of the categories")
    for stream, found in enumerate(present, 2):
        yield from among(drawn(found, count // len(present), seed, stream))


def make_items(text: str, rows: str, count: int, seed: int) -> Items:
    """The items of all three tasks, at most `count` of each."""
    lines = [line.strip() for whole in data.read_text(text) for line in whole.splitlines()]
    paragraphs = [line for line in lines if not line.startswith("=")]
    words = drawn([*last_words(paragraphs)], count, seed, 1)
    if not words:
        raise SystemExit(f"no paragraph of {text} has a sentence that ends as the last word needs it")
    return Items(
        among(drawn([*continuations(paragraphs)], count, seed, 0)),
        words,
        [*answers(data.read(rows), count, seed)],
    )


# ---------------------------------------------------------------- models


def load(name: str) -> Model:
    """A model, or what a finished `fleetune compress` made."""
    folder = compress.find(name, Path("runs"))
    model = export.load(compress.artefact(folder) if folder else Path(name))
    require_text_model(model, "a zero-shot task")
    return model


def tokens(model: Model, before: str, after: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a text, and those that are added where it goes on with `after`."""
    ids = [np.asarray(model.tokenizer(text)["input_ids"], np.int32) for text in (before, before + after)]
    return ids[0], ids[1][len(ids[0]) :]


def likeliest(model: Model, prompt: np.ndarray, choices: Sequence[np.ndarray]) -> int:
    """The choice whose tokens have the highest mean log-likelihood; the prompt is read once for all."""
    net: Any = model.net
    cache = DynamicCache(config=net.config)
    takes = inspect.signature(net.forward).parameters
    kept = {"cache" if "cache" in takes else "past_key_values": cache}  # as transformers before 5.20 has it
    first = torch.from_numpy(prompt[None, :-1].astype(np.int64)).to(model.device)
    net(input_ids=first, use_cache=True, logits_to_keep=1, **kept)
    cache.batch_repeat_interleave(len(choices))
    rows = [Encoded(np.concatenate([prompt[-1:], choice]), 1) for choice in choices]
    batch = collate(rows, pad_id(model), model.device)
    logits = net(input_ids=batch.input_ids, use_cache=True, **kept).logits[:, :-1]
    labels = batch.labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=MASKED, reduction="none")
    return int((losses.sum(1) / (labels != MASKED).sum(1)).argmin())


def greedy(model: Model, words: Sequence[Piece]) -> Iterator[bool]:
    """Whether each word is what greedy decoding writes: every token of it is the likeliest after those before."""
    for start in range(0, len(words), BATCH):
        pairs = [tokens(model, *piece) for piece in words[start : start + BATCH]]
        rows = [Encoded(np.concatenate(pair), len(pair[0])) for pair in pairs]
        batch = collate(rows, pad_id(model), model.device)
        labels = batch.labels[:, 1:]
        inputs, head = predictors(model.net, batch)
        right = torch.ones_like(labels, dtype=torch.bool)
        right[labels != MASKED] = head(inputs).argmax(1) == labels[labels != MASKED]
        yield from right.all(1).tolist()


def outcomes(model: Model, items: Items) -> list[np.ndarray]:
    """Of each task whether the items were right: 0 or 100."""
    with eval_mode(model.net):
        chosen = []
        for opening, texts in items.continuations:
            pairs = [tokens(model, opening, text) for text in texts]
            chosen.append(likeliest(model, pairs[0][0], [after for _, after in pairs]))
        words = [*greedy(model, items.words)]
        taken = []
        for row, texts in items.answers:
            prompt = prompt_ids(row, model.tokenizer, context_length(model))
            taken.append(likeliest(model, prompt, [answer_ids(model, text) for text in texts]))
    return [100.0 * right for right in (np.equal(chosen, 0), np.array(words), np.equal(taken, 0))]


# ---------------------------------------------------------------- table


def cell(value: float, variance: float) -> str:
    """A number with its standard error."""
    return f"{value:.1f} ± {math.sqrt(variance):.1f}"


def mean(found: Sequence[np.ndarray]) -> tuple[float, float]:
    """The mean over tasks of their means, and its variance."""
    count = len(found)
    return sum(a.mean() for a in found) / count, sum(a.var() / len(a) for a in found) / count**2


def line(name: str, found: Sequence[np.ndarray], first: Sequence[np.ndarray]) -> str:
    """A row of the table; `first` are the first model's outcomes."""
    (average, variance), (whole, _) = mean(found), mean(first)
    share = average / whole
    _, apart = mean([a - share * b for a, b in zip(found, first, strict=True)])
    cells = [cell(a.mean(), a.var() / len(a)) for a in found]
    return f"| {' | '.join((name, *cells, cell(average, variance), cell(100 * share, (100 / whole) ** 2 * apart)))} |"


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser("benchmarks.zeroshot", description="Three zero-shot tasks.")
    parser.add_argument("models", metavar="MODEL", nargs="+")
    parser.add_argument("--text", required=True, help="text file for the first two tasks")
    parser.add_argument("--rows", required=True, help="rows for the third")
    parser.add_argument("--items", type=int, default=300, help="of each task at most (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing of items (default 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    items = make_items(options.text, options.rows, options.items, options.seed)
    print(f"| model | {' | '.join(TASKS)} | average | % of the first |\n|{'---|' * (len(TASKS) + 3)}")
    print(f"| items | {' | '.join(str(len(found)) for found in items)} | | |")
    print(f"| chance | {' | '.join(f'{chance:.0f}' for chance in TASKS.values())} | | |", flush=True)
    first: list[np.ndarray] = []
    for name in options.models:
        found = outcomes(load(name), items)
        first = first or found
        print(line(name, found, first), flush=True)


if __name__ == "__main__":
    main()
