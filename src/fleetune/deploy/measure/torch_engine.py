# SPDX-License-Identifier: Apache-2.0
"""Models run by torch, for `measure`: through our own loaders, or as transformers reads an exported directory.

The second is the check of an export in the runtime that it is for: nothing of ours is between the files and the
numbers.  `RUNTIMES` says which runtime takes which target, and what has to be installed for it.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from fleetune import data, models
from fleetune.data import Encoded
from fleetune.deploy import export
from fleetune.deploy.measure import harness, llamacpp
from fleetune.deploy.measure.harness import Row
from fleetune.errors import ModelError, UsageError
from fleetune.evaluation.losses import response_loss
from fleetune.models.families import widths
from fleetune.models.model import Model, tokenizer_digest
from fleetune.tuning import finished

WINDOWS: Final = 8  # of the text that an export is checked on
LENGTH: Final = 512  # tokens of one


class Runtime(NamedTuple):
    """What reads the files of a target."""

    kind: str  # a key of `measure.KINDS`
    name: str
    modules: tuple[str, ...]  # that must be installed
    install: str


RUNTIMES: Final[Mapping[str, Runtime]] = MappingProxyType(
    {
        "gguf": Runtime("gguf", "llama.cpp", (llamacpp.MODULE,), llamacpp.INSTALL),
        "hf": Runtime("transformers", "transformers", (), ""),
        "compressed-tensors": Runtime(
            "transformers", "transformers", ("compressed_tensors",), "pip install compressed-tensors"
        ),
        "gptq": Runtime(
            "transformers", "transformers", ("gptqmodel", "optimum"), "pip install gptqmodel optimum"
        ),
    }
)


def missing(runtime: Runtime) -> bool:
    """Whether something that the runtime needs is not installed."""
    return any(importlib.util.find_spec(module) is None for module in runtime.modules)


def obstacle(target: str, out: Path) -> str:
    """Why an export is not run here, "" when it can be: no runtime, one not installed, or not a plain model."""
    runtime = RUNTIMES.get(target.partition(":")[0])
    if runtime is None:
        return f"nothing here runs {target}"
    if missing(runtime):
        return f"{runtime.name} for {target}: {runtime.install}"
    if runtime.kind == "transformers" and widths.differ(models.load_config(str(out))):
        return (
            f"{runtime.name} does not load blocks of different widths; llama.cpp does, a llama's: --to gguf"
        )
    return ""


def longest(folder: Path) -> int:
    """Tokens that the model of a directory is made for; 2,048 where its configuration does not say."""
    return int(getattr(models.load_config(str(folder)), "max_position_embeddings", None) or 2048)


@dataclass(frozen=True)
class Comparison:
    """Perplexity of the same tokens by the source in torch, and by the file in its runtime."""

    runtime: str
    source: float
    file: float
    tokens: int  # predicted

    @property
    def ratio(self) -> float:
        """1 for the same."""
        return self.file / self.source


def windows_of(text: str, folder: Path, length: int = LENGTH, count: int = WINDOWS) -> list[Row]:
    """The first windows of a text file in the tokens of the model in `folder`, no longer than it is made for.

    DataError for a text without two tokens.
    """
    words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [words(part, verbose=False)["input_ids"] for part in data.read_text(text)]
    return harness.windows(ids, min(length, longest(folder)), count)


def compare(
    source: Path, out: Path, runtime: Runtime, rows: list[Row], *, offline: bool = False
) -> Comparison:
    """Run an export `out` and its `source` (a run, an artefact or a plain directory), each in its own process.

    ModelError or UsageError when the runtime does not take the file.
    """
    kind = "run" if (source / "run.toml").is_file() else "artefact"

    def perplexity(kind: str, path: Path) -> float:
        job = harness.Job(kind, str(path), threads=1, offline=offline, repeats=0, windows=rows)
        return harness.measured(job).values["perplexity"]

    tokens = sum(len(row) - 1 for row, _ in rows)
    return Comparison(runtime.name, perplexity(kind, source), perplexity(runtime.kind, out), tokens)


class Torch:
    """A model in torch, one token after another."""

    def __init__(self, model: Model) -> None:
        """UsageError for an encoder, which writes nothing."""
        if model.labels:
            raise UsageError(f"{model.name} is an encoder, which writes no tokens", hint="fleetune eval")
        self.model, self.vocab = model, model.net.get_input_embeddings().weight.shape[0]
        takes = inspect.signature(model.net.forward).parameters
        self._last: Mapping[str, int] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._keyword = (
            "cache" if "cache" in takes else "past_key_values"
        )  # as transformers before 5.20 has it

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

    def loss(self, rows: Sequence[tuple[Sequence[int], int]]) -> float:
        """Mean cross-entropy in nats over the tokens of rows (ids, n_prompt) from number n_prompt on."""
        encoded = [Encoded(np.asarray(ids, np.int32), n_prompt) for ids, n_prompt in rows]
        return response_loss(self.model, encoded)

    def close(self) -> None:
        """Nothing to do: the process ends."""


def of_model(name: str, dtype: str, offline: bool) -> Torch:
    """A model by its name."""
    return Torch(models.load(name, dtype=dtype, device="cpu", offline=offline))


def of_run(path: str, dtype: str, offline: bool) -> Torch:
    """The model that a run has tuned, its change merged into the weights."""
    model = finished.load(path, offline=offline, device="cpu")
    finished.settle(model)
    return Torch(model)


def of_artefact(path: str, dtype: str, offline: bool) -> Torch:
    """A master artefact or a plain directory."""
    return Torch(export.load(Path(path)))


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
