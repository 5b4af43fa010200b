# SPDX-License-Identifier: Apache-2.0
"""Look at rows before anything is trained on them: how long they are, who holds them, which repeat others, what is masked.

Without a model, lengths are counted in words; with one, in tokens of its tokenizer, and no weights are loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from fleetune.common.display import counted
from fleetune.data import duplicates, lengths, splitting, stdin
from fleetune.data.forms import Example
from fleetune.data.lengths import Cut, cut
from fleetune.data.splitting import Split
from fleetune.runs.events import DataChecked, Lengths, RowShown
from fleetune.tuning import recipe as recipes
from fleetune.tuning.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fleetune.data.encode import Encoded

CLIENTS: Final = 8  # where neither the recipe nor the data say how many, as most methods have them
LABELS: Final = 40  # different answers at most that are labels
LETTERS: Final = 700  # of a part of a row that is shown
TWINS: Final = 5  # pairs that are shown


class _Measured(NamedTuple):
    """Length of every row, in `unit`, and its text: (not trained, trained)."""

    unit: str
    lengths: Sequence[int]
    cut: Cut | None
    texts: Sequence[tuple[str, str]]  # of the rows that are shown
    dropped: int
    pieces: int | None = None  # rows once long texts are cut into several


def check(recipe: Recipe, model: str = "", *, offline: bool = False) -> DataChecked:
    """Return what the rows of a recipe are; its model is not used, but for the tokenizer of `model` where one is given.

    DataError and RecipeError as `tune` raises them for the rows.
    """
    with stdin.borrowed(recipe.data) as source:
        rows = splitting.Rows(**{**vars(recipes.rows_of(recipe)), "data": source})
        parts = splitting.split(rows, CLIENTS, fewer=True, offline=offline)
    examples, held = parts.examples, parts.held.tolist()
    training = sorted(i for part in parts.clients for i in part.tolist())
    chosen = _chosen(examples)
    measured = _in_tokens(examples, chosen, model, recipe, offline) if model else _in_words(examples, chosen)
    found = duplicates.find(examples, training, held)
    owner = {i: c for c, part in enumerate(parts.clients) for i in part.tolist()}
    names = _names(parts)
    whole = measured.cut
    sizes = np.sort(np.array(measured.lengths or [0]))
    pairs = [*found.equal_held_out, *found.near_held_out]
    return DataChecked(
        data=recipe.data, rows=len(examples), training=len(training), held_out=len(held),
        lengths=Lengths(
            unit=measured.unit, p50=_quantile(sizes, 0.5), p95=_quantile(sizes, 0.95), longest=int(sizes[-1]),
            total=int(sizes.sum()),
        ),
        max_length=recipe.max_length, pieces=measured.pieces, cut=None if whole is None else whole.longer,
        cut_prompts=None if whole is None else whole.prompts,
        cut_answers=None if whole is None else whole.answers, partition=parts.partition,
        rows_per_client=[len(part) for part in parts.clients], clients=names, labels=_labels(examples),
        equal_training=len(found.equal_training), equal_held_out=len(found.equal_held_out),
        near_training=len(found.near_training), near_held_out=len(found.near_held_out),
        near_share=duplicates.LIKE, compared=found.compared,
        twins=[[twin.row + 1, twin.of + 1] for twin in pairs[:TWINS]],
        samples=[
            RowShown(
                row=i + 1, client=(names[owner[i]] if names else str(owner[i])) if i in owner else "",
                not_trained=_short(before), trained=_short(after),
            )
            for i, (before, after) in zip(chosen, measured.texts, strict=True)
        ],
        remarks=_remarks(parts, training, measured, found, recipe.max_length),
    )  # fmt: skip


def _remarks(
    parts: Split, training: Sequence[int], measured: _Measured, found: duplicates.Duplicates, max_length: int
) -> list[str]:
    """Say what is worth to be looked at."""
    rows = len(parts.examples)
    whole = measured.cut or Cut(rows, 0, 0, 0, 0)
    said = lengths.remarks(parts.notes, rows, measured.dropped, whole, max_length)
    if unused := len(parts.examples) - len(training) - len(parts.held):
        said.append(f"{counted(unused, 'row')} {'belongs' if unused == 1 else 'belong'} to no client")
    if again := len(found.equal_held_out) + len(found.near_held_out):
        said.append(
            f"{again:,} of {len(parts.held):,} held-out rows are trained on too, or nearly so: the held-out loss flatters"
        )
    if found.compared < found.rows:
        said.append(
            f"rows are so alike that the search for nearly equal ones ended after {found.compared:,} of {found.rows:,}"
        )
    if small := sum(len(part) < 2 for part in parts.clients):
        said.append(
            f"{small:,} of {counted(len(parts.clients), 'client')} {'has' if small == 1 else 'have'} a single row"
        )
    return said


def _chosen(examples: Sequence[Example]) -> list[int]:
    """Return the rows that are shown: the first, one of middle length, the longest."""
    by_size = sorted(range(len(examples)), key=lambda i: (_letters(examples[i]), i))
    return list(dict.fromkeys([0, by_size[len(by_size) // 2], by_size[-1]]))


def _letters(example: Example) -> int:
    return len(example.response) + sum(len(content) for _, content in example.messages)


def _in_words(examples: Sequence[Example], chosen: Sequence[int]) -> _Measured:
    lengths = [
        sum(len(text.split()) for text in (*(content for _, content in e.messages), e.response))
        for e in examples
    ]
    texts = [_turns(examples[i]) for i in chosen]
    return _Measured("words", lengths, None, texts, 0)


def _turns(example: Example) -> tuple[str, str]:
    if len(example.messages) == 1:
        return example.messages[0][1], example.response
    return "\n".join(f"{role}: {content}" for role, content in example.messages), example.response


def _in_tokens(
    examples: Sequence[Example], chosen: Sequence[int], model: str, recipe: Recipe, offline: bool
) -> _Measured:
    from fleetune import models
    from fleetune.models.hf_folder import is_encoder

    tokenizer = models.load_tokenizer(model, offline=offline)
    config = models.load_config(model, offline=offline)
    if is_encoder(config):
        return _for_encoder(examples, chosen, tokenizer, config, recipe.max_length)
    from fleetune.data.encode import encode_all

    rows, kept = encode_all(examples, tokenizer, recipe.max_length)
    lengths: Counter[int] = Counter()
    shown: dict[int, tuple[str, str]] = {}
    for i, row in zip(kept.tolist(), rows, strict=True):
        again = (
            i in lengths and not examples[i].messages
        )  # rows of a text begin with a token of the row before
        lengths[i] += len(row.ids) + row.left + row.lost - again
        if i in chosen and i not in shown:
            shown[i] = _rendered(tokenizer, row)
    texts = [shown.get(i, ("(nothing that the tokenizer knows)", "")) for i in chosen]
    dropped = len(examples) - len(lengths)
    return _Measured("tokens", list(lengths.values()), cut(rows), texts, dropped, len(rows))


def _rendered(tokenizer: PreTrainedTokenizerBase, row: Encoded) -> tuple[str, str]:
    """Return the part without loss and the part with it, and where tokens were cut."""
    prompt, answer = row.ids[: row.n_prompt], row.ids[row.n_prompt :]
    if row.left:
        half = row.n_prompt // 2
        gap = f" [.. {row.left:,} tokens cut ..] "
        before = _decoded(tokenizer, prompt[:half]) + gap + _decoded(tokenizer, prompt[half:])
    else:
        before = _decoded(tokenizer, prompt)
    return before, _decoded(tokenizer, answer) + (f" [.. {row.lost:,} tokens cut]" if row.lost else "")


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def _for_encoder(
    examples: Sequence[Example],
    chosen: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    max_length: int,
) -> _Measured:
    from fleetune.data.labelled import positions_of, text_lengths
    from fleetune.models import encoders

    net: list[PreTrainedModel] = []
    encoders.class_of(config, net.append)  # without weights
    lengths = list(text_lengths(tokenizer, examples))
    most = min(max_length, positions_of(net[0], tokenizer))
    longer = sum(length > most for length in lengths)
    texts = [("\n".join(examples[i].texts) or _turns(examples[i])[0], examples[i].response) for i in chosen]
    return _Measured(
        "tokens", lengths, Cut(len(lengths), longer, longer, 0, max(lengths)), texts, 0, len(lengths)
    )


def _names(parts: Split) -> list[str]:
    """Return the clients' names where they are the values of a column, in order; else none."""
    if not parts.partition.startswith("column:") or parts.column is None:
        return []
    return [parts.examples[int(part[0])].meta[parts.column] for part in parts.clients]


def _labels(examples: Sequence[Example]) -> dict[str, int] | None:
    """Return the rows by answer where the answers are labels: few, and each of several rows."""
    counts = Counter(example.response.strip() for example in examples)
    labelled = all(example.texts for example in examples)
    few = (
        len(counts) <= LABELS and len(counts) * 5 <= len(examples) and all(len(word) <= 40 for word in counts)
    )
    return dict(counts.most_common(LABELS)) if labelled or few else None


def _quantile(ordered: np.ndarray, share: float) -> int:
    """Return the least length that so many of the rows do not exceed."""
    return int(ordered[max(0, int(np.ceil(share * len(ordered))) - 1)])


def _short(text: str) -> str:
    if len(text) <= LETTERS:
        return text
    half = LETTERS // 2
    return f"{text[:half]} [.. {len(text) - 2 * half:,} characters ..] {text[-half:]}"
