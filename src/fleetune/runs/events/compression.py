# SPDX-License-Identifier: Apache-2.0
"""Report a compression: its check, start, blocks, steps and end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fleetune.common.settings import Value
from fleetune.runs.events.base import Event


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
