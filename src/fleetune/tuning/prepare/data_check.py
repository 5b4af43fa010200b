"""Look at rows before anything is trained on them: how long they are, who holds them, which repeat others, what is masked.

Without a model, lengths are counted in words; with one, in tokens of its tokenizer, and no weights are loaded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from fleetune.common.display import counted
from fleetune.common.events import DataChecked, Lengths, RowShown
from fleetune.data import partition, sources
from fleetune.data.forms import Example
from fleetune.tuning.recipe import recipe as recipes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fleetune.data.encode import Cut

CLIENTS: Final = 8  # where neither the recipe nor the data say how many, as most methods have them
LABELS: Final = 40  # different answers at most that are labels
LETTERS: Final = 700  # of a part of a row that is shown


class _Measured(NamedTuple):
    """Length of every row, in `unit`, and the text of the rows that are shown: (not trained, trained)."""

    unit: str
    lengths: Sequence[int]
    texts: Sequence[tuple[str, str]]
    cut: Cut | None = None
    pieces: int | None = None  # rows once long texts are cut into several
    template: Sequence[str] = ()  # what is said of the model's chat template


def check(recipe: recipes.Recipe, model: str = "", *, offline: bool = False) -> DataChecked:
    """Return what the rows of a recipe are; its model is not used, but for the tokenizer of `model` where one is given.

    DataError and RecipeError as `tune` raises them for the rows.
    """
    with sources.borrowed(recipe.data) as source:
        rows = partition.RowsSpec(**{**vars(recipes.rows_of(recipe)), "data": source})
        parts = partition.split(rows, CLIENTS, fewer=True, offline=offline)
    examples, held = parts.examples, parts.held.tolist()
    owner = {i: c for c, part in enumerate(parts.clients) for i in part.tolist()}
    by_size = sorted(range(len(examples)), key=lambda i: len(_text(examples[i])))
    chosen = list(dict.fromkeys([0, by_size[len(by_size) // 2], by_size[-1]]))
    if model:
        found = _in_tokens(examples, chosen, model, recipe, offline)
    else:
        words = [len(_text(example).split()) for example in examples]
        found = _Measured("words", words, [_turns(examples[i]) for i in chosen])
    names = _names(parts)
    sizes, whole = sorted(found.lengths) or [0], found.cut
    return DataChecked(
        data=recipe.data,
        rows=len(examples),
        training=len(owner),
        held_out=len(held),
        lengths=Lengths(
            unit=found.unit,
            p50=_quantile(sizes, 0.5),
            p95=_quantile(sizes, 0.95),
            longest=sizes[-1],
            total=sum(sizes),
        ),
        max_length=recipe.max_length,
        pieces=found.pieces,
        cut=None if whole is None else whole.longer,
        cut_prompts=None if whole is None else whole.prompts,
        cut_answers=None if whole is None else whole.answers,
        partition=parts.partition,
        rows_per_client=[len(part) for part in parts.clients],
        clients=names,
        labels=_labels(examples),
        equal_training=len(owner) - len({examples[i].content for i in owner}),
        equal_held_out=len(parts.trained_too()),
        samples=[
            RowShown(
                row=i + 1,
                client=(names[owner[i]] if names else str(owner[i])) if i in owner else "",
                not_trained=_short(before),
                trained=_short(after),
            )
            for i, (before, after) in zip(chosen, found.texts, strict=True)
        ],
        remarks=_remarks(parts, found, recipe.max_length),
    )


def _remarks(parts: partition.Split, found: _Measured, max_length: int) -> list[str]:
    rows = len(parts.examples)
    said = list(parts.notes)
    if found.cut:
        from fleetune.data.encode import cut_remarks  # torch, which words need not

        said = cut_remarks(parts.notes, rows, rows - len(found.lengths), found.cut, max_length)
    if found.pieces and found.pieces > rows:
        said.append(f"the {rows:,} texts become {found.pieces:,} rows of at most max_length={max_length}")
    said += [*found.template, *parts.about_held()]
    if small := sum(len(part) < 2 for part in parts.clients):
        has = "has" if small == 1 else "have"
        said.append(f"{small:,} of {counted(len(parts.clients), 'client')} {has} a single row")
    return said


def about_template(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[str]:
    """Say which system sentence the model's chat template writes into rows that have none; [] for none."""
    from fleetune.models.net.chat_template import is_plain, own_system  # torch

    bare = any(example.messages and example.messages[0][0] == "user" for example in examples)
    if not bare or is_plain(tokenizer) or not (text := own_system(tokenizer)):
        return []
    tokens = counted(len(tokenizer(text, add_special_tokens=False)["input_ids"]), "token")
    return [
        f"the model's chat template puts a system sentence of {tokens} into every row without one: {_short(text)!r}; "
        "yours: --columns system=COLUMN, or --columns \"system='TEXT'\""
    ]


def _text(example: Example) -> str:
    return "\n".join([*(content for _, content in example.messages), example.response])


def _turns(example: Example) -> tuple[str, str]:
    if len(example.messages) == 1:
        return example.messages[0][1], example.response
    return "\n".join(f"{role}: {content}" for role, content in example.messages), example.response


def _in_tokens(
    examples: Sequence[Example], chosen: Sequence[int], model: str, recipe: recipes.Recipe, offline: bool
) -> _Measured:
    from fleetune import models
    from fleetune.data.encode import Cut, count_cut, encode_all, positions_of, text_lengths  # torch
    from fleetune.models.checks import is_encoder
    from fleetune.models.families import widths

    tokenizer = models.load_tokenizer(model, offline=offline)
    config = models.load_config(model, offline=offline)
    if is_encoder(config):
        net: list[PreTrainedModel] = []
        widths.class_of(config, net.append, encoder=True)  # without weights
        most = min(recipe.max_length, positions_of(net[0], tokenizer))
        lengths = list(text_lengths(tokenizer, examples))
        longer = sum(length > most for length in lengths)
        texts = [
            ("\n".join(examples[i].texts) or _turns(examples[i])[0], examples[i].response) for i in chosen
        ]
        cut = Cut(len(lengths), longer, longer, 0, max(lengths))
        return _Measured("tokens", lengths, texts, cut, len(lengths))
    rows, kept = encode_all(examples, tokenizer, recipe.max_length)
    tokens: Counter[int] = Counter()
    shown: dict[int, tuple[str, str]] = {}
    for i, row in zip(kept.tolist(), rows, strict=True):
        again = i in tokens and not examples[i].messages  # it begins with a token of the row before
        tokens[i] += len(row.ids) + row.left + row.lost - again
        if i in chosen and i not in shown:
            parts = row.ids[: row.n_prompt], row.ids[row.n_prompt :]
            before, after = (
                str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)) for ids in parts
            )
            shown[i] = before, after + (f" [.. {row.lost:,} tokens cut]" if row.lost else "")
    texts = [shown.get(i, ("(nothing that the tokenizer knows)", "")) for i in chosen]
    own = about_template(tokenizer, examples)
    return _Measured("tokens", list(tokens.values()), texts, count_cut(rows), len(rows), own)


def _names(parts: partition.Split) -> list[str]:
    if not parts.partition.startswith("column:") or parts.column is None:
        return []
    return [parts.examples[int(part[0])].meta[parts.column] for part in parts.clients]


def _labels(examples: Sequence[Example]) -> dict[str, int] | None:
    """Return the rows by answer where the answers are labels: few, and each of several rows."""
    counts = Counter(example.response.strip() for example in examples)
    labelled = all(example.texts for example in examples)
    few = len(counts) <= min(LABELS, len(examples) // 5) and all(len(word) <= 40 for word in counts)
    return dict(counts.most_common(LABELS)) if labelled or few else None


def _quantile(ordered: Sequence[int], share: float) -> int:
    """Return the least length that so many of the rows do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _short(text: str) -> str:
    if len(text) <= LETTERS:
        return text
    half = LETTERS // 2
    return f"{text[:half]} [.. {len(text) - 2 * half:,} characters ..] {text[-half:]}"
