"""Find what there is: what a name means, finished runs, methods, compressors, export targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fleetune import compression
from fleetune import subject as subjects
from fleetune.common import settings
from fleetune.deploy import targets as export_targets
from fleetune.tuning import methods as tuning_methods

if TYPE_CHECKING:
    from fleetune.tuning.result.finished import TuneResult

Setting = settings.Value | Callable[..., Any]  # of a method; a function is an objective
Rows = str | Path | Iterable[Mapping[str, Any]] | dict[str, list[Any]]  # a file, a hub id, rows or columns

# names that an editor completes and a type checker knows; those of other packages are known at run time
MethodName: TypeAlias = Literal[
    "auto", "fedit", "fedkseed", "fedpeptao", "fedpetuning", "fwdllm", "mezo", "onebyte", "signlora", "zosgd"
]
CompressorName: TypeAlias = Literal["gkd", "llm-pruner", "optq", "qronos", "rtn", "sparsegpt"]
_Gguf: TypeAlias = Literal["gguf", "gguf:q8_0", "gguf:f16", "gguf:bf16", "gguf:f32", "gguf:lora"]
_Hf: TypeAlias = Literal["hf", "hf:fp32", "hf:bf16", "hf:fp16"]
TargetName: TypeAlias = Literal[_Gguf, _Hf, "ollama", "ollama:q8_0", "compressed-tensors", "gptq", "mlx"]
Dtype: TypeAlias = Literal["fp32", "bf16", "fp16"]
Trains: TypeAlias = Literal["weights", "scales"]
Base: TypeAlias = Literal["auto", "memory", "mapped"]
Device: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]
Engine: TypeAlias = Literal["auto", "llama-server", "xllamacpp"]


def words(given: str | Sequence[str]) -> list[str]:
    r"""Return names as a list; a text may have several, with commas (one of a name itself is written `\,`)."""
    return settings.given_words(given) if isinstance(given, str) else list(given)


def open(name: object, *, out: str | Path = "runs") -> subjects.Subject:
    """Return what a name means: a `Run`, a `Compressed` model or a `Plain` one.  No weights are loaded yet.

    `name` is a path, the name or number of a run or compression under `out`, `latest`, a built-in name or a hub id, or a
    result of `tune` or `compress`.  UsageError when no run or compression has that number, or there is no latest one.
    """
    return subjects.open(name, out)


def list_runs(out: str | Path = "runs") -> list[TuneResult]:
    """Return the finished tuning runs under `out`, by number, each with its results; a sweep's folder is an `out` too.

    Runs that are stopped or failed are not among them (`fleetune runs` lists them as well), nor are compressions.
    """
    from fleetune.tuning.result import finished

    return finished.finished_in(Path(out))


def methods() -> list[str]:
    """Return the names of all tuning methods, those of other packages included."""
    return list(tuning_methods.entries())


def compressors() -> list[str]:
    """Return the names of all compression methods, those of other packages included."""
    return list(compression.entries())


def targets() -> list[str]:
    """Return the names of all export targets, those of other packages included."""
    return list(export_targets.every())
