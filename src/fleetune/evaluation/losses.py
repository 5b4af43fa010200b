"""Compute cross-entropy (nats a token; of an encoder: of its label word) and perplexity of a model on rows and on plain text.

Every number is a function of the weights and the rows alone: eval mode, no random numbers, float64 sums, and neither batch size
nor padding changes a value by more than float noise.  The model is always called as a module (`net(...)`), so that forward hooks
and PEFT layers take part.  A short-lived hook takes the output head's inputs at the scored positions alone, and their loss is
computed in pieces (`head_loss`): logits of all positions would be the memory of an evaluation.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fleetune.common.display import counted
from fleetune.common.memory import give_back
from fleetune.data.encode import MASKED, Batch, Encoded, collate
from fleetune.errors import DataError, RecipeError
from fleetune.evaluation import kl_divergence
from fleetune.evaluation.head_loss import LogitChange, head_nll, logits_of, nll, stated, tokens_a_piece
from fleetune.models.net.model import Model
from fleetune.models.net.packed import positions

OnRows = Callable[[int, int], None]  # called with the rows that are done, and the number of all rows

_UNKNOWN: Final = LogitChange("", math.nan)  # stands for a change that is not one of `head_loss`
# nets that change the logits after their head, which was seen when they ran, and how
_CHANGED: WeakKeyDictionary[nn.Module, LogitChange] = WeakKeyDictionary()


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Run the body in eval mode without gradients; restore every module's training flag afterwards."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


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
        """Return the logits of one forward: [1, min(N, limit), V], or [B, T, V] where the head was not caught."""
        hooks = []
        if head is not None:
            # First in, last out: hooks that others have put on the head see exactly what the head sees.
            hooks.append(head.register_forward_pre_hook(self.before, prepend=True))
            hooks.append(head.register_forward_hook(self.after))
        try:
            at = positions(base_of(net), batch.lengths)
            where = {"attention_mask": batch.attention_mask} if at is None else {"position_ids": at}
            out = net(input_ids=batch.input_ids, **where, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return cast(Tensor, out.logits)


def base_of(net: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside `net` (which PEFT may have wrapped)."""
    for module in net.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"{type(net).__name__} holds no Hugging Face model")


def class_logits(net: nn.Module, batch: Batch) -> Tensor:
    """Return an encoder's logits of each row's label words: float32 [B, C]."""
    more = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    out = net(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more)
    return cast(Tensor, out.logits.float())


def token_losses(net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy (nats) of each scored token, and its row: float32 [N], int64 [N], in row order.

    A row for an encoder scores one thing, its label word.

    The label at position t is predicted at t-1, so a label at position 0 is never scored.  The head runs over
    the N predicting positions in pieces (`head_loss`).  A model that changes the logits after its head is run
    again the first time, to see how; where that is not one of `head_loss`, it is run with all N in one.  With
    gradients enabled the result can be back-propagated.
    """
    if batch.labels.ndim == 1:
        rows = torch.arange(len(batch.labels), device=batch.labels.device)
        return nll(class_logits(net, batch), batch.labels), rows
    wanted = F.pad(batch.labels[:, 1:] != MASKED, (0, 1))
    targets = batch.labels[:, 1:][wanted[:, :-1]]
    places = wanted.nonzero()
    base = base_of(net)
    head = base.get_output_embeddings()
    way = _CHANGED.get(base)
    narrow = _Narrow(wanted, len(targets) if way is _UNKNOWN else 0)
    logits = narrow.run(net, head, batch)
    inputs = narrow.rows
    if inputs is None:
        logits = logits[:, -wanted.shape[1] :]
        size = tokens_a_piece(logits.shape[-1])
        parts = [
            nll(logits[at[:, 0], at[:, 1]], target)
            for at, target in zip(torch.split(places, size), torch.split(targets, size), strict=True)
        ]
        return torch.cat(parts), places[:, 0]
    if logits is narrow.output:
        _CHANGED.pop(base, None)
        return head_nll(cast(nn.Module, head), inputs, targets, logits.shape[-1]), places[:, 0]
    if way is _UNKNOWN:
        return nll(logits[0], targets), places[:, 0]
    if way is None or way != stated(base.config):
        if stated(base.config) is not None:
            narrow = _Narrow(wanted, 1)
            with torch.no_grad():
                logits = narrow.run(net, head, batch)
        _CHANGED[base] = _change_of(base, narrow.output, logits)
        del narrow, logits, inputs
        return token_losses(net, batch)
    return head_nll(cast(nn.Module, head), inputs, targets, logits.shape[-1], way), places[:, 0]


def _change_of(base: PreTrainedModel, output: Tensor | None, logits: Tensor) -> LogitChange:
    """Return what a model did to the `output` of its head to make `logits` of it: what its configuration states, or unknown."""
    change = stated(base.config)
    if change is None or output is None:
        return _UNKNOWN
    with torch.no_grad():
        return change if torch.equal(change(output), logits) else _UNKNOWN


def predictors(net: nn.Module, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the inputs of the N scored tokens' prediction, and a function from any n of these to logits [n, V].

    These are the head's inputs [N, H] and the head, with what the model does to the logits after it.  Where that is not known
    (see `token_losses`) they are all logits [N, V] and the identity.  Runs under the current gradient setting.
    """
    wanted = F.pad(batch.labels[:, 1:] != MASKED, (0, 1))
    head = cast(nn.Module, base_of(net).get_output_embeddings())
    narrow = _Narrow(wanted, 1)
    logits = narrow.run(net, head, batch)
    if narrow.rows is not None and narrow.output is not None:
        change = None if logits is narrow.output else _change_of(base_of(net), narrow.output, logits)
        if change is not _UNKNOWN:
            return narrow.rows, lambda rows: logits_of(head, rows, change)
    narrow = _Narrow(wanted, int(wanted.sum()))
    logits = narrow.run(net, head, batch)
    rows = logits[:, -wanted.shape[1] :][wanted] if narrow.rows is None else logits[0]
    return rows, lambda rows: rows


def row_losses(model: Model, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed cross-entropy (nats) and the number of scored tokens of each row: float64 [B], int64 [B].

    Scored are the positions with a label other than -100, except position 0, which nothing predicts.  Packed rows are one.
    """
    with eval_mode(model.net):
        losses, rows = token_losses(model.net, batch)
    size, at = len(batch.labels), rows.cpu().numpy()
    sums = np.bincount(at, weights=losses.cpu().numpy().astype(np.float64), minlength=size)
    return sums, np.bincount(at, minlength=size)


def batch_loss(model: Model, batch: Batch) -> float:
    """Return the mean cross-entropy over the response tokens of one batch, in nats (one forward, float64 sum).

    NaN when the batch has no scored token.
    """
    sums, counts = row_losses(model, batch)
    return float(sums.sum() / counts.sum()) if counts.sum() else math.nan


def pad_id(model: Model) -> int:
    """Return a padding token; it is masked everywhere, so any id in the vocabulary would do."""
    for token in (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def unheard(done: int, total: int) -> None:
    """Take no notice of how many rows are done."""


def all_row_losses(
    model: Model, rows: Sequence[Encoded], batch_size: int, on_rows: OnRows = unheard
) -> tuple[np.ndarray, np.ndarray]:
    """Compute `row_losses` of any number of rows; `on_rows` is called after each batch."""
    sums, counts, done = np.zeros(len(rows)), np.zeros(len(rows), np.int64), 0
    give_back()  # what a training step or an answer left, so that this does not come on top of it
    for at, batch in _longest_first(model, rows, batch_size):
        sums[at], counts[at] = row_losses(model, batch)
        done += len(at)
        on_rows(done, len(rows))
    return sums, counts


def _longest_first(
    model: Model, rows: Sequence[Encoded], batch_size: int
) -> Iterator[tuple[list[int], Batch]]:
    """Yield batches of all rows with their indices, longest first: little padding, and memory peaks at the start."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    for start in range(0, len(order), batch_size):
        at = order[start : start + batch_size]
        yield at, collate([rows[i] for i in at], pad_id(model), model.device)


def all_class_logits(model: Model, rows: Sequence[Encoded], batch_size: int = 8) -> np.ndarray:
    """Compute `class_logits` of any number of rows, in their order: float64 [N, C]."""
    logits = np.zeros((len(rows), len(model.labels)))
    with eval_mode(model.net):
        for at, batch in _longest_first(model, rows, batch_size):
            logits[at] = class_logits(model.net, batch).cpu().numpy()
    return logits


def class_rows(model: Model, rows: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    """Return an encoder's cross-entropy (nats) of each row, and whether it is right: float64 [N], bool [N]."""
    logits, targets = all_class_logits(model, rows), np.array([row.target for row in rows])
    top = logits.max(1)
    losses = top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(len(rows)), targets]
    return losses, logits.argmax(1) == targets


def response_loss(
    model: Model, rows: Sequence[Encoded], *, batch_size: int = 8, on_rows: OnRows = unheard
) -> float:
    """Return the mean cross-entropy over all response tokens of `rows`, in nats; of an encoder, over the rows.

    Token-weighted: a long answer counts for more than a short one, as in training.  DataError when there is
    no response token at all.
    """
    if model.labels:
        return float(class_rows(model, rows)[0].mean())
    return token_mean(*all_row_losses(model, rows, batch_size, on_rows))


def token_mean(sums: np.ndarray, counts: np.ndarray) -> float:
    """Return the mean over all tokens of rows, from what `all_row_losses` gives; DataError when there is none."""
    if not counts.sum():
        raise DataError(
            f"no response tokens to score in {counted(len(counts), 'row')}",
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
    on_rows: OnRows = unheard,
) -> float:
    """Return exp(mean cross-entropy per token) of plain text, by windows of `window` tokens that move by `stride`.

    As in the Hugging Face guide: a window scores only the tokens that no window before it has, and the rest
    of it is their context, so each token is scored once with at least window - stride tokens before it.
    Defaults: window = the model's context, at most 1,024; stride = half of it.  Texts are separate documents:
    no window spans two.  A text is tokenised as the tokenizer does by itself: where that puts a beginning-of-
    sequence token in front, it is context only and every token of the text is scored; where it puts none,
    the text's first token is context only.  DataError when nothing is left to score.
    """
    rows = text_rows(model, texts, window=window, stride=stride)
    return row_perplexity(model, rows, batch_size=batch_size, on_rows=on_rows)


def text_rows(
    model: Model, texts: Sequence[str], *, window: int | None = None, stride: int | None = None
) -> list[Encoded]:
    """Return the windows of plain text that `perplexity` reads, as rows whose "prompt" is the context.  DataError for none."""
    length = window or min(context_length(model), 1024)
    step = stride or max(1, length // 2)
    if length < 2 or not 1 <= step < length:
        raise RecipeError(
            [f"perplexity: window {length} and stride {step} do not fit together"],
            hint="choose a window of at least 2 tokens and a stride from 1 to window - 1",
        )
    rows = [row for text in texts for row in _windows(_text_ids(model, text), length, step)]
    if not rows:
        raise DataError(f"no token to score in {counted(len(texts), 'text')}", hint="give a longer text")
    return rows


def row_perplexity(
    model: Model, rows: Sequence[Encoded], *, batch_size: int = 1, on_rows: OnRows = unheard
) -> float:
    """Return exp(mean cross-entropy per scored token) of rows; each token after a row's "prompt" is scored."""
    return perplexity_of(response_loss(model, rows, batch_size=batch_size, on_rows=on_rows))


def perplexity_of(loss: float) -> float:
    """Return exp(loss), infinite where that is no float."""
    return math.exp(loss) if loss < 700 else math.inf


def _windows(ids: np.ndarray, window: int, stride: int) -> Iterator[Encoded]:
    """Yield a text's windows as rows whose "prompt" is the context: what an earlier window has scored."""
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


def context_length(model: Model) -> int:
    """Return the longest sequence the model is made for; 2,048 where its configuration does not say."""
    return int(getattr(base_of(model.net).config.get_text_config(), "max_position_embeddings", None) or 2048)


# --- the logits of a reference ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The logits of a reference model on rows, in a file."""

    rows: Sequence[Encoded]
    path: Path
    tokens: int  # that are compared
    loss: (
        float | None
    )  # mean cross-entropy of the rows, in nats; None where only the first tokens are compared

    def compare(
        self, model: Model, on_rows: OnRows = unheard
    ) -> tuple[kl_divergence.Divergence, float | None]:
        """Compare a model with the reference, token by token; also return its `loss`.  `on_rows` is called after each row."""
        sums = list[float]()
        compared = kl_divergence.compare(self.path, scored_logits(model, self.rows, on_rows, sums))
        return compared, _mean(sums, self.rows, self.tokens)


def keep_logits(
    model: Model,
    rows: Sequence[Encoded],
    path: Path,
    hint: str = kl_divergence.FREE,
    on_rows: OnRows = unheard,
) -> Reference:
    """Write the logits of a model on rows to the file `path`; `on_rows` is called after each row.

    StorageError, with `hint`, when the disk has no room for them.
    """
    sums = list[float]()
    tokens = kl_divergence.write(path, scored_logits(model, rows, on_rows, sums), scored_tokens(rows), hint)
    return Reference(rows, path, tokens, _mean(sums, rows, tokens))


def _mean(sums: Sequence[float], rows: Sequence[Encoded], tokens: int) -> float | None:
    return math.fsum(sums) / tokens if tokens == scored_tokens(rows) else None


def scored_tokens(rows: Sequence[Encoded]) -> int:
    """Return how many tokens of rows are scored."""
    return kl_divergence.scored((row.ids, row.n_prompt) for row in rows)


def scored_logits(
    model: Model, rows: Sequence[Encoded], on_rows: OnRows = unheard, sums: list[float] | None = None
) -> Iterator[np.ndarray]:
    """Yield the logits from which the scored tokens of rows are predicted, in order, a piece at a time: float32 [n, V].

    The cross-entropy (nats) of a piece's tokens, summed, is added to the list `sums`.
    """
    for done, row in enumerate(rows, 1):
        batch = collate([row], pad_id(model), model.device)
        targets = batch.labels[:, 1:][batch.labels[:, 1:] != MASKED]
        with eval_mode(model.net):
            inputs, head = predictors(model.net, batch)
            size = tokens_a_piece(head(inputs[:1]).shape[-1])
        on_rows(done, len(rows))
        for first in range(0, len(inputs), size):
            with eval_mode(model.net):  # not while the caller has the piece
                logits = head(inputs[first : first + size]).float()
                if sums is not None:
                    sums.append(float(nll(logits, targets[first : first + size]).double().sum()))
            yield logits.cpu().numpy()
