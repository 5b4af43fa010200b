"""Attach a trainable module to a model, export and load its parameters, and run training blocks.

An `AdapterSpec` (`Lora(r=8, ..)`, `Prefix(tokens=20, ..)`) puts itself on a model.  The result (`model.attachment`) has one or
two `Part`s: the module's own, and the classification head's where the model has one, since that is always trained too.
Trainable parameters are fp32 also on a 16-bit base: their steps are far smaller than a bf16 step.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fleetune import models
from fleetune.common.display import human_count
from fleetune.errors import MessageError, ModelError
from fleetune.models.lazy import into_memory
from fleetune.models.net.layers import head_of
from fleetune.models.net.model import Model, allow_copies, named_tensors

MOST_TOKENS: Final = (
    4096  # of a prompt or prefix: a forward's time grows with their square, and none is stopped inside
)


class Part:
    """Trainable parameters attached to a net: fp32, by name."""

    what: ClassVar[str] = "this adapter"
    parameters: Mapping[str, nn.Parameter]
    hooks: list[Any]

    def remove(self) -> None:
        """Detach them: the net is bit for bit what it was."""
        for hook in self.hooks:
            hook.remove()

    def fold(self) -> None:
        """Fold their effect into the stored weights (call `remove` after); ModelError if that is impossible."""
        raise ModelError(
            f"{self.what} cannot be folded into the weights",
            hint="use the run's folder: its adapter/ is a directory for PEFT",
        )

    def moved(self) -> dict[int, Callable[[], Tensor]]:
        """Return what makes each tensor that `fold` writes, by the address of the stored one; {} for a kind without."""
        return {}


class ParameterCopies(Part):
    """fp32 copies in place of the parameters `names` of `net` (of tied ones: under the first of their names).

    The stored tensors are put aside, untouched, and restored when the part is removed.  On a 16-bit base the copies
    are still fp32, and each module sees them rounded to its dtype while it runs.
    """

    def __init__(self, net: Any, names: Collection[str]) -> None:
        into_memory(net, names)
        stored = {n: p for n, p in named_tensors(net) if n in names}
        self.parameters = {
            n: nn.Parameter(p.detach().to(torch.float32, copy=True)) for n, p in stored.items()
        }
        self._pairs = [(p, self.parameters[n]) for n, p in stored.items()]
        self._places: list[tuple[nn.Module, str, Tensor]] = []
        self.hooks = []
        self._reads: list[tuple[nn.Module, dict[str, Any]]] = []
        copies = {id(p): copy for p, copy in self._pairs}
        for module in net.modules():
            own = {n: p for n, p in module._parameters.items() if p is not None and id(p) in copies}
            wide = {n: copies[id(p)] for n, p in own.items()}
            if any(p.dtype != torch.float32 for p in own.values()):
                self._reads.append((module, module._parameters))
                module._parameters = _RoundedReads(module._parameters, {n: p.dtype for n, p in own.items()})
                self.hooks += _rounded_once(module, wide, {n: p.dtype for n, p in own.items()})
            self._places += [(module, n, p) for n, p in own.items()]
            module._parameters.update(wide)

    def remove(self) -> None:
        """Put the stored tensors back."""
        super().remove()
        for module, parameters in self._reads:
            module._parameters = parameters
        for module, name, parameter in self._places:
            module._parameters[name] = parameter  # type: ignore[assignment]

    def fold(self) -> None:
        """Write the copies into the stored tensors, rounded once."""
        with torch.no_grad():
            for stored, copy in self._pairs:
                stored.copy_(copy)

    def moved(self) -> dict[int, Callable[[], Tensor]]:
        """Return the copies, rounded once."""
        return {stored.data_ptr(): partial(copy.detach().to, stored.dtype) for stored, copy in self._pairs}


class _RoundedReads(dict[str, Any]):
    """A module's parameters, each rounded to a dtype for whoever reads it: its parent may (a Mamba mixer does)."""

    def __init__(self, before: dict[str, Any], dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__(before.items())
        self.dtypes: dict[str, torch.dtype] = {**getattr(before, "dtypes", {}), **dtypes}

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        return found.to(self.dtypes[name]) if name in self.dtypes else found


def _rounded_once(
    module: nn.Module, wide: Mapping[str, nn.Parameter], dtypes: Mapping[str, torch.dtype]
) -> list[Any]:
    """Register hooks that round the parameters `wide` of a module once each time it runs, however often it reads them."""

    def before(module: nn.Module, args: Any) -> None:
        module._parameters.update({n: p.to(dtypes[n]) for n, p in wide.items()})  # type: ignore[misc]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(wide)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


class AdapterSpec(Protocol):
    """The description of a module: its sizes, and how to attach it to a model."""

    def put_on(self, model: Model, seed: int) -> Part:
        """Attach it to `model.net`, in place; ModelError, with nothing changed, when it does not fit."""
        ...


@dataclass(frozen=True)
class Attachment:
    """An adapter attached to a model (`model.attachment`): its spec, and all trainable parameters sorted by name."""

    spec: AdapterSpec
    parameters: Mapping[str, nn.Parameter]
    parts: tuple[Part, ...]

    @property
    def words(self) -> str:
        """Say in words what it is: "with an adapter of 1.2 M parameters (Lora)"."""
        count = human_count(sum(p.numel() for p in self.parameters.values()))
        return f"with an adapter of {count} parameters ({type(self.spec).__name__})"

    def merge(self, model: Model) -> None:
        """Fold it into the stored weights of the model that carries it, as `merge` below."""
        merge(model)

    def moved(self) -> dict[int, Callable[[], Tensor]]:
        """Return that of all parts; {} where one has none."""
        found = [part.moved() for part in self.parts]
        return {at: make for one in found for at, make in one.items()} if all(found) else {}

    def detach(self, model: Model) -> None:
        """Remove it from the model that carries it, which is then the base again, as `detach` below."""
        detach(model)


def attach(model: Model, spec: AdapterSpec, *, seed: int) -> None:
    """Attach the module that `spec` describes to `model.net`, in place; only its parameters become trainable.

    ModelError when something is attached already, or a value of `spec` cannot be used.
    """
    if model.attachment is not None:
        current = model.attachment
        name = type(current.spec if isinstance(current, Attachment) else current).__name__
        raise ModelError(f"the model already carries a {name}", hint="detach or merge it first")
    own = spec.put_on(model, seed)
    head = ParameterCopies(model.net, set(head_of(model.net)) - own.parameters.keys())
    parts = (own, head) if head.parameters else (own,)
    model.net.eval()
    parameters = {n: p for part in parts for n, p in part.parameters.items()}
    model.attachment = Attachment(spec, dict(sorted(parameters.items())), parts)


def attachment_of(model: Model) -> Attachment:
    """Return what is attached to `model`; ModelError when that is no adapter."""
    if not isinstance(model.attachment, Attachment):
        raise ModelError("the model carries no adapter", hint="attach one first")
    return model.attachment


def detach(model: Model) -> None:
    """Remove the adapter: `model.net` is bit for bit the base again."""
    parts = attachment_of(model).parts
    allow_copies(model.net)
    for part in reversed(parts):
        part.remove()
    model.attachment = None


def merge(model: Model) -> None:
    """Fold the adapter into the stored weights, rounded once, where its kind allows it.

    The net then has the base's shape but other weights, whose digest `Model.merge` computes.  ModelError, with nothing
    changed, for a module that is more than other weights (a prefix, say).  A mapped base comes into memory.
    """
    for part in attachment_of(model).parts:
        part.fold()
    detach(model)


# ---------------------------------------------------------------- the numbers


def trainable(model: Model) -> dict[str, nn.Parameter]:
    """Return the trainable parameters, fp32, in name order.  ModelError when there is no adapter."""
    return dict(attachment_of(model).parameters)


def export(model: Model) -> dict[str, np.ndarray]:
    """Return a copy of the adapter as fp32 arrays in name order."""
    return {n: p.detach().cpu().numpy().copy() for n, p in attachment_of(model).parameters.items()}


def check_form(model: Model, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise MessageError unless names, shapes and dtype (fp32) are those of the model's adapter."""
    parameters = attachment_of(model).parameters
    if arrays.keys() != parameters.keys():
        odd = sorted(arrays.keys() ^ parameters.keys())
        raise MessageError(f"adapter tensors differ in {len(odd)} names from this model's, e.g. '{odd[0]}'")
    for name, parameter in parameters.items():
        array = arrays[name]
        if array.shape != tuple(parameter.shape) or array.dtype != np.float32:
            raise MessageError(
                f"adapter tensor '{name}' is {array.dtype.name} {list(array.shape)}, "
                f"this model's is float32 {list(parameter.shape)}"
            )


def load_(model: Model, arrays: Mapping[str, np.ndarray]) -> None:
    """Set the adapter's values.  MessageError, with nothing changed, as in `check_form`."""
    check_form(model, arrays)
    parameters = attachment_of(model).parameters
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(arrays[name])))  # a copy can be written to


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 (hex) of an adapter's tensors, as `models.digest` does of weights."""
    return models.digest((n, torch.from_numpy(np.ascontiguousarray(tensors[n]))) for n in sorted(tensors))


# ---------------------------------------------------------------- training


@contextmanager
def private_rng(device: str) -> Iterator[None]:
    """Restore the global random generators after the block."""
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def training(model: Model, key: int) -> Iterator[None]:
    """Enable train mode and gradients while the block runs; dropout depends on `key` (64 bits) alone.

    Afterwards the global generators are restored and the net is in eval mode without gradients.
    """
    parameters = attachment_of(model).parameters.values()
    with private_rng(model.device), torch.enable_grad():
        torch.manual_seed(key)
        model.net.train()
        try:
            yield
        finally:
            model.net.eval()
            for parameter in parameters:
                parameter.grad = None
