# SPDX-License-Identifier: Apache-2.0
"""Compare the lines of `fleetune measure` with a reference model, by KL divergence and same top token.

The reference is the model that is named, and every line is compared with it; of a compression's folder it is by itself the
model that was compressed, with which the compressed model and its files are compared.  It runs first, in a process of its own,
and its logits wait in a file (`evaluation/kl_divergence.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fleetune.common.display import counted, human_bytes
from fleetune.deploy.measure import harness, lines
from fleetune.deploy.measure.harness import MeasureJob, Row
from fleetune.deploy.measure.lines import Line, Measurable
from fleetune.evaluation import kl_divergence
from fleetune.runs.listener import Listener
from fleetune.subject import Subject, loading

SMALL: Final = ("artefact", "gguf")  # kinds of the lines that compression made


@dataclass(frozen=True)
class ReferenceLine:
    """The model that others are compared with."""

    line: Line
    tokenizer: Path  # the folder of its tokenizer
    named: bool  # whether the user named it

    def compares(self, line: Line) -> bool:
        """Return whether a line of the table is compared with it."""
        return self.named or (line.kind in SMALL and line.name != lines.COMPRESSED_BASE)


@dataclass(frozen=True)
class Logits:
    """The logits of a reference on rows, in a file."""

    of: ReferenceLine
    rows: list[Row]
    file: Path

    def asked_of(self, job: MeasureJob, line: Line) -> MeasureJob:
        """Return the job of a line, which compares with these logits where the line is to be compared."""
        return replace(job, compared=self.rows, logits=str(self.file)) if self.of.compares(line) else job


def reference_of(
    found: Sequence[Measurable], named: Subject | None, *, offline: bool
) -> ReferenceLine | None:
    """Return the reference of what is measured; None where there is none.

    UsageError when the named one has other tokens than a model that is measured.
    """
    if named is not None:
        for one in found:
            loading.check_same_tokens(one.subject, named, offline=offline)
        own = lines.of(named, offline=offline)
        line = replace(_last_without(own, ("gguf",)), name=own.name)
        return ReferenceLine(line, own.tokenizer, named=True)
    if len(found) == 1 and found[0].folder is not None:
        return ReferenceLine(_last_without(found[0], SMALL), found[0].tokenizer, named=False)
    return None


def _last_without(one: Measurable, kinds: Sequence[str]) -> Line:
    """Return the last line of a subject that is of none of these kinds."""
    return [line for line in one.lines if line.kind not in kinds][-1]


@contextmanager
def logits_of(
    reference: ReferenceLine | None, rows: list[Row], listener: Listener, *, threads: int, offline: bool
) -> Iterator[Logits | None]:
    """Keep the logits of a reference on rows while the block runs; None without a reference or rows."""
    if reference is None or not kl_divergence.scored(rows):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="fleetune-") as folder:
        line, file = reference.line, Path(folder) / "reference.npy"
        harness.measured(MeasureJob(
            line.kind, line.path, threads, line.dtype, offline, repeats=0, compared=rows, logits=str(file), reference=True
        ))  # fmt: skip
        tokens, size = kl_divergence.tokens_in(file), human_bytes(file.stat().st_size)
        listener.note(
            f"{line.name} in {line.engine} is the reference: {counted(tokens, 'token')}, {size} of logits in {folder} "
            "until the end"
        )
        yield Logits(reference, rows, file)
