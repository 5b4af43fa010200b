"""Encode examples as tokens with a loss mask, and a client's rows as batches.

A prompt is written by the chat template up to the assistant's marker, as in generation (`prompt_ids`); without a template, by the
plain form (`models/net/chat_template.py`).  The loss is on the answer, up to and with one end-of-turn token.  Where the prompt's
tokens do not begin those of the whole conversation, the answer's text is tokenised on its own.  A long plain text becomes several
rows, each of which begins with the last token of the row before it, so that every token but the first bears the loss once.  A row
longer than `max_length` loses the middle of its prompt, down to a quarter of `max_length`, then the end of its answer; an
encoder's row loses tokens from the end of its longer text.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fleetune.common.display import counted
from fleetune.common.hearing import heard
from fleetune.data.forms import Example
from fleetune.data.partition import keyed_order
from fleetune.errors import DataError
from fleetune.models.families.foreign import reason
from fleetune.models.net.chat_template import LINE, is_plain
from fleetune.privacy.mechanism import Privacy, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fleetune.models.net.model import Model


log = logging.getLogger(__name__)

MASKED = -100  # the label that torch's cross-entropy leaves out
CHUNK = 512  # rows given to the tokenizer at once
# Some templates (Llama 3.2) write today's date unless they get one; a run must not depend on its day.
DATE = "26 Jul 2024"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as tokens: `ids` [T] int32, of which the first `n_prompt` bear no loss.

    `lost` tokens of the answer, and `left` of the prompt, did not fit; of an encoder's row `left` of its texts.

    A row for an encoder has a `target`, the index of its label word, and `segments` [T] where
    the tokenizer tells the texts of a pair apart.
    """

    ids: npt.NDArray[np.int32]
    n_prompt: int
    segments: npt.NDArray[np.int32] | None = None
    target: int | None = None
    lost: int = 0
    left: int = 0


class Batch(NamedTuple):
    """Rows padded on the right to the longest: int64 [B, T] each; `labels` is -100 where there is no loss.

    Packed, rows of so many tokens (`lengths`) stand behind one another: int64 [1, sum of lengths].

    For an encoder, `labels` holds the index of each row's label word, int64 [B], and `token_type_ids` tells the texts of a
    pair apart, where the tokenizer does.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    token_type_ids: torch.Tensor | None = None
    drawn: Drawn | None = None  # where rows are hidden
    lengths: tuple[int, ...] = ()

    def single_rows(self) -> Iterator[Batch]:
        """Yield each row that counts as a batch without padding on its right."""
        for i in range(len(self.labels) if self.drawn is None else self.drawn.rows):
            width, ids, labels = (
                int(self.attention_mask[i].sum()),
                self.token_type_ids,
                self.labels[i : i + 1],
            )
            yield Batch(
                self.input_ids[i : i + 1, :width],
                self.attention_mask[i : i + 1, :width],
                labels[:, :width] if labels.ndim == 2 else labels,
                None if ids is None else ids[i : i + 1, :width],
            )


class Drawn(NamedTuple):
    """A Poisson sample of rows: how their sum is released, and how many there are; of a batch of none, the row is not counted."""

    privacy: Privacy
    rows: int


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Encode one example in at most `max_length` tokens (see the module docstring).

    DataError when the chat template refuses the conversation, or no token of the answer is left.
    """
    rows, _ = encode_all([example], tokenizer, max_length)
    if not rows:
        raise DataError(
            f"no token of the answer is left: {example.response[:40]!r}",
            hint="the tokenizer knows none of its characters; leave the row out or use another model",
        )
    return rows[0]


def encode_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Encoded], npt.NDArray[np.int64]]:
    """Encode all examples; return the encoded rows, and the index in `examples` of each.  A long text gives several rows.

    Rows of whose answer no token is left are dropped, and their number logged.  DataError as for `encode`.
    """
    _check_length(max_length)
    marks = _marks(tokenizer)
    rows: list[Encoded] = []
    indices: list[int] = []
    dropped = 0
    for start, end in _chunks(examples):
        for index, (prompt, answer) in enumerate(_pieces(examples[start:end], start, tokenizer), start):
            answer, has_text = _close(answer, tokenizer, marks)
            made = []
            if has_text and not examples[index].messages:
                parts = split_text([*prompt, *answer], max_length)
                made = [Encoded(np.array(part, dtype=np.int32), 1) for part in parts]
            elif has_text:
                made = [_fit(prompt, answer, max_length)]
            rows += made
            indices += [index] * len(made)
            dropped += not made
    if dropped:
        log.warning("%d of %d rows dropped: no token of the answer is left", dropped, len(examples))
    if cut := sum(row.lost + row.left > 0 for row in rows):
        log.info("%d of %d rows cut to %d tokens", cut, len(rows), max_length)
    return rows, np.array(indices, dtype=np.int64)


def prompt_ids(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> npt.NDArray[np.int32]:
    """Return the prompt's tokens [T] int32 up to and with the assistant's marker, its middle cut to `max_length`."""
    _check_length(max_length)
    example = begun(example)
    plain = is_text(example)
    (ids,) = _tokens(tokenizer, [_render(example, tokenizer, 0)[0]], plain=plain or is_plain(tokenizer))
    return np.array(_cut_middle(ids, max_length), dtype=np.int32)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end an answer: the end-of-turn token of encoded rows and the end-of-text token.

    They differ in some families (Gemma, Phi), where generation that waits for the latter would run on.
    """
    ends = {end_id(tokenizer), tokenizer.eos_token_id}
    return tuple(sorted(end for end in ends if end is not None))


def end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that is the last of every encoded answer; None where neither template nor tokenizer has one."""
    last = int(encode(Example((("user", "a"),), "a"), tokenizer, 1 << 20).ids[-1])
    return last if last in _marks(tokenizer) | {tokenizer.eos_token_id} else None


def collate(rows: Sequence[Encoded], pad_id: int, device: str | torch.device = "cpu") -> Batch:
    """Pad rows on the right with `pad_id` to the longest, as one batch on `device`."""
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), MASKED, dtype=np.int64)
    segments = np.zeros((len(rows), width), dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = row.ids
        mask[b, : len(row.ids)] = 1
        labels[b, row.n_prompt : len(row.ids)] = row.ids[row.n_prompt :]
        if row.segments is not None:
            segments[b, : len(row.ids)] = row.segments
    arrays = [ids, mask, labels]
    if rows[0].target is not None:
        arrays[2] = np.array([row.target for row in rows], dtype=np.int64)
    if rows[0].segments is not None:
        arrays.append(segments)
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    return Batch(tensors[0], tensors[1], tensors[2], tensors[3] if len(tensors) > 3 else None)


def pack(rows: Sequence[Encoded], device: str | torch.device = "cpu") -> Batch:
    """Put rows behind one another."""
    ids = np.concatenate([row.ids for row in rows]).astype(np.int64)
    # nothing predicts a row's first token
    labels = [np.where(np.arange(len(r.ids)) < max(1, r.n_prompt), MASKED, r.ids) for r in rows]
    arrays = ids, np.ones_like(ids), np.concatenate(labels).astype(np.int64)
    tensors = [torch.from_numpy(array[None]).to(device) for array in arrays]
    return Batch(tensors[0], tensors[1], tensors[2], lengths=tuple(len(row.ids) for row in rows))


def digest(parts: Iterable[Iterable[Encoded]]) -> str:
    """SHA-256 of encoded rows, and of how they are split."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(b"part")
        for row in part:
            sha.update(f"{len(row.ids)} {row.n_prompt} {row.target} ".encode() + row.ids.tobytes())
            if row.segments is not None:
                sha.update(row.segments.tobytes())
    return sha.hexdigest()


class Batches:
    """One client's rows for one round, in an order fixed by a 64-bit key.

    Pass p over the rows goes in the order `keyed_order(key, p, n)`, the same on every platform.  `n` is the
    number of rows, `client` the client's number in the fleet.  `on_step(client, step)` is called before each batch, and may
    raise; `taken` counts the batches, `tokens` those of their rows (prompts included, padding not).
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        pad_id: int,
        key: int,
        device: str | torch.device = "cpu",
        client: int = 0,
        private: Privacy | None = None,
    ) -> None:
        """Take a client's rows; DataError if there are none.  `private` hides each: batches are then Poisson samples."""
        if not rows:
            raise DataError("no rows for a client", hint="use fewer clients, or more data")
        self.n, self.client = len(rows), client
        self.step = self.taken = self.tokens = 0
        self.on_step: Callable[[int, int], None] = lambda client, step: None
        self.private = private
        self.packed = 0  # rows of at most so many tokens come packed
        self._rows = rows
        self._pad_id = pad_id
        self._key = key
        self._device = device

    def steps(self, count: int, batch_size: int) -> Iterator[Batch]:
        """Yield exactly `count` batches of min(batch_size, n) rows, taken from one pass after the other.

        A batch may end one pass and begin the next, so that all batches are of one size.
        """
        size = min(batch_size, self.n)
        if self.private is not None:
            yield from self._samples(count)
            return
        queue: list[int] = []
        number = 0
        for self.step in range(count):
            while len(queue) < size:
                queue += self._order(number)
                number += 1
            yield self._counted(self._batch(queue[:size]))
            del queue[:size]

    def epochs(self, epochs: int, batch_size: int) -> Iterator[Batch]:
        """Yield batches of every row once per epoch; the last batch of an epoch may be smaller."""
        if self.private is not None:
            yield from self._samples(epochs * -(-self.n // batch_size))
            return
        self.step = -1
        for epoch in range(epochs):
            order = self._order(epoch)
            for start in range(0, self.n, batch_size):
                self.step += 1
                yield self._counted(self._batch(order[start : start + batch_size]))

    def repeat_batch(self, number: int, batch_size: int, count: int) -> Iterator[Batch]:
        """Yield batch `number` of this client `count` times: the same rows in every round.

        Batches follow one another as in `steps`, in an order that does not depend on the round.
        """
        size = min(batch_size, self.n)
        first, begin = divmod(number * size, self.n)
        orders = [keyed_order(0, first + more, self.n) for more in range(1 + (begin + size > self.n))]
        batch = self._batch(np.concatenate(orders)[begin : begin + size].tolist())
        for self.step in range(count):
            yield self._counted(batch)

    def _samples(self, count: int) -> Iterator[Batch]:
        """Yield so many batches, each of every row with the probability of `private`, by a draw that nobody can repeat."""
        assert self.private is not None
        for self.step in range(count):
            rows = sample(range(self.n), self.private.q)
            yield self._counted(self._batch(rows or [0])._replace(drawn=Drawn(self.private, len(rows))))

    def heard(self) -> None:
        """Report the step that is taken, or that goes on: `on_step` may raise."""
        self.on_step(self.client, self.step)

    def _counted(self, batch: Batch) -> Batch:
        self.heard()
        self.taken += 1
        self.tokens += int(batch.attention_mask.sum())
        return batch

    def _order(self, number: int) -> list[int]:
        order: list[int] = keyed_order(self._key, number, self.n).tolist()
        return order

    def _batch(self, indices: Sequence[int]) -> Batch:
        rows = [self._rows[i] for i in indices]
        if max(len(row.ids) for row in rows) <= self.packed:
            return pack(rows, self._device)
        return collate(rows, self._pad_id, self._device)


def _check_length(max_length: int) -> None:
    if max_length < 2:
        raise DataError(
            f"max_length must be at least 2 tokens, got {max_length}", hint="256 to 1024 is usual"
        )


def _render(example: Example, tokenizer: PreTrainedTokenizerBase, index: int) -> tuple[str, str]:
    if is_text(example):
        prompt = "".join(content for _, content in example.messages)
        return prompt, prompt + example.response
    if is_plain(tokenizer):
        prompt = "".join(LINE.format(content) for _, content in example.messages)
        return prompt, prompt + example.response
    turns = [{"role": role, "content": content} for role, content in example.messages]
    answer = {"role": "assistant", "content": example.response}
    try:
        return (
            tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, date_string=DATE
            ),
            tokenizer.apply_chat_template([*turns, answer], tokenize=False, date_string=DATE),
        )
    except MemoryError:
        raise
    except Exception as error:  # a template is a program: its own refusal, or any fault of it
        raise DataError(
            f"row {index + 1}: the model's chat template refuses the conversation: {reason(error)}",
            hint="some templates take no system turn, or only user and assistant in turn; "
            "change these rows or use another model",
        ) from error


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, plain: bool) -> list[list[int]]:
    """Tokenise texts: as the template wrote them; `plain` ones with the start the tokenizer gives a text."""
    lists = _raw_tokens(tokenizer, texts, special=plain)
    eos = tokenizer.eos_token_id
    return [ids[:-1] if plain and ids and ids[-1] == eos else ids for ids in lists]


def _raw_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool
) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return ids


def _chunks(examples: Sequence[Example]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of examples that are tokenised at once: plain texts, or others."""
    start = 0
    for i in range(1, len(examples) + 1):
        if i == len(examples) or i - start == CHUNK or is_text(examples[i]) != is_text(examples[start]):
            heard()
            yield start, i
            start = i


def _pieces(
    chunk: Sequence[Example], start: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the prompt's and the answer's tokens of each example of a chunk, whose first is row `start`."""
    texts = [_render(example, tokenizer, start + i) for i, example in enumerate(chunk)]
    plain = is_plain(tokenizer) or is_text(chunk[0])
    prompts = _tokens(tokenizer, [prompt for prompt, _ in texts], plain=plain)
    wholes = _tokens(tokenizer, [whole for _, whole in texts], plain=plain)
    for example, text, prompt, whole in zip(chunk, texts, prompts, wholes, strict=True):
        if whole[: len(prompt)] == prompt:
            yield prompt, whole[len(prompt) :]
        else:
            yield prompt, _raw_tokens(tokenizer, [_answer_text(example, *text)], special=False)[0]


def _answer_text(example: Example, prompt: str, whole: str) -> str:
    """Return the answer's text within the whole conversation, with its end marker."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    at = whole.rfind(example.response.strip())  # templates may strip what they are given, no more
    return whole[at:] if at >= 0 else example.response


def _marks(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that a template may write at the end of a turn: all special ones but 'unknown'."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset((special | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id})


def _close(
    answer: list[int], tokenizer: PreTrainedTokenizerBase, marks: frozenset[int]
) -> tuple[list[int], bool]:
    """Return the answer with one end-of-turn token as its last, and whether it has any other token.

    Anything that a template writes after that token (a line break, a second end) is cut.  If it writes no such token, the
    end-of-text token is added, if the tokenizer has one.
    """
    text_end = len(answer)
    end = None
    while text_end > 0:
        token = answer[text_end - 1]
        if token in marks:
            end = text_end
        elif tokenizer.decode([token]).strip():
            break
        text_end -= 1
    if end is not None:
        return answer[:end], text_end > 0
    eos = tokenizer.eos_token_id
    return (answer if eos is None else [*answer, eos]), text_end > 0


def _fit(prompt: list[int], answer: list[int], max_length: int) -> Encoded:
    """Cut prompt and answer to `max_length` tokens: first the prompt, down to a quarter of them."""
    least = min(len(prompt), max(1, max_length // 4))
    kept = answer[: max_length - least]
    begin = _cut_middle(prompt, max_length - len(kept))
    return Encoded(
        np.array(begin + kept, dtype=np.int32),
        len(begin),
        lost=len(answer) - len(kept),
        left=len(prompt) - len(begin),
    )


def _cut_middle(ids: list[int], room: int) -> list[int]:
    """Return the first and last tokens of `ids`, `room` in all, the odd one at the end."""
    if len(ids) <= room:
        return ids
    return ids[: room // 2] + ids[len(ids) - (room + 1) // 2 :]


OPENING: Final = "text"  # the speaker of a text's begin, which no template writes
LONGEST: Final = 200  # letters of a begin that the model is given to continue


def is_text(example: Example) -> bool:
    """Whether an example is a plain text, or the begin of one."""
    return not example.messages or example.messages[0][0] == OPENING


def begun(example: Example) -> Example:
    """Return a plain text as its begin, which is the prompt, and the rest, which is the answer; others as they are."""
    if example.messages:
        return example
    text = example.response
    half = max(1, min(len(text) // 2, LONGEST))
    at = text.rfind(" ", 1, half + 1)
    at = at if at > 0 else half
    return replace(example, messages=((OPENING, text[:at]),), response=text[at:])


def split_text(ids: Sequence[int], max_length: int) -> Iterator[Sequence[int]]:
    """Yield the tokens of a text's rows, at most `max_length` in each; the first of a row bears no loss."""
    for start in range(0, max(1, len(ids) - 1), max_length - 1):
        yield ids[start : start + max_length]


def encode_rows(
    model: Model, examples: Sequence[Example], max_length: int
) -> tuple[list[Encoded], npt.NDArray[np.int64]]:
    """Return the examples as `model` reads them, and the index of each row's example (see `encode_all`)."""
    if not model.labels:
        return encode_all(examples, model.tokenizer, max_length)
    targets = [_target(example, model.labels) for example in examples]
    whole = text_lengths(model.tokenizer, examples)
    rows = [
        Encoded(ids, len(ids), segments, target, left=max(0, length - len(ids)))
        for (ids, segments), target, length in zip(
            encode_texts(model, examples, max_length), targets, whole, strict=True
        )
    ]
    return rows, np.arange(len(rows), dtype=np.int64)


def encode_texts(
    model: Model, examples: Sequence[Example], max_length: int
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32] | None]]:
    """Return the tokens of each example's texts, and their segments where the tokenizer has them: int32 [T] each."""
    limit = min(max_length, positions(model))
    for columns in _columns(examples):
        made = model.tokenizer(*columns, truncation=True, max_length=limit, verbose=False)
        segments = made.get("token_type_ids", itertools.repeat(None))
        for ids, segment in zip(made["input_ids"], segments, strict=False):
            yield np.array(ids, np.int32), None if segment is None else np.array(segment, np.int32)


def text_lengths(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Iterator[int]:
    """Yield how many tokens each example has before it is cut."""
    for columns in _columns(examples):
        yield from map(len, tokenizer(*columns, verbose=False)["input_ids"])


def _columns(examples: Sequence[Example]) -> Iterator[list[list[str]]]:
    """Yield the texts of examples as the tokenizer takes them at once: one list, or two of pairs."""
    texts = [
        example.texts or ("\n".join(content for _, content in example.messages),) for example in examples
    ]
    for start in range(0, len(texts), CHUNK):
        heard()
        for _, run in itertools.groupby(texts[start : start + CHUNK], len):
            yield [list(column) for column in zip(*run, strict=True)]


def positions(model: Model) -> int:
    """Return how many tokens an encoder reads at most."""
    return positions_of(model.net, model.tokenizer)


def positions_of(net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens an encoder reads at most; `net` may be without weights.

    RoBERTa's positions begin after the padding's number.
    """
    reserved = 0
    for name, module in net.named_modules():
        if name.endswith(".position_embeddings") and getattr(module, "padding_idx", None) is not None:
            reserved = int(module.padding_idx) + 1
    table = int(getattr(net.config, "max_position_embeddings", 512))
    return min(int(tokenizer.model_max_length), table - reserved)


def check_answers(answers: Sequence[str], labels: Sequence[str], what: str, hint: str) -> None:
    """Raise DataError for an answer that is none of the label words, which `what` names."""
    known = set(labels)
    if odd := [(row, word) for row, word in enumerate(answers, 1) if word not in known]:
        row, word = odd[0]
        raise DataError(
            f"{what}: {len(odd):,} of {len(answers):,} rows have another answer, the first is row {row}: {word[:40]!r}",
            hint=hint,
        )


def _target(example: Example, labels: Sequence[str]) -> int:
    word = example.response.strip()
    if not example.messages:
        raise DataError(
            "a plain text has no label, and an encoder chooses among labels",
            hint="give rows with a field 'label'; a causal model can be trained on the texts",
        )
    if word not in labels:
        raise DataError(
            f"the answer {word[:40]!r} is not one of the label words {', '.join(labels)}",
            hint="name all label words with --labels, or leave the option out to take them from the data",
        )
    return labels.index(word)


@dataclass(frozen=True)
class Cut:
    """How many rows were cut, and where."""

    rows: int  # all rows
    longer: int  # rows that are cut
    prompts: int  # of these, rows that lose the middle of the prompt (an encoder's: the end of a text)
    answers: int  # of these, rows that lose the end of the answer
    longest: int  # tokens of the longest row before it is cut

    def told(self, max_length: int) -> str:
        """Say what is cut; "" where nothing is."""
        if not self.longer:
            return ""
        parts = [f"the prompt of {self.prompts:,}"] * (self.prompts > 0)
        parts += [f"the answer of {self.answers:,}"] * (self.answers > 0)
        verb = "is" if self.longer == 1 else "are"
        return (
            f"{self.longer:,} of {counted(self.rows, 'row')} {verb} longer than max_length={max_length} and {verb} cut: "
            f"{', '.join(parts)}; "
            f"the longest has {self.longest:,} tokens"
        )


def cut_remarks(notes: Sequence[str], rows: int, dropped: int, cut: Cut, max_length: int) -> list[str]:
    """Say what of `rows` rows was left out (`notes`, and `dropped` ones), and what is cut; [] where all are whole."""
    found = list(notes)
    if dropped:
        found.append(
            f"{dropped:,} of {counted(rows, 'row')} {'is' if dropped == 1 else 'are'} left out: "
            "the tokenizer knows nothing of their answers"
        )
    return found + [told for told in [cut.told(max_length)] if told]


def count_cut(rows: Iterable[Encoded]) -> Cut:
    """Count what of encoded rows did not fit."""
    count = longer = prompts = answers = longest = 0
    for row in rows:
        count += 1
        longer += row.left + row.lost > 0
        prompts += row.left > 0
        answers += row.lost > 0
        longest = max(longest, len(row.ids) + row.left + row.lost)
    return Cut(count, longer, prompts, answers, longest)
