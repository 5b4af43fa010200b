"""Train in AdamW steps with a learning-rate schedule, gradient clipping, and checkpoints to resume from bit for bit."""

import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fleetune.common.files import staged
from fleetune.common.hearing import hearing
from fleetune.data import Encoded
from fleetune.data.encode import Batch
from fleetune.errors import FleetuneError, Interrupted, StorageError, UsageError
from fleetune.models.net.saving import disk_errors

STATE: Final = "state.safetensors"
MOMENTS: Final = ("exp_avg", "exp_avg_sq")

Result = TypeVar("Result")


def metadata(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata of a file of tensors: its head as JSON, and the checksum of both."""
    text = json.dumps(head)
    return {"format": "pt", "head": text, "crc32": _checksum(text, tensors.items())}


def head_of(file: Path) -> dict[str, Any] | None:
    """Read the head of such a file; None where the file is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            crc = _checksum(about["head"], ((n, opened.get_tensor(n)) for n in set(opened.keys())))
        head: dict[str, Any] = json.loads(about["head"])
        return head if crc == about["crc32"] else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _checksum(head: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the CRC-32, as 8 digits, of a text and of named tensors in the order of their names."""
    crc = zlib.crc32(head.encode())
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        values = tensor.detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {values.dtype} {tuple(values.shape)} ".encode(), crc)
        crc = zlib.crc32(values.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def fingerprint(inputs: str, rows: Sequence[Encoded]) -> str:
    """Return the SHA-256 of everything that a result depends on: settings and weights as text, and the rows."""
    sha = hashlib.sha256(inputs.encode())
    for row in rows:
        sha.update(f"{len(row.ids)} {row.n_prompt} ".encode() + row.ids.tobytes())
    return sha.hexdigest()


@dataclass(frozen=True)
class Checkpoints:
    """The folder of a training's checkpoints, and how often they are written."""

    folder: Path
    origin: str  # the fingerprint of the training
    every: int  # steps between two checkpoints; the last step is always saved

    def run(
        self,
        batches: Iterable[Batch],
        steps: int,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        step: Callable[[int, Batch], Result],
        report: Callable[[int, Result], None],
    ) -> None:
        """Call `step(t, batch)`, t from 0, for every step that the checkpoint does not have yet.

        `report(t + 1, result)` is called after each.  It may raise Interrupted, which saves the step.
        """
        done = self.restore(parameters, optimizer)
        for t, batch in enumerate(itertools.islice(batches, done, None), done):
            with hearing(lambda: None):  # a stop is heard after the step, which is saved
                result = step(t, batch)
            if (t + 1) % self.every == 0 or t + 1 == steps:
                self.store(t + 1, parameters, optimizer)
            try:
                report(t + 1, result)
            except Interrupted:
                self.store(t + 1, parameters, optimizer)
                raise

    def store(self, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Write the weights and AdamW's moments after `step` steps, atomically.  StorageError when they cannot be."""
        tensors = {f"weight/{name}": p.detach().contiguous() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            for moment in MOMENTS if parameter in optimizer.state else ():
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].contiguous()
        with staged(self.folder, replace=STATE) as new, disk_errors(self.folder):
            about = metadata({"origin": self.origin, "step": step}, tensors)
            save_file(tensors, new / STATE, metadata=about)

    @torch.no_grad()
    def restore(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Read the state and return the number of finished steps; 0 where there is no state.

        UsageError for the state of another training, StorageError for a damaged one.
        """
        file = self.folder / STATE
        if not file.is_file():
            return 0
        if (head := head_of(file)) is None:
            raise StorageError(f"{file} is damaged", hint="remove it to begin anew")
        if head["origin"] != self.origin:
            raise UsageError(
                f"{file} is of a training with other weights, rows or settings",
                hint="bring back what it began with, or begin anew without --resume",
            )
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            for name, parameter in parameters.items():
                parameter.copy_(opened.get_tensor(f"weight/{name}"))
                if f"{MOMENTS[0]}/{name}" in names:
                    # copies: Windows does not replace a file that is mapped into memory
                    moments = {
                        m: opened.get_tensor(f"{m}/{name}").to(parameter.device, copy=True) for m in MOMENTS
                    }
                    optimizer.state[parameter] = {"step": torch.tensor(float(head["step"])), **moments}
        return int(head["step"])


def learning_rate(t: int, steps: int, highest: float, warmup: float) -> float:
    """Return the learning rate of step t, from 0: a linear rise over the share `warmup`, then a linear fall to 0."""
    rise = math.ceil(warmup * steps)
    return highest * ((t + 1) / rise if t < rise else (steps - t) / (steps - rise))


def clipped_step(
    loss: Tensor,
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    t: int,
    rate: float,
    clip: float,
    hint: str,
) -> None:
    """Clip the gradients of `loss`, which are there already, to the norm `clip`, and take step t at this learning rate.

    FleetuneError, with `hint`, when the loss or the norm is not finite; the weights are unchanged then.
    """
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        raise FleetuneError(
            f"the loss is {loss.item()} in step {t + 1}, its gradient's norm {norm.item()}", hint=hint
        )
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


@contextmanager
def all_trainable(net: nn.Module) -> Iterator[None]:
    """Compute gradients of all weights while the block runs."""
    net.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        net.zero_grad(set_to_none=True)
        net.requires_grad_(False)
