"""Load BERT-style encoders as classifiers, with a new head where the checkpoint has none for the task.

A new head has weights uniform with the standard deviation of the model's `initializer_range`, biases 0, norms 1, from Philox
words keyed by the tensor's name: every machine makes the same, and the base digest covers it.  A saved classifier whose labels
cover those of the data keeps its head and the order of its labels.
"""

import logging
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fleetune.errors import ModelError
from fleetune.models.net.model import uniform

log = logging.getLogger(__name__)

MAX_LABELS: Final = 64  # more different answers than this are free text, not label words


def saved_labels(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the label words of a saved classifier in the order of its outputs; () when it has no usable head."""
    stated = config.architectures or [""]
    if not stated[0].endswith("ForSequenceClassification") or config.num_labels < 2:
        return ()
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def choose_labels(config: PretrainedConfig, labels: Sequence[str], path: Path) -> tuple[str, ...]:
    """Return the label words that the model will have; set them in `config` when a new head is due.

    ModelError when neither the checkpoint nor `labels` says what they are, or `labels` cannot be label words.
    """
    saved = saved_labels(config)
    if saved and set(labels) <= set(saved):
        return saved
    wanted = tuple(labels)
    if not 2 <= len(set(wanted)) == len(wanted) <= MAX_LABELS or "" in wanted:
        raise ModelError(
            f"{path} is an encoder ({config.model_type}), which chooses among 2 to {MAX_LABELS} label words; "
            f"{len(wanted)} were given" + (f", such as {wanted[0][:40]!r}" if wanted else ""),
            hint="tune it on rows whose answers are label words, or name them: --labels yes,no",
        )
    if saved:
        log.warning("the labels of %s are %s, not %s: it gets a new head", path, list(saved), list(wanted))
    config.id2label = dict(enumerate(wanted))
    config.label2id = {word: i for i, word in enumerate(wanted)}
    config.problem_type = "single_label_classification"
    return wanted


def head_names(net: PreTrainedModel) -> list[str]:
    """Return the names of the classification head's parameters (all outside the encoder itself), sorted."""
    return sorted(n for n, _ in net.named_parameters() if not n.startswith(net.base_model_prefix + "."))


def without_head(tensors: dict[str, Tensor], kind: type[PreTrainedModel], config: Any) -> dict[str, Tensor]:
    """Return a checkpoint's tensors without those of another task's head."""
    with torch.device("meta"):
        head = set(head_names(kind(config)))
    return {name: tensor for name, tensor in tensors.items() if name not in head}


def make_head(net: PreTrainedModel, missing: Collection[str]) -> list[str]:
    """Initialise those of the `missing` parameters that a bare encoder may lack; return the others.

    A bare encoder lacks the head, and, if it comes from masked language modelling, the pooler.
    """
    head = {*head_names(net), *(name for name in missing if ".pooler." in name)}
    bound = math.sqrt(3.0) * float(getattr(net.config, "initializer_range", 0.02))
    with torch.no_grad():
        for name in head & set(missing):
            parameter = net.get_parameter(name)
            if parameter.dim() > 1:
                values = uniform(f"head/{name}", tuple(parameter.shape), bound)
                parameter.copy_(torch.from_numpy(values))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return sorted(set(missing) - head)
