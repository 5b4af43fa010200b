"""A weight whose values stay in a mapped file and are read while an operation needs them.

A `LazyWeight` stands in a net where a parameter would; torch hands every operation on it to `__torch_function__`:

    a linear layer     its matrix is read into scratch, used and forgotten; backward reads it again
    an embedding       only the rows in use are read
    a tied head        goes by blocks of rows
    anything else      gets the values, in memory of their own

Values and products are those of a model in memory, bit for bit, except for a product by blocks.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from fleetune.common.ggml import HALVES
from fleetune.errors import ModelError
from fleetune.models.stored import Stored

BLOCK: Final = 1 << 20  # numbers of a block of rows: 4 MB in fp32
# what is asked of a parameter without its values
PROPERTIES: Final = frozenset(
    [
        "shape",
        "dtype",
        "device",
        "requires_grad",
        "is_leaf",
        "grad",
        "grad_fn",
        "ndim",
        "layout",
        "itemsize",
        "nbytes",
        "names",
        "is_meta",
        "is_cuda",
        "is_cpu",
        "is_mps",
        "is_sparse",
        "is_quantized",
        "is_nested",
        "is_mkldnn",
        "is_xla",
        "is_xpu",
        "is_sparse_csr",
        "retains_grad",
        "_backward_hooks",
    ]
)
METHODS: Final = frozenset(
    [
        "size",
        "dim",
        "numel",
        "nelement",
        "ndimension",
        "element_size",
        "is_floating_point",
        "is_complex",
        "is_inference",
        "has_names",
        "get_device",
        "__hash__",
        "__len__",
        "register_hook",
    ]
)


class Memory:
    """What the lazy weights of a net share: scratch, and values that replace the file's."""

    def __init__(self) -> None:
        self._room = threading.local()
        self.changed: Callable[[str], Tensor | None] = lambda name: None

    def scratch(self, count: int) -> Tensor:
        """Return room for so many float32 numbers; the next call in this thread takes the same."""
        room: Tensor | None = getattr(self._room, "numbers", None)
        if room is None or len(room) < count:
            with torch.inference_mode(False):  # or it could not be written to outside of that mode
                self._room.numbers = room = torch.empty(count)
        return room[:count]

    def forget(self) -> None:
        """Give the scratch up: loading runs the net once, whose largest matrix a view never has whole."""
        self._room = threading.local()


class LazyWeight(torch.Tensor):
    """A parameter that lies in a mapped file (see the module's text)."""

    tensor_name: str
    stored: Stored
    memory: Memory
    streams: bool  # whether a product with it goes by blocks of its rows

    @classmethod
    def make(
        cls, name: str, stored: Stored, dtype: torch.dtype, memory: Memory, *, streams: bool = False
    ) -> Self:
        """Return a parameter of this dtype for a tensor in a file."""
        shape_only = torch.zeros((), dtype=dtype).expand(stored.shape)
        weight = torch.Tensor._make_subclass(cls, shape_only, False)
        weight._is_param = True
        weight.tensor_name, weight.stored, weight.memory, weight.streams = name, stored, memory, streams
        return weight

    def piece(self, first: int, last: int) -> Tensor:
        """Return the numbers first..last, 1-D, in scratch or in the mapping: the next piece may overwrite them."""
        if (changed := self.memory.changed(self.tensor_name)) is not None:
            return changed.reshape(-1)[first:last].to(self.dtype)
        width = self.stored.width
        room = self.memory.scratch((-(-last // width) - first // width) * width)
        return self.stored.read(first, last, self.dtype, room)

    def whole(self) -> Tensor:
        """Return all values, as `piece` does."""
        return self.piece(0, self.stored.numbers).view(self.stored.shape)

    def values(self) -> Tensor:
        """Return all values in memory of their own."""
        if (changed := self.memory.changed(self.tensor_name)) is not None:
            return changed.to(self.dtype, copy=True)
        out = torch.empty(self.stored.shape, dtype=self.dtype)
        flat = out.view(-1)
        for first, part in self.pieces():
            flat[first : first + len(part)] = part
        return out

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of the first, some numbers 1-D) in order; the next ones overwrite them."""
        for first in range(0, self.stored.numbers, BLOCK):
            yield first, self.piece(first, min(first + BLOCK, self.stored.numbers))

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of the first row, rows [r, n_in]) of a matrix; the next ones overwrite them."""
        count, width = self.stored.shape
        rows = max(1, BLOCK // width)
        for first in range(0, count, rows):
            last = min(first + rows, count)
            yield first, self.piece(first * width, last * width).view(last - first, width)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation that was given a lazy weight."""
        given = dict(kwargs or {})
        if func is F.linear and not isinstance(args[0], LazyWeight):
            return _linear(*args, **given)
        if func is F.embedding and not isinstance(args[0], LazyWeight):
            return _embedding(*args, **given)
        name = func.__name__
        if name in OWN and isinstance(args[0], LazyWeight):
            return OWN[name](*args, **given)
        if _would_change(func, name, args, given):
            raise _refused(name)
        asks = name in METHODS or (name == "__get__" and func.__self__.__name__ in PROPERTIES)
        if asks or name == "__set__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        return func(*tree_map(_with_values, args), **tree_map(_with_values, given))


def _would_change(func: Any, name: str, args: tuple[Any, ...], given: Mapping[str, Any]) -> bool:
    """Return whether an operation writes to a lazy weight, or to the memory that it does not have."""
    if isinstance(given.get("out"), LazyWeight) or name in ("data_ptr", "untyped_storage"):
        return True
    if name == "__set__" and (owner := func.__self__.__name__) != "data":
        return owner == "requires_grad" and bool(args[1])
    if name == "__set__" and args[1] is args[0]:  # of a `net.to` that changes nothing
        return False
    writes = name in ("__set__", "__setitem__") or (name[-1] == "_" and name[-2] != "_")
    return writes and isinstance(args[0], LazyWeight)


def _refused(name: str) -> ModelError:
    return ModelError(
        f"{name.strip('_')} on a weight that stays in its file", hint="load the model with base=memory"
    )


def _to(weight: LazyWeight, *args: Any, **given: Any) -> Tensor:
    """Return the weight itself where it is on that device and of that type already, else its values there."""
    like = torch.empty(0, dtype=weight.dtype).to(*args, **given)
    same = (like.dtype, like.device.type) == (weight.dtype, "cpu") and not given.get("copy")
    return weight if same else weight.values().to(*args, **given)


def _requires_grad(weight: LazyWeight, wanted: bool = True) -> LazyWeight:
    """Return the weight, which is frozen; ModelError where it is to be trained."""
    if wanted:
        raise _refused("requires_grad")
    return weight


def _deepcopy(weight: LazyWeight, memo: dict[int, Any]) -> nn.Parameter:
    """Return a parameter in memory."""
    memo[id(weight)] = copied = nn.Parameter(weight.values(), requires_grad=False)
    return copied


OWN: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {"to": _to, "cpu": lambda weight: weight, "requires_grad_": _requires_grad, "__deepcopy__": _deepcopy}
)


def _with_values(value: Any) -> Any:
    return value.values() if isinstance(value, LazyWeight) else value


def _linear(input: Tensor, weight: Any, bias: Any = None) -> Tensor:
    bias = _with_values(bias)
    if not isinstance(weight, LazyWeight):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        return _FileLinear.apply(input, bias, [weight])  # type: ignore[no-any-return, no-untyped-call]
    return _product(input, weight, bias)


def _product(x: Tensor, weight: LazyWeight, bias: Tensor | None) -> Tensor:
    return _streamed(x, weight, bias) if weight.streams else F.linear(x, weight.whole(), bias)


def _streamed(x: Tensor, weight: LazyWeight, bias: Tensor | None) -> Tensor:
    count, width = weight.stored.shape
    flat = x.reshape(-1, width)
    out = x.new_empty(len(flat), count)
    for first, rows in weight.blocks():
        torch.mm(flat, rows.t(), out=out[:, first : first + len(rows)])
    return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], count)


class _FileLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, held: list[LazyWeight]) -> Tensor:
        ctx.held = held
        return _product(x, held[0], bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        g = gradients[0]
        flat = g.reshape(-1, g.shape[-1])
        back = bias = None
        if ctx.needs_input_grad[0]:
            back = _Back.apply(flat, ctx.held).view(*g.shape[:-1], -1)  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[1]:
            bias = flat.sum(0)
        return back, bias, None


class _Back(torch.autograd.Function):
    """g W, the gradient of a linear layer's input, which may be differentiated again."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, held: list[LazyWeight]) -> Tensor:
        ctx.held = held
        (weight,) = held
        if not weight.streams:
            return g.mm(weight.whole())
        back = g.new_zeros(len(g), weight.stored.shape[1])
        for first, rows in weight.blocks():
            back.addmm_(g[:, first : first + len(rows)], rows)
        return back

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _linear(gradients[0], ctx.held[0]), None


def _embedding(input: Tensor, weight: Any, *more: Any, **given: Any) -> Tensor:
    max_norm = more[1] if len(more) > 1 else given.get("max_norm")
    changed = isinstance(weight, LazyWeight) and weight.memory.changed(weight.tensor_name) is not None
    if max_norm is not None or changed or not isinstance(weight, LazyWeight):
        return F.embedding(input, _with_values(weight), *more, **given)
    rows, where = torch.unique(input, return_inverse=True)
    if len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < weight.stored.shape[0]:
        raise IndexError("index out of range in self")  # torch's words
    return F.embedding(where, weight.stored.rows(rows, weight.dtype))


def weights_of(net: nn.Module) -> dict[str, LazyWeight]:
    """Return the lazy weights of a net by name, tied ones once; {} for a net in memory."""
    return {n: p for n, p in net.named_parameters() if isinstance(p, LazyWeight)}


def kinds_of(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return the types that the matrices of a net have in its file, by name; {} for a net in memory."""
    return {name: t.stored.kind for name, t in named if isinstance(t, LazyWeight) and t.dim() == 2}


def in_blocks(tensor: Tensor) -> bool:
    """Return whether a weight is a matrix that lies in a file as blocks whose scales can be moved."""
    return isinstance(tensor, LazyWeight) and tensor.stored.kind in HALVES and tensor.dim() == 2


# ---------------------------------------------------------------- nets


def placeholders(tensors: Mapping[str, Stored], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return tensors of these shapes by name that take no room, for a net to be made of."""
    return {name: torch.zeros((), dtype=dtype).expand(stored.shape) for name, stored in tensors.items()}


class NotMappable(ModelError):
    """A model's files hold its tensors in another form than the model does, so that they cannot be read piece by piece."""


def leave_in_file(
    net: Any,
    tensors: Mapping[str, Stored],
    dtype: torch.dtype,
    path: Path,
    *,
    drawn: Collection[str] = (),
    ignored: Collection[str] = (),
) -> None:
    """Make the matrices of a net, made of `placeholders`, lazy weights; norms and biases come into memory.

    `drawn` are the parameters that the files do not hold and the net has drawn (an encoder's new head): they stay as they
    are.  `ignored` are tensors of the files that the net has no place for.  NotMappable unless every other parameter is one
    tensor of the files and every other tensor one parameter: experts that are put together while a model is loaded are not.
    """
    memory, head = Memory(), net.get_output_embeddings()
    of_head = set() if head is None else {id(p) for p in head.parameters(recurse=False)}
    names: dict[int, list[str]] = {}
    for name, tensor in net.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    made: dict[int, Tensor] = {}
    left = set(tensors) - set(ignored)
    for tensor in list(net.parameters()):
        own = min(names[id(tensor)])
        found = _name_of(names[id(tensor)], tensors)
        if found is None:
            if not set(names[id(tensor)]) & set(drawn):
                raise _not_mappable(path, own)
            continue
        if tensors[found].shape != tuple(tensor.shape):
            raise _not_mappable(path, own)
        left -= {found, *names[id(tensor)]}
        lazy = LazyWeight.make(own, tensors[found], dtype, memory, streams=id(tensor) in of_head)
        made[id(tensor)] = lazy if tensor.dim() > 1 else nn.Parameter(lazy.values(), requires_grad=False)
    if left:
        raise _not_mappable(path, min(left))
    replace_parameters(net, made)


def _not_mappable(path: Path, name: str) -> NotMappable:
    return NotMappable(
        f"{path} holds its tensors in another form than the model does ({name}): they cannot be read piece by piece",
        hint="use --base memory, and no --low-memory",
    )


def _name_of(names: list[str], tensors: Mapping[str, Stored]) -> str | None:
    """Return a parameter's name among a file's tensors, which may leave out its beginning."""
    for name in names:
        if name in tensors:
            return name
    ends = [n for n in tensors if any(name.endswith(f".{n}") for name in names)]
    return ends[0] if len(ends) == 1 else None


def replace_parameters(net: nn.Module, new: Mapping[int, Any]) -> None:
    """Put parameters in the places of others, which are named by their `id`."""
    for module in net.modules():
        for name, tensor in module._parameters.items():
            if id(tensor) in new:
                module._parameters[name] = new[id(tensor)]


def into_memory(net: nn.Module, names: Collection[str] | None = None) -> None:
    """Bring the values of lazy weights into memory for good: of those `names` (in full), or of all."""
    lazy = {n: w for n, w in weights_of(net).items() if names is None or n in names}
    replace_parameters(net, {id(w): nn.Parameter(w.values(), requires_grad=False) for w in lazy.values()})


@contextmanager
def in_memory(part: nn.Module) -> Iterator[None]:
    """Keep the weights of a part of a net in memory while the block runs; of a net in memory nothing changes."""
    lazy = weights_of(part)
    held = {id(w): nn.Parameter(w.values(), requires_grad=False) for w in lazy.values()}
    replace_parameters(part, held)
    back = {id(held[id(w)]): w for w in lazy.values()}
    try:
        yield
    finally:
        replace_parameters(part, back)


def memory_of(net: nn.Module) -> Memory | None:
    """Return what a net's lazy weights share; None for a net in memory."""
    return next((w.memory for w in weights_of(net).values()), None)
