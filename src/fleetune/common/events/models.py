# SPDX-License-Identifier: Apache-2.0
"""Report what is done with models: compression, export, measurement, evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fleetune.common import paired
from fleetune.common.events.base import Compared, Event
from fleetune.common.paired import RowLosses
from fleetune.common.settings import Value


@dataclass(frozen=True, kw_only=True)
class CompressChecked(Event):
    """`compress --dry-run`: the request is valid.

    The text fields say which calibration text, clients, memory, teacher and rows would be used.
    """

    event: ClassVar[str] = "fits"
    parameters: int  # number of weights of the model
    text: str | None = None  # calibration text: source, windows, tokens
    clients: str | None = None  # number of clients that would calibrate
    memory: str | None = None  # planned peak memory
    budget: str | None = (
        None  # with a size: bytes, the least and the most that can be had, types of llama.cpp
    )
    teacher: str | None = None  # name and size
    rows: str | None = None  # training rows: source, number, longest


@dataclass(frozen=True, kw_only=True)
class CompressStart(Event):
    """A compression begins: the request, and the measures before it."""

    event: ClassVar[str] = "start"
    model: str  # name of the model, or path of the run's folder
    run: bool  # whether `model` is a run
    method: str  # compression method
    set: Mapping[str, Value]  # the method's settings that were given
    data: str  # rows: a file or hub id; "" for none
    text: str  # plain text file; "" for none
    windows: int  # calibration windows at most
    length: int  # tokens of a window, or of a row at most
    eval_text: str  # plain text file for the perplexity; "" for none
    seed: int  # of sampled text, and of the order of rows
    dtype: str  # type that the model is loaded in
    low_memory: bool  # whether one block at a time is loaded from disk
    calibrate: str  # who calibrates: server, clients or fleet
    clients: int  # number of clients that calibrate; 0 for all
    true_sequential: bool  # inputs of a layer have passed the compressed layers of its block
    bytes: int  # of the GGUF file at most; 0 for no limit
    bpw: float  # bits a weight of the GGUF file's matrices at most; 0 for no limit
    train_scales: int  # steps in which the scales are trained after solving; 0 for none
    folder: str  # path of the compression's folder
    before: Mapping[str, float]  # measures before compression, by name
    teacher: Mapping[str, float] | None = None  # measures of the teacher, by name
    planned: int | None = None  # peak memory, bytes


@dataclass(frozen=True, kw_only=True)
class MatrixSolved:
    """A linear layer of a block."""

    name: str  # of the layer in the model
    error: float  # ||WX - QX||^2 / ||WX||^2 on the calibration windows; null without windows
    notes: Sequence[str] = ()  # what the solver had to do differently


@dataclass(frozen=True, kw_only=True)
class BlockSolved(Event):
    """A decoder block is compressed and written to disk; with a size the embedding and the head are the last one."""

    event: ClassVar[str] = "block"
    block: int  # from 0
    blocks: int  # number of blocks in the model, and one more with a size
    seconds: float  # of this block
    matrices: Sequence[MatrixSolved]  # its linear layers: name, relative error of the outputs, notes


@dataclass(frozen=True, kw_only=True)
class BudgetMeasured(Event):
    """A part of what `--bytes` or `--bpw` chooses by begins to be measured."""

    event: ClassVar[str] = "choosing"
    phase: str  # sensitivity (of the outputs of each matrix, a window at a time) or grids (of a block, a block at a time)
    done: int  # windows, or blocks, that are measured; the last block is embedding and head
    total: int  # number of windows, or of blocks without the last


@dataclass(frozen=True, kw_only=True)
class BudgetSpent(Event):
    """The grid of each matrix is chosen for `--bytes` or `--bpw`."""

    event: ClassVar[str] = "budget"
    kinds: Mapping[str, int]  # type of llama.cpp -> number of matrices
    bytes: int  # size of the GGUF file to come
    kl_divergence: float  # a rough estimate, from the dense model, nats a token: to compare budgets by


@dataclass(frozen=True, kw_only=True)
class CalibrationReply(Event):
    """Outcome of one client in the calibration of a block."""

    event: ClassVar[str] = "client"
    block: int  # from 0
    client: int  # from 0
    bytes_up: int  # size of the sums that it sent
    bytes_down: int  # size of the compressed block that it received
    status: str  # ok or refused
    reason: str  # why it is left out from now on; else ""


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """A training step of distillation, of a pruned model's recovery or of a quantised model's scales."""

    event: ClassVar[str] = "step"
    step: int  # from 1
    steps: int  # number of steps
    loss: float  # of this step; in distillation and of scales the divergence from the teacher
    reward: float | None = None  # mean reward of the answers that the student wrote in this step


@dataclass(frozen=True, kw_only=True)
class ModelPruned(Event):
    """Parts of a model are removed."""

    event: ClassVar[str] = "pruned"
    parameters: int  # number of weights that are left
    blocks: int  # number of blocks that are left
    hidden_size: int  # numbers of a hidden state
    widths: Sequence[Mapping[str, int]]  # of each block: its numbers of heads and channels


@dataclass(frozen=True, kw_only=True)
class CompressDone(Event):
    """A compression is finished."""

    event: ClassVar[str] = "done"
    folder: str  # path of the compression's folder
    before: Mapping[str, float]  # before compression: loss, own_perplexity (of text it wrote), perplexity
    after: Mapping[
        str, float
    ]  # measures of the result, by name; kl_divergence and same_top from the dense model or teacher
    bytes: int  # size of the result's folder
    seconds: float  # of the work in this process
    peak_rss: int  # peak memory of this process, bytes
    digest: str  # SHA-256 of the artefact's file, or of the plain weights
    result_sha256: str | None = None  # SHA-256 of the result's SHA256SUMS
    planned: int | None = None  # peak memory as planned, bytes
    error: float | None = None  # mean over the matrices
    notes: Mapping[str, Sequence[str]] | None = None  # of the solver, by matrix
    bytes_up: int | None = None  # from all clients, where clients calibrate
    bytes_down: int | None = None  # to all clients, where clients calibrate
    teacher: Mapping[str, float] | None = None  # measures of the teacher, by name
    pruned: Mapping[str, float] | None = None  # measures before recovery, by name
    parameters: Mapping[str, int] | None = None  # number of weights `before` and `after`


@dataclass(frozen=True, kw_only=True)
class ExportDone(Event):
    """A file or folder is written and read back."""

    event: ClassVar[str] = "export"
    to: str  # export target
    path: str  # of the new file or folder
    digest: str | None = None  # SHA-256 of a run's weights; only of a run as `hf`
    bytes: int | None = None  # of all files
    files: int | None = None  # of a copied adapter: files equal to the source's
    tensors: int | None = None  # number of tensors
    exact: int | None = None  # tensors that hold the source's values bit for bit
    types: Mapping[str, int] | None = None  # number of tensors by their type in the file
    notes: Sequence[str] | None = None  # fallbacks and warnings


@dataclass(frozen=True, kw_only=True)
class PatchMade(Event):
    """`patch make`: a patch is written."""

    event: ClassVar[str] = "patch"
    path: str  # of the patch
    bytes: int  # of the patch
    base: str  # SHA-256 of the file that it is for
    result: str  # SHA-256 of the file that it makes


@dataclass(frozen=True, kw_only=True)
class PatchApplied(Event):
    """`patch apply`: a file has other scales now."""

    event: ClassVar[str] = "patched"
    path: str  # of the new file
    result: str  # its SHA-256


@dataclass(frozen=True, kw_only=True)
class ExportChecked(Event):
    """`export --text`: perplexity of the written file, run in its runtime; `runtime` is null where none is installed."""

    event: ClassVar[str] = "check"
    path: str  # of the file or folder
    runtime: str | None  # name of the program that ran it
    source: float | None = None  # perplexity of the source in torch
    file: float | None = None  # perplexity of the file in its runtime
    tokens: int | None = None  # predicted tokens
    ratio: float | None = None  # `file` / `source`; 1 for the same


@dataclass(frozen=True, kw_only=True)
class Measured(Compared):
    """A model in an engine: size, speed, memory and quality."""

    event: ClassVar[str] = "measured"
    name: str  # base, tuned, compressed, or the model's own
    engine: str  # torch or llama.cpp
    path: str  # of the model, or its name
    bytes: int  # size on disk
    bits_linear: float  # bits a weight of the blocks' matrices, scales included
    bits: float  # bits a weight, of all weights
    peak_rss: int  # peak memory of the process, bytes
    prefill: float | None  # tokens read a second
    generate: float | None  # tokens written a second
    loss_error: float | None = None  # standard error of the loss, over the rows
    change: float | None = None  # loss less that of the first line, on the same rows; None for the first
    change_error: float | None = None  # standard error of `change`, taken row by row


@dataclass(frozen=True, kw_only=True)
class MeasureDone(Event):
    """All models are measured."""

    event: ClassVar[str] = "done"
    folder: str | None  # of the compression that has the table as measure.json; else null
    rows: Sequence[Mapping[str, Any]]  # all `measured` events, without their name
    kept: Mapping[str, Mapping[str, Any]]  # by measure: gain of tuning; value, the share that is left


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A metric of a task of lm-evaluation-harness, in the harness's own unit (an accuracy is a share of 1)."""

    task: str  # name of the task, group or tag
    metric: str  # name of the metric
    filter: str  # how answers were read; none for as they are
    value: float  # of the metric
    stderr: float | None  # standard error, as the harness states it; null where it states none
    rows: int | None  # questions asked; null for a group of tasks, as the next two
    of: int | None  # questions that the task has
    shots: int | None  # examples before each question
    version: str | None  # of the task
    higher_is_better: bool | None  # null where the harness does not say


@dataclass(frozen=True, kw_only=True)
class EvalDone(Compared):
    """`eval`: the measures of one model."""

    event: ClassVar[str] = "eval"
    model: str  # as a command takes it
    rows: int  # number of rows measured
    of: int  # number of rows there are; more than `rows` where a limit left some out
    max_length: int  # tokens of a row at most: those of the run that the model comes from
    loss_error: float | None = None  # standard error of the loss, over the rows
    base_loss: float | None = None  # of a run: loss of its base model on the same rows
    change_error: float | None = None  # standard error of `loss` less `base_loss`, taken row by row
    harness: Sequence[TaskScore] | None = None  # of the tasks of lm-evaluation-harness


def evaluated(
    model: str,
    rows: int,
    measures: Mapping[str, float],
    *,
    of: int,
    max_length: int,
    rows_of: tuple[RowLosses | None, RowLosses | None] = (None, None),
    harness: Sequence[TaskScore] = (),
) -> EvalDone:
    """The event for the measures of one model on the first `rows` of so many rows, and of tasks of the harness.

    `rows_of` are the losses of the rows under the base model and under this one, where they were measured.
    """
    values: dict[str, Any] = dict(measures)
    base, own = rows_of
    if own is not None:
        values["loss_error"] = paired.ratio(own.sums, own.counts)[1]
    if base is not None and own is not None:
        change = paired.difference(base, own)
        values |= {
            "base_loss": paired.ratio(base.sums, base.counts)[0],
            "change_error": change and change.error,
        }
    return EvalDone(
        model=model, rows=rows, of=of, max_length=max_length, harness=tuple(harness) or None, **values
    )
