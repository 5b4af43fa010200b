"""Run the modules of a net with the moved weights (`weights.py`), one sign of its probe or both in one forward, and back.

With both signs the batch has every row twice, and a layer multiplies each half by the weights of its sign, with the operations
and shapes of a forward of one sign, so that the numbers are the same.  In back-propagation (`Tape`) a linear layer keeps its
input alone: each row block W_r of its weights is computed again.  With g the gradient of the output, that of the input is the sum
of g[:, r] W_r, and that of the block, g[:, r]' x, goes to `sink` at once.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fleetune.common.display import counted
from fleetune.errors import ModelError
from fleetune.models.lazy import LazyWeight, replace_parameters
from fleetune.models.net.model import allow_copies
from fleetune.seeds.weights import MovedWeights, WeightSlot

log = logging.getLogger(__name__)

# numbers of a tensor that is seen whole, at most, while both signs run: two copies exist then
WHOLE: Final = 1 << 22


_WARNED: Final[WeakSet[nn.Module]] = WeakSet()  # nets whose unreached tensors were told


class View(MovedWeights):
    """Makes `net` run at `w0 + grid * passes (+ eps z)`.

    While a module runs, its weights are computed into scratch, and are dropped when it returns; with neither a point nor a
    probe the net runs on its stored weights.  `remove` takes the view off.  The net must be used through its modules
    (calling them, `generate`, ...).
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], net: nn.Module, **how: Any) -> None:
        super().__init__(named, **how)
        self.net = net
        self.tape: Tape | None = None  # while what the net computes can be back-propagated
        self.owners: list[tuple[nn.Module, dict[str, WeightSlot]]] = []  # wrapped modules and what they own
        self.running = 0  # forwards of modules around those that are going on
        self._around: list[nn.Module] = []
        self._install(net)

    def write(self) -> None:
        """Overwrite the stored weights with the view's point (for export; the base is lost)."""
        lazy = {slot.name for slot in self.slots if isinstance(slot.tensor, LazyWeight)}
        with torch.inference_mode():
            for slot in self.slots:
                if slot.name not in lazy:
                    self.fill(slot, slot.tensor.detach().view(-1))
        new = {s.name: nn.Parameter(self.whole(s), requires_grad=False) for s in self.slots if s.name in lazy}
        if new:  # values in memory take the places of lazy weights, and are what is looked at from here on
            replace_parameters(self.net, {id(s.tensor): new[s.name] for s in self.slots if s.name in new})
            self.remove()
            self.slots = [slot._replace(tensor=new.get(slot.name, slot.tensor)) for slot in self.slots]
            self._install(self.net)
        self.place(None)

    @property
    def words(self) -> str:
        """Say in words what it is, for the model that carries it."""
        return "its weights moved by a seed ledger" if self.point else "its weights ready to be moved"

    def merge(self, model: Any) -> None:
        """Overwrite the stored weights of the model that carries this view, and take the view off."""
        self.write()
        self.detach(model)

    def moved(self) -> dict[int, Callable[[], Tensor]]:
        """Return what makes each moved tensor, by the address of the stored one."""
        return {slot.tensor.data_ptr(): functools.partial(self.whole, slot) for slot in self.slots}

    def detach(self, model: Any) -> None:
        """Take the view off the model that carries it, which is then the base again."""
        self.remove()
        model.attachment = None

    def remove(self) -> None:
        """Take the view off: the net runs on its stored weights again."""
        for module in [*self._around, *(module for module, _ in self.owners)]:
            allow_copies(module)
            del module.forward
        for module, _ in self.owners:
            module._parameters = dict(module._parameters.items())
            module.__dict__.pop("row_blocks", None)
        self.owners, self._around = [], []

    def warn_unreached(self) -> None:
        """Log the trainable tensors that no forward has asked for, once for a net: they are not being tuned."""
        missing = [s.name for s in self.slots if s.name not in self.reached]
        if missing and self.net not in _WARNED:
            _WARNED.add(self.net)
            log.warning(
                "%s took no part in the forward pass, e.g. %s", counted(len(missing), "tensor"), missing[0]
            )

    def _install(self, net: nn.Module) -> None:
        by_id = {id(slot.tensor): slot for slot in self.slots}
        for module in net.modules():
            own = {n: by_id[id(p)] for n, p in module.named_parameters(recurse=False) if id(p) in by_id}
            if "forward" in module.__dict__:
                raise ModelError(f"{type(module).__name__} is already wrapped; remove the earlier view first")
            if not own:
                if any(module.children()):
                    module.forward = count_running(self, module.forward)
                    self._around.append(module)
                continue
            module.forward = forward_for(self, module, own)
            module._parameters = ReadParameters(self, module, own)
            if type(module) is nn.Linear and getattr(module, "bias", None) is None and "weight" in own:
                # `losses` reads the head's weights block by block
                module.__dict__["row_blocks"] = RowBlocks(self, own["weight"])
            self.owners.append((module, own))


class Unpaired(Exception):
    """A module does not keep the rows of the two signs apart: each sign must have a forward of its own."""


def count_running(view: View, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)  # `generate` reads its signature
    def counted(*args: Any, **kwargs: Any) -> Any:
        view.running += 1
        try:
            return forward(*args, **kwargs)
        finally:
            view.running -= 1

    return counted


class ReadParameters(dict[str, Any]):
    """A module's own parameters; while the net runs, at the view's point for whoever reads them.

    A module's parent may read its weights and never call it (a Mamba mixer those of its convolution).  Reads go
    through `__getitem__` (`nn.Module.__getattr__`); `named_parameters` and the like see what is stored.
    """

    def __init__(self, view: View, module: nn.Module, own: dict[str, WeightSlot]) -> None:
        super().__init__(module._parameters)
        self.view, self.own = view, own

    def __getitem__(self, name: str) -> Any:
        found, slot = super().__getitem__(name), self.own.get(name)
        if slot is None or not self.view.running:
            return found
        if found is not slot.tensor:  # put there by the module's own forward
            return found
        if self.view.paired:
            raise Unpaired
        return _signs(self.view, slot)[0]


def forward_for(view: View, module: nn.Module, own: dict[str, WeightSlot]) -> Callable[..., Any]:
    if type(module) is nn.Linear and "weight" in own:
        return lambda input: _linear(view, module, own, input)
    if type(module) is nn.Embedding and module.max_norm is None:
        return lambda input: _embedding(view, own["weight"], input)
    return _any_forward(view, module, own)


def _linear(view: View, module: nn.Linear, own: dict[str, WeightSlot], x: Tensor) -> Tensor:
    if view.tape is not None:
        bias = view.tape.whole(own["bias"]) if "bias" in own else module.bias
        out: Tensor = _Linear.apply(x, view.tape.root, view.tape, own["weight"])  # type: ignore[no-untyped-call]
        return out if bias is None else out + bias
    xs = _halves(view, x) if view.paired and x.numel() else (x,)
    biases = _signs(view, own["bias"]) if "bias" in own else [module.bias] * len(xs)
    return view.product(own["weight"], xs, biases[: len(xs)])


def _embedding(view: View, slot: WeightSlot, ids: Tensor) -> Tensor:
    if view.tape is not None:
        return _Embedding.apply(view.tape.root, view.tape, slot, ids)  # type: ignore[no-any-return, no-untyped-call]
    if view.paired and ids.dim() == 2 and len(ids) == 1:  # positions, the same for every row
        ids = ids.expand(2 * view.paired, -1)
    elif view.paired and (ids.dim() < 2 or len(ids) != 2 * view.paired):
        raise Unpaired
    _, table, where = view.table(slot, ids)
    halves = (where[: view.paired], where[view.paired :]) if view.paired else (where,)
    found = [nn.functional.embedding(part, rows) for part, rows in zip(halves, table, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _halves(view: View, x: Tensor, least: int = 3) -> tuple[Tensor, ...]:
    """Return the rows of each sign; Unpaired where the first dimension is not that of the batch (experts, say)."""
    if x.dim() < least or x.shape[0] != 2 * view.paired:
        raise Unpaired
    return x[: view.paired], x[view.paired :]


def _signs(view: View, slot: WeightSlot) -> list[Tensor]:
    """Return a whole tensor for each sign that runs, in memory of its own."""
    if view.tape is not None:
        return [view.tape.whole(slot)]
    if not view.paired:
        return [nn.Parameter(view.whole(slot), requires_grad=False)]
    if slot.tensor.numel() > WHOLE:
        raise Unpaired
    return [
        nn.Parameter(part.clone().view(slot.tensor.shape), requires_grad=False)
        for part in view.signs(slot, 0, slot.tensor.numel())
    ]


def _any_forward(view: View, module: nn.Module, own: dict[str, WeightSlot]) -> Callable[..., Any]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        stored: dict[str, Any] = {name: slot.tensor for name, slot in own.items()}
        seen = {name: _signs(view, slot) for name, slot in own.items()}
        try:
            if not view.paired:
                module._parameters.update({name: values[0] for name, values in seen.items()})  # type: ignore[misc]
                return original(*args, **kwargs)
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
                raise Unpaired
            found = []
            ids = isinstance(module, nn.Embedding)  # of a class of its own
            for sign, x in enumerate(_halves(view, args[0], least=2 if ids else 3)):
                module._parameters.update({name: values[sign] for name, values in seen.items()})  # type: ignore[misc]
                found.append(original(x))
                if not isinstance(found[-1], Tensor) or len(found[-1]) != view.paired:
                    raise Unpaired  # a router's several answers, say
            return torch.cat(found)
        finally:
            module._parameters.update(stored)

    return forward


Sink = Callable[[int, Tensor], None]  # (global index of the first element, gradient of any shape, row-major)


class Tape:
    """A context in which what a view's net computes can be back-propagated; gradients of its tensors go to `sink`.

    A tensor that is used twice, as a tied head is, sends two gradients, whose sum is the whole one.
    """

    def __init__(self, view: View, sink: Sink) -> None:
        self.view, self.sink = view, sink
        # what a function of no other differentiable tensor hangs on, so that backward comes to it
        self.root = torch.zeros((), device=view.device, requires_grad=True)

    def __enter__(self) -> Self:
        self.view.tape = self
        embeddings = [m for m, _ in self.view.owners if isinstance(m, nn.Embedding)]
        # torch gives the padding's row no gradient, though in many models it is the token that ends a turn as well
        self._padding = [(m, m.padding_idx) for m in embeddings]
        for embedding in embeddings:
            embedding.padding_idx = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.view.tape = None
        for embedding, index in self._padding:
            embedding.padding_idx = index

    def whole(self, slot: WeightSlot) -> Tensor:
        """Return a tensor, in memory of its own."""
        return _Whole.apply(self.root, self, slot)  # type: ignore[no-any-return, no-untyped-call]

    def rows(self, slot: WeightSlot, first: int, gradient: Tensor) -> None:
        """Hand on the gradient of rows of a matrix, from row `first` on."""
        self.sink(*self.view.pulled_back(slot, first * slot.tensor.shape[1], gradient))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor, tape: Tape, slot: WeightSlot) -> Tensor:
        ctx.tape, ctx.slot = tape, slot
        ctx.save_for_backward(x)
        return tape.view.product(slot, [x], [None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,), slot = ctx.saved_tensors, ctx.slot
        n_out, n_in = slot.tensor.shape
        flat, g = x.reshape(-1, n_in), gradients[0].reshape(-1, n_out)
        back = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        for r, weight in ctx.tape.view.blocks(slot):
            part = g[:, r : r + len(weight)]
            if back is not None:
                back.addmm_(part, weight)
            ctx.tape.rows(slot, r, part.t() @ flat)
        return None if back is None else back.view_as(x), None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, root: Tensor, tape: Tape, slot: WeightSlot, ids: Tensor) -> Tensor:
        rows, table, where = tape.view.table(slot, ids)
        ctx.tape, ctx.slot, ctx.rows = tape, slot, rows
        ctx.save_for_backward(where)
        return nn.functional.embedding(where, table[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (where,), g = ctx.saved_tensors, gradients[0]
        width = g.shape[-1]
        table = torch.zeros(len(ctx.rows), width, dtype=torch.float32, device=g.device)
        table.index_add_(0, where.reshape(-1), g.reshape(-1, width).float())
        for row, gradient in zip(ctx.rows, table, strict=True):
            ctx.tape.rows(ctx.slot, row, gradient)
        return None, None, None, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, root: Tensor, tape: Tape, slot: WeightSlot) -> Tensor:
        ctx.tape, ctx.slot = tape, slot
        return tape.view.whole(slot)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.tape.sink(*ctx.tape.view.pulled_back(ctx.slot, 0, gradients[0].contiguous()))
        return None, None, None


class RowBlocks:
    """The rows of an output head's matrix, block by block, for a loss that never has all of them (`evaluation/losses.py`)."""

    def __init__(self, view: View, slot: WeightSlot) -> None:
        self.view, self.slot = view, slot

    def __call__(self) -> Iterable[tuple[Any, ...]]:
        """Yield (first row, rows at the view's point); while both signs run, also the rows of the other sign."""
        return self.view.blocks(self.slot)

    @property
    def root(self) -> Tensor | None:
        """Return what the loss hangs on where gradients are wanted, else None."""
        tape: Tape | None = self.view.tape
        return None if tape is None else tape.root

    def gradient(self, first: int, rows: Tensor) -> None:
        """Take the gradient of rows, from row `first` on."""
        if self.view.tape is not None:
            self.view.tape.rows(self.slot, first, rows)
