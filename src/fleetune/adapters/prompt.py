"""Train a soft prompt: T embeddings among those of the words.

Prompt Tuning (Lester, Al-Rfou, Constant, EMNLP 2021, arXiv 2104.08691, section 2).  The embeddings start as those of T pieces of
the vocabulary (section 2.2), drawn by the seed.  In a decoder they come first, as in PEFT; in an encoder behind the first token,
whose output the classifier reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fleetune import models
from fleetune.adapters.attachment import MOST_TOKENS, Part
from fleetune.errors import ModelError
from fleetune.models.net.layers import body_of, is_causal
from fleetune.models.net.model import Model


@dataclass(frozen=True)
class Prompt:
    """A soft prompt of `tokens` (T) virtual tokens."""

    tokens: int = 20

    def put_on(self, model: Model, seed: int) -> PromptPart:
        """Hook the base model's input and output."""
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise ModelError(
                f"a prompt of {self.tokens} tokens is not possible", hint=f"1 to {MOST_TOKENS:,} tokens"
            )
        table = model.net.get_input_embeddings().weight
        u = models.uniform(f"prompt/{seed}", (self.tokens,), 1.0)
        pieces = torch.from_numpy(((u.astype("float64") + 1) / 2 * len(model.tokenizer)).astype("int64"))
        start = table.detach()[pieces.to(table.device)].to(torch.float32, copy=True)
        return PromptPart(model.net, nn.Parameter(start))


class PromptPart(Part):
    """The embeddings, and the hooks that insert them and remove their outputs."""

    what = "a soft prompt"

    def __init__(self, net: Any, prompt: nn.Parameter) -> None:
        self.parameters = {"prompt.embeddings": prompt}
        self._prompt = prompt
        self._table = net.get_input_embeddings()
        self._at = 0 if is_causal(net) else 1
        self._went_in = False
        body = body_of(net)
        self.hooks = [
            body.register_forward_pre_hook(self._before, with_kwargs=True),
            body.register_forward_hook(self._after),
        ]

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Insert the prompt unless a cache has it; extend masks and positions in any case."""
        kwargs = dict(kwargs)
        ids = args[0] if args else kwargs.pop("input_ids", None)
        words = kwargs.pop("inputs_embeds", None)
        words = self._table(ids) if words is None else words
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        self._went_in = cache is None or not cache.get_seq_length()
        rows, tokens = words.shape[0], self._prompt.shape[0]
        if self._went_in:
            words = self._put(words, self._prompt.to(words.dtype).expand(rows, -1, -1))
        for name, filler in (("attention_mask", 1), ("token_type_ids", 0)):
            if (given := kwargs.get(name)) is not None:
                kwargs[name] = self._put(given, given.new_full((rows, tokens), filler))
        if (positions := kwargs.get("position_ids")) is not None:
            first = torch.arange(tokens, device=positions.device).expand(positions.shape[0], -1)
            kwargs["position_ids"] = (
                torch.cat([first, positions + tokens], 1) if self._went_in else positions + tokens
            )
        return (), {**kwargs, "inputs_embeds": words}

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._went_in:
            hidden, end = output.last_hidden_state, self._at + self._prompt.shape[0]
            output.last_hidden_state = torch.cat([hidden[:, : self._at], hidden[:, end:]], 1)

    def _put(self, given: Tensor, new: Tensor) -> Tensor:
        return torch.cat([given[:, : self._at], new, given[:, self._at :]], 1)
