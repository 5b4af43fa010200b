"""Run a model in torch, through our own loaders or, to check an export, as transformers reads the directory."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from fleetune import models
from fleetune.data import Encoded
from fleetune.errors import ModelError, UsageError
from fleetune.evaluation import losses
from fleetune.evaluation.losses import all_row_losses
from fleetune.models.cache.names import is_master
from fleetune.models.net.model import Model, tokenizer_digest
from fleetune.tuning.result import finished


class Torch:
    """A model in torch, one token after another."""

    def __init__(self, model: Model) -> None:
        """UsageError for an encoder, which writes nothing."""
        if model.labels:
            raise UsageError(f"{model.name} is an encoder, which writes no tokens", hint="fleetune eval")
        self.model, self.vocab = model, model.net.get_input_embeddings().weight.shape[0]
        takes = inspect.signature(model.net.forward).parameters
        self._last: Mapping[str, int] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        # as transformers before 5.20 has it
        self._keyword = "cache" if "cache" in takes else "past_key_values"

    def open(self, length: int) -> None:
        """Nothing to do: the cache grows as it is filled."""

    def prefill(self, ids: Sequence[int]) -> None:
        """Forget everything and read `ids`, at the last of which the next token is predicted."""
        self._cache = {self._keyword: DynamicCache(config=self.model.net.config)}
        self._read(torch.tensor([list(ids)]))

    def step(self) -> None:
        """Append the likeliest token and predict the next."""
        self._read(self.logits.argmax().view(1, 1))

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> None:
        out: Any = self.model.net(input_ids=ids, use_cache=True, **self._cache, **self._last)
        self.logits: Tensor = out.logits[0, -1]

    def losses(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, int]]:
        """Cross-entropy in nats over the tokens of rows (ids, n_prompt) from number n_prompt on: each row's sum and number."""
        sums, counts = all_row_losses(self.model, _encoded(rows), 8)
        return list(zip(sums.tolist(), counts.tolist(), strict=True))

    def scored_logits(self, rows: Sequence[tuple[Sequence[int], int]]) -> Iterator[np.ndarray]:
        """Yield the logits of the tokens that `losses` scores, in order: float32 [n, V]."""
        return losses.scored_logits(self.model, _encoded(rows))


def _encoded(rows: Sequence[tuple[Sequence[int], int]]) -> list[Encoded]:
    return [Encoded(np.asarray(ids, np.int32), n_prompt) for ids, n_prompt in rows]


def of_model(name: str, dtype: str, offline: bool) -> Torch:
    """A model by its name."""
    return Torch(models.load(name, dtype=dtype, device="cpu", offline=offline))


def of_run(path: str, dtype: str, offline: bool) -> Torch:
    """The model that a run has tuned, its change merged into the weights."""
    model = finished.load(path, offline=offline, device="cpu")
    finished.merge_weights(model)
    return Torch(model)


def of_artefact(path: str, dtype: str, offline: bool) -> Torch:
    """A master artefact or a plain directory."""
    folder = Path(path)
    return Torch(models.load_artefact(folder) if is_master(folder) else models.load(path, device="cpu"))


def of_directory(path: str, dtype: str, offline: bool) -> Torch:
    """An exported directory as transformers reads it, computed in fp32.  ModelError when it does not."""
    try:
        net = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(f"transformers does not load {path}: {error}", hint="export it again") from error
    net.eval()
    digest = tokenizer_digest(tokenizer)
    return Torch(Model(net, tokenizer, path, Path(path), "", digest, "fp32", "cpu"))


OPEN: Final[Mapping[str, Callable[[str, str, bool], Torch]]] = MappingProxyType(
    {"model": of_model, "run": of_run, "artefact": of_artefact, "transformers": of_directory}
)
