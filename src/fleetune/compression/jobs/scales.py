"""Train the scales of a quantised model to follow the dense one; its codes stay, and so does its file's type.

A matrix is w = s n - o: n are whole numbers (or a codebook's values), s is the scale of a group of columns, o its minimum where
the type has one.  The loss is KL(dense || quantised) of the next-token distributions, and over the columns j of a group

    dL/ds = sum_j n_j dL/dw_j        dL/do = - sum_j dL/dw_j

(the second phase of EfficientQAT: Chen et al. 2024, arXiv 2407.11062).  AdamW trains a factor 1 + delta for each scale, or for
the d and dmin of a super-block; at the end scales are rounded to what the file holds.  Both models are one net: a switch replaces
its dense weights by quantised ones, which forward and backward make of codes and scales, a matrix at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from fleetune import compression
from fleetune.compression.jobs import progress
from fleetune.compression.layerwise.blocks import FinishedBlocks
from fleetune.compression.layerwise.fits import to_half
from fleetune.compression.layerwise.grids import HALF_BITS, SIGNIFICANT, significant
from fleetune.compression.methods.gkd import divergence
from fleetune.compression.training import Checkpoints, clipped_step, fingerprint, learning_rate
from fleetune.data.encode import Batch, Encoded, collate
from fleetune.errors import UsageError
from fleetune.evaluation.head_loss import CHUNK_BYTES
from fleetune.evaluation.losses import pad_id, predictors
from fleetune.models.artefact import Quantised, dense, times
from fleetune.models.lazy import LazyWeight
from fleetune.models.net.layers import by_layer
from fleetune.models.net.model import Model
from fleetune.planning.compression_cost import STEP
from fleetune.runs.compression_folder import CompressRequest
from fleetune.runs.listener import Listener

RATE: Final = 1e-3  # the highest learning rate of delta, which falls to 0
WARMUP: Final = 0.05  # share of the steps
CLIP: Final = 1.0  # of the gradient's norm
BETAS: Final = (0.9, 0.95)


class MovableScales(nn.Module):
    """A quantised matrix whose scales can move."""

    def __init__(self, q: Quantised) -> None:
        super().__init__()
        steps, blocks = q.steps(), q.blocks
        # int8 where they fit; those of 8 bits with a zero may not
        self.steps = steps.to(torch.int8) if int(steps.min()) >= -128 and int(steps.max()) <= 127 else steps
        self.unit = (q.scale if blocks is None else blocks.d).float()
        self.multiples = None if blocks is None else blocks.multiples
        self.delta = nn.Parameter(torch.zeros_like(self.unit))
        self.low_unit = blocks.dmin.float() if blocks is not None and blocks.type.minimum else None
        self.minima = None if blocks is None else blocks.minima
        self.low = None if self.low_unit is None else nn.Parameter(torch.zeros_like(self.low_unit))

    def scale(self) -> Tensor:
        """Return the groups' scales, float32 [R, groups]."""
        unit = self.unit * (1 + self.delta)
        return unit if self.multiples is None else times(unit, self.multiples)

    def offset(self) -> Tensor | None:
        """Return the groups' minima, float32 [R, groups]; None where there are none."""
        if self.low is None or self.low_unit is None or self.minima is None:
            return None
        return times(self.low_unit * (1 + self.low), self.minima)

    def product(self, x: Tensor) -> Tensor:
        """Return x W'."""
        y: Tensor = _MovableProduct.apply(x, self.scale(), self.offset(), self.steps)  # type: ignore[no-untyped-call]
        return y

    @torch.no_grad()
    def on_grid(self, q: Quantised) -> Quantised:
        """Return the matrix that it was made of with its scales as they are now, rounded to what the file holds."""
        unit = self.unit * (1 + self.delta)
        if q.blocks is None:
            if bool((q.zero != 1 << (q.bits - 1)).any()) and not q.codebook and _exact_minimum(q):
                unit = significant(unit, min(SIGNIFICANT, HALF_BITS - q.bits))
            return replace(q, scale=_half(unit))
        low = (
            q.blocks.dmin
            if self.low is None or self.low_unit is None
            else _half(self.low_unit * (1 + self.low))
        )
        return Quantised.of_blocks(q.codes, q.blocks._replace(d=_half(unit), dmin=low))


def _half(unit: Tensor) -> Tensor:
    return to_half(unit).to(torch.float16)


def _exact_minimum(q: Quantised) -> bool:
    """Tell whether scale * zero is exact in fp16, as Q4_1 and Q5_1 need it."""
    minimum = q.scale.float() * q.zero.float()
    return bool((minimum.half().float() == minimum).all())


class _MovableProduct(torch.autograd.Function):
    """Multiply by a matrix that is made of scales and steps; see the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, steps: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, offset, steps)
        return x @ _dense(scale, offset, steps).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, scale, offset, steps = ctx.saved_tensors
        (g,) = gradients
        back = g @ _dense(scale, offset, steps).to(g.dtype)
        of_weight = (g.flatten(0, -2).T @ x.flatten(0, -2)).to(scale.dtype).view(*scale.shape, -1)
        of_scale = (of_weight * steps.view(of_weight.shape)).sum(2)
        return back, of_scale, None if offset is None else -of_weight.sum(2), None


def _dense(scale: Tensor, offset: Tensor | None, steps: Tensor) -> Tensor:
    weight = steps.view(*scale.shape, -1) * scale[..., None]
    return (weight if offset is None else weight.sub_(offset[..., None])).view(steps.shape)


@dataclass(frozen=True)
class Student:
    """The quantised form of a net."""

    net: nn.Module
    scales: Mapping[str, MovableScales]  # by the layer's name
    ends: Mapping[str, Tensor]  # quantised embedding and head, by the weight's name: they do not move

    @contextmanager
    def on(self) -> Iterator[None]:
        """Put the quantised weights in the dense ones' place while the block runs."""
        with ExitStack() as stack:
            for name, scales in self.scales.items():
                stack.enter_context(_forward(self.net.get_submodule(name), scales))
            for name, values in self.ends.items():
                stack.enter_context(_values(self.net.get_parameter(name), values))
            yield

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        return {f"{n}.{part}": p for n, s in self.scales.items() for part, p in s.named_parameters()}


@contextmanager
def _forward(linear: nn.Module, scales: MovableScales) -> Iterator[None]:
    bias: Any = linear.bias
    linear.forward = lambda x: scales.product(x) if bias is None else scales.product(x) + bias
    try:
        yield
    finally:
        del linear.forward


@contextmanager
def _values(weight: Tensor, values: Tensor) -> Iterator[None]:
    if isinstance(weight, LazyWeight):
        of_others = weight.memory.changed
        weight.memory.changed = lambda name: values if name == weight.tensor_name else of_others(name)
        try:
            yield
        finally:
            weight.memory.changed = of_others
        return
    own = weight.data
    weight.data = values
    try:
        yield
    finally:
        weight.data = own


def student_of(model: Model, weights: Mapping[str, Quantised | Tensor]) -> Student:
    """Return the quantised form of a model, of its solved weights by name."""
    linears = {name for name, module in model.net.named_modules() if type(module) is nn.Linear}
    head = model.net.get_output_embeddings()
    scales, ends = dict[str, MovableScales](), dict[str, Tensor]()
    for name in weights:
        layer, weight = name.removesuffix(".weight"), weights[name]
        if layer in linears and isinstance(weight, Quantised) and model.net.get_submodule(layer) is not head:
            scales[layer] = MovableScales(weight)
        else:
            ends[name] = dense(weight).to(model.net.get_parameter(name).dtype)
    return Student(model.net, scales, ends)


def train(
    model: Model,
    student: Student,
    windows: Tensor,
    steps: int,
    seed: int,
    kept: Checkpoints,
    on_step: Callable[[int, int, float], None],
) -> None:
    """Train the student's scales on windows int64 [n, length], in place; resume from the checkpoint in `kept`.

    `on_step(step, steps, divergence)` is called after every step.  It may raise Interrupted, which saves the step.
    FleetuneError when the divergence is not finite.
    """
    parameters = student.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, betas=BETAS, weight_decay=0.0)

    def step(t: int, batch: Batch) -> float:
        optimizer.zero_grad()
        loss = _backward(model, student, batch)
        rate = learning_rate(t, steps, RATE, WARMUP)
        clipped_step(
            loss,
            parameters.values(),
            optimizer,
            t=t,
            rate=rate,
            clip=CLIP,
            hint=f"leave out {FLAG}, or give more text",
        )
        return float(loss)

    batches = _batches(model, windows, steps, seed)
    kept.run(batches, steps, parameters, optimizer, step, lambda t, loss: on_step(t, steps, loss))


def _batches(model: Model, windows: Tensor, steps: int, seed: int) -> Iterator[Batch]:
    """Yield a batch for each step: all windows in an order of their own, then again in another."""
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    each = max(1, STEP // windows.shape[1])
    for _ in range(steps):
        while len(order) < each:
            order += torch.randperm(len(windows), generator=generator).tolist()
        rows = [Encoded(ids=windows[order.pop(0)].numpy(), n_prompt=1) for _ in range(each)]
        yield collate(rows, pad_id(model), model.device)


def _backward(model: Model, student: Student, batch: Batch) -> Tensor:
    """Add the gradient of the mean divergence over a batch's tokens to the student's parameters; return the divergence."""
    with torch.no_grad():
        teachers, teacher_head = predictors(model.net, batch)
    with by_layer(model.net), torch.enable_grad():
        with student.on():
            hidden, head = predictors(model.net, batch)
        total, parts = torch.zeros(()), list[Tensor]()
        size = max(1, CHUNK_BYTES // (16 * len(model.net.get_input_embeddings().weight)))
        for rows, own in zip(hidden.detach().split(size), teachers.split(size), strict=True):  # type: ignore[no-untyped-call]
            with torch.no_grad():
                P = teacher_head(own)
            with student.on():
                x = rows.clone().requires_grad_()
                loss = divergence(head(x), P, 0.0).sum() / len(hidden)
                torch.autograd.backward(loss)
            assert x.grad is not None
            parts.append(x.grad)
            total += loss.detach().cpu()
        with student.on():
            torch.autograd.backward(hidden, torch.cat(parts))
    return total


EVERY: Final = 20  # steps between two checkpoints
FLAG: Final = "--train-scales"
LITTLE: Final = 4096  # tokens of text; on 1,024 the divergence on other text rose


def check(request: CompressRequest, solver: compression.Solver) -> None:
    """Raise UsageError when scales are to be trained that the method does not make."""
    if not request.train_scales:
        return
    if not solver.data:
        raise UsageError(
            f"{FLAG} trains on the calibration text, and {request.method} takes none",
            hint=f"--method {compression.DEFAULT}",
        )
    if not getattr(cast(Any, solver), "bits", 0):
        raise UsageError(
            f"{request.method} with bits=0 leaves no scales to train",
            hint=f"--set bits=4, or leave out {FLAG}",
        )


def warn(request: CompressRequest, windows: Tensor, listener: Listener, *, experts: bool) -> None:
    """Say that scales are trained on little text, and that those of experts are not."""
    if request.train_scales and experts:
        listener.note(
            f"{FLAG} leaves the scales of experts as they are solved, and holds their weights meanwhile"
        )
    if request.train_scales and windows.numel() < LITTLE:
        listener.note(
            f"{FLAG} has {windows.numel():,} tokens to train on: with fewer than {LITTLE:,} the model may follow that "
            "text alone; give more (--windows)"
        )


def trained(
    listener: Listener,
    model: Model,
    solved: FinishedBlocks,
    windows: Tensor,
    request: CompressRequest,
    origin: str,
) -> None:
    """Give the solved weights trained scales; resume from the checkpoint in their folder.

    `origin` says what the weights were made of.  Interrupted, after the step is saved, on Ctrl-C.
    """
    parts = solved.folder
    student = student_of(model, solved)
    kept = Checkpoints(parts / "scales", fingerprint(f"{origin}{request.train_scales}", []), EVERY)
    report = progress.step_reporter(listener, parts.parent, "divergence")
    train(model, student, windows, request.train_scales, request.seed, kept, report)
    solved.adjust = {f"{layer}.weight": scales.on_grid for layer, scales in student.scales.items()}
