# SPDX-License-Identifier: Apache-2.0
"""Make a student of a model, and check that it can learn from a teacher."""

from __future__ import annotations

import dataclasses

from torch import nn

from fleetune.compression.pruning.depth import shallow, shallow_config
from fleetune.models.net.model import Model
from fleetune.models.shapes import Shape, shape_of


def student_of(model: Model, keep_layers: int) -> Model:
    """Return the model itself, or a copy with `keep_layers` of its blocks, in fp32."""
    net = shallow(model.net, keep_layers) if keep_layers else model.net
    return dataclasses.replace(model, net=net.float(), dtype="fp32")


def student_shape(model: Model, keep_layers: int) -> Shape:
    """Return the shape of that student."""
    config = model.net.config
    return shape_of(shallow_config(config, keep_layers) if keep_layers else config)


def mismatches(model: Model, teacher: Model, keep_layers: int) -> list[str]:
    """List why a student with `keep_layers` blocks of `model` (0: all) cannot learn from `teacher`."""
    problems = []
    blocks = int(model.net.config.get_text_config().num_hidden_layers)
    if keep_layers and not 2 <= keep_layers < blocks:
        problems.append(f"keep_layers = {keep_layers} of {blocks} blocks: 2 to {blocks - 1} can be")
    if teacher is model and not keep_layers:
        problems.append("teacher=same without keep_layers: the student has nothing to learn from itself")
    if teacher.labels:
        problems.append(f"the teacher {teacher.name} is an encoder, which writes nothing")
    elif teacher.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        problems.append(
            f"the teacher {teacher.name} has another vocabulary ({len(teacher.tokenizer)} tokens) than "
            f"{model.name} ({len(model.tokenizer)})"
        )
    return problems


def matrices(net: nn.Module) -> list[nn.Parameter]:
    """Return the two-dimensional weights."""
    return [weight for weight in net.parameters() if weight.ndim == 2]


def zero_share(net: nn.Module) -> float:
    """Return the share of exact zeros among the entries of the matrices."""
    counts = [(int(weight.count_nonzero()), weight.numel()) for weight in matrices(net)]
    return 1 - sum(n for n, _ in counts) / sum(size for _, size in counts)


def hold_zeros(net: nn.Module) -> None:
    """Set the gradient of every exact zero to 0: AdamW's moments, and so its step, are then 0 as well."""
    for weight in matrices(net):
        if weight.grad is not None:
            weight.grad.masked_fill_(weight == 0, 0.0)
