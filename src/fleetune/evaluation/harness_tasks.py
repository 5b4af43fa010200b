# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model on tasks of lm-evaluation-harness, by their names, with the harness's own standard errors.

The harness (`lm_eval`, extra `fleetune[lm-eval]`) is imported when a task of it is asked for.  It runs the model as it is in
memory: base, view of a ledger or adapter.  Its tasks bring data from the Hub unless they are files of this machine.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

from fleetune.common.events import TaskScore
from fleetune.common.shell import pip_install
from fleetune.errors import FleetuneError, RecipeError, UsageError, closest, cut_reason, fault
from fleetune.evaluation.answers import require_text_model
from fleetune.evaluation.measures import TASKS, is_known
from fleetune.models.net.model import Model

BATCH: Final = 8  # questions at a time
INSTALL: Final = pip_install("lm-eval")


def installed() -> bool:
    """Whether the harness is there."""
    return importlib.util.find_spec("lm_eval") is not None


def divided(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide task names into Fleetune's own and others, which only the harness may have."""
    return [t for t in tasks if is_known(t)], [t for t in tasks if not is_known(t)]


class HarnessTasks:
    """Tasks of the harness, found by name; checked before a model is loaded."""

    def __init__(self, names: Sequence[str], files: str | Path | None = None) -> None:
        """`files` is a folder with task files (YAML) of one's own.

        UsageError without the harness or the folder; RecipeError that lists every unknown name.
        """
        self.names = list(dict.fromkeys(names))
        if not installed():
            near = [closest(name, TASKS) for name in self.names]
            guesses = [f"; did you mean {n!r}?" if n else "" for n in near]
            raise RecipeError(
                [f"unknown task {name!r}{guess}" for name, guess in zip(self.names, guesses, strict=True)],
                hint=f"the tasks are {', '.join(TASKS)}; for those of lm-evaluation-harness: {INSTALL}",
            )
        if files is not None and not Path(files).is_dir():
            raise UsageError(f"no folder of task files at {files}", hint="check the path")
        self._manager = self._find(files)

    def _find(self, files: str | Path | None) -> Any:
        """The harness's index of tasks that has all names; the one of its own tasks takes seconds to read."""
        from lm_eval.tasks import TaskManager

        given = str(files) if files is not None else None
        own = TaskManager(include_path=given, include_defaults=False) if given else None
        if own is not None and all(name in own.all_tasks for name in self.names):
            return own
        every = TaskManager(include_path=given)
        if missing := [name for name in self.names if name not in every.all_tasks]:
            near = {name: closest(name, [*TASKS, *every.all_tasks]) for name in missing}
            raise RecipeError(
                [f"unknown task {n!r}" + (f"; did you mean {c!r}?" if c else "") for n, c in near.items()],
                hint=f"the tasks are {', '.join(TASKS)}, and those of lm-evaluation-harness: lm_eval ls tasks",
            )
        return every

    def evaluate(self, model: Model, *, limit: int) -> list[TaskScore]:
        """Run the model on at most `limit` questions of each task; the scores in the order of the harness.

        DataError for an encoder; FleetuneError for what the harness raises, such as data that cannot be fetched.
        """
        require_text_model(model, f"task '{self.names[0]}'")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        for noisy in ("lm_eval", "datasets", "fsspec"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        try:
            with redirect_stdout(sys.stderr):
                wrapped = HFLM(pretrained=model.net, tokenizer=model.tokenizer, batch_size=BATCH)
                found = simple_evaluate(
                    wrapped,
                    tasks=list(self.names),
                    limit=limit,
                    task_manager=self._manager,
                    log_samples=False,
                )
        except Exception as error:
            raise FleetuneError(
                f"lm-evaluation-harness could not run {', '.join(self.names)}: {cut_reason(fault(error))}",
                hint="its data comes from the Hub: check the network; some tasks need packages of their own",
            ) from error
        return scores(found or {})


def scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """Return the scores in the harness's results; a value that is no number is left out."""
    found = []
    for task, values in results.get("results", {}).items():
        counts = results.get("n-samples", {}).get(task, {})
        better = results.get("higher_is_better", {}).get(task, {})
        version = results.get("versions", {}).get(task)
        for key, value in values.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            found.append(
                TaskScore(
                    task=task,
                    metric=metric,
                    filter=how,
                    value=float(value),
                    stderr=_number(values.get(f"{metric}_stderr,{how}")),
                    rows=counts.get("effective"),
                    of=counts.get("original"),
                    shots=results.get("n-shot", {}).get(task),
                    version=None if version is None else str(version),
                    higher_is_better=better.get(metric),
                )
            )
    return found


def by_name(found: Sequence[TaskScore]) -> dict[str, float]:
    """Return TASK.METRIC -> value; of several filters of a metric, TASK.METRIC.FILTER but for the one called none."""
    return {f"{s.task}.{s.metric}" + ("" if s.filter == "none" else f".{s.filter}"): s.value for s in found}


def _number(value: Any) -> float | None:
    """A standard error; None for the harness's "N/A" and for one that is not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
