"""Find the layers of a transformer, and within each its attention, projections and block outputs, by structure.

    layers       the members of the net's largest list of modules (Albert's groups: the layers within)
    attention    the module within a layer whose own children are the projections of queries, keys and values (`SPLIT`),
                 or one matrix of all three (`FUSED`); a layer may have none (a convolution, a state space)
    block ends   the linear layers whose outputs go to the residual stream: the last one of the attention block and the
                 last one of what follows; a block itself where it has no such layer (experts in one tensor, a Mamba mixer)

`by_layer` checkpoints each layer (Chen, Xu, Zhang and Guestrin 2016, arXiv 1604.06174) of a step whose activations have no room:
only what enters it is kept, layers x tokens x width numbers, and in fp32 the gradients are the same bit for bit.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fleetune.common.memory import give_back
from fleetune.errors import ModelError
from fleetune.models.lazy import LazyWeight

# Names of the projections of queries, keys and values within attention.
SPLIT: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
)
FUSED: Final = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
OTHER_MODULE: Final = "choose another module: lora, adapter, bitfit or full"


class Layer(NamedTuple):
    """One layer of a net: names in full, and the sizes of its keys and values."""

    name: str
    # what the attention block and what follows hand to the residual stream; one for Mamba
    ends: tuple[str, ...]
    attention: str = ""  # the module that calls the attention function; "" for a layer without attention
    query: str = ""
    value: str = ""  # where one matrix makes queries, keys and values, `query` and `value` are that matrix
    heads: int = 0  # of keys and values: fewer than the queries' under grouped-query attention
    width: int = 0  # of one head


def layers_of(net: nn.Module) -> list[Layer]:
    """Return the layers of a net, in order.  ModelError for a net that has no list of layers."""
    lists = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise ModelError(
            f"a {type(net).__name__} has no list of layers, where modules could be attached",
            hint="LoRA on layers that are named (targets=...), bitfit and full tuning fit any model",
        )
    name, stack = max(outer, key=lambda found: sum(p.numel() for p in found[1].parameters()))
    return [_layer(net, inner, block) for inner, block in _blocks(name, stack)]


def attention_layers(net: nn.Module, what: str) -> list[Layer]:
    """Return the layers of a net all of which have attention; ModelError otherwise (`what` needs it, in words)."""
    layers = layers_of(net)
    without = [layer.name for layer in layers if not layer.attention]
    if without:
        raise ModelError(
            f"{what} needs attention in every layer, and {len(without)} of the {len(layers)} layers of a "
            f"{type(net).__name__} have none that is known here ({without[0]})",
            hint=OTHER_MODULE,
        )
    return layers


def check_separate(net: Any, what: str) -> None:
    """Raise ModelError for a net that runs one layer several times (Albert), where `what` needs layers of their own."""
    layers, runs = len(layers_of(net)), int(net.config.get_text_config().num_hidden_layers)
    if layers != runs:
        raise ModelError(
            f"{what} chooses among layers, and a {type(net).__name__} has {layers} that it runs {runs} times",
            hint="use fedpetuning with module=prefix",
        )


def is_causal(net: nn.Module) -> bool:
    """Return whether this is a decoder: each token sees only those before it."""
    return not _is_classifier(net) or any(getattr(module, "is_causal", False) for module in net.modules())


def head_of(net: Any) -> list[str]:
    """Return the names of a classifier's own parameters, all that come after the encoder's layers; [] if none."""
    if not _is_classifier(net):
        return []
    inside = net.base_model_prefix + "."
    return [n for n, _ in net.named_parameters() if not n.startswith(inside) or ".pooler." in n]


def body_of(net: Any) -> nn.Module:
    """Return the module that the net hands its inputs to, up to its head (OPT's `base_model` is never called)."""
    body: nn.Module = net.get_decoder()
    return body


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: torch's, or GPT-2's Conv1D, whose weight is stored as [in, out]."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def read_past(net: nn.Module) -> set[str]:
    """Return the linear layers whose weights a state-space mixer may read without calling them.

    Nothing that is hung on them would run.  Mamba's (and its relatives') are all but the first, `in_proj`.
    """
    return {
        f"{name}.{child}"
        for name, mixer in net.named_modules()
        if hasattr(mixer, "A_log")
        for child, module in mixer.named_children()
        if is_linear(module) and not child.startswith("in_proj")
    }


def outputs_of(net: Any, name: str) -> int:
    """Return the width of what a block end gives: a linear layer's outputs, or the net's residual stream."""
    module = net.get_submodule(name)
    if is_linear(module):
        return int(module.out_features if isinstance(module, nn.Linear) else module.nf)
    return int(net.config.get_text_config().hidden_size)


def _is_classifier(net: nn.Module) -> bool:
    return type(net).__name__.endswith("ForSequenceClassification")


def _blocks(name: str, stack: nn.ModuleList) -> Iterator[tuple[str, nn.Module]]:
    """Yield the members of a list by name; of one that is only a list again (Albert's groups), its members."""
    for i, block in enumerate(stack):
        children = dict(block.named_children())
        inner = next(iter(children.items()), None)
        if len(children) == 1 and inner and isinstance(inner[1], nn.ModuleList):
            yield from _blocks(f"{name}.{i}.{inner[0]}", inner[1])
        else:
            yield f"{name}.{i}", block


def _layer(net: Any, name: str, block: nn.Module) -> Layer:
    found = next(((n, m, names) for n, m in block.named_modules() if (names := _projections(m))), None)
    if found is None:
        return Layer(name, _ends(name, block, ""))
    inner, module, (query, key, value) = found
    attention = f"{name}.{inner}" if inner else name
    width = next(
        (int(getattr(module, n)) for n in ("head_dim", "attention_head_size") if hasattr(module, n)), 0
    )
    config = net.config.get_text_config()
    width = width or int(config.hidden_size) // int(config.num_attention_heads)
    heads = outputs_of(net, f"{attention}.{key}") // width
    if key == query:
        heads = (heads - int(config.num_attention_heads)) // 2
    ends = _ends(name, block, inner)
    return Layer(name, ends, attention, f"{attention}.{query}", f"{attention}.{value}", heads, width)


def _projections(module: nn.Module) -> tuple[str, str, str] | None:
    """Return the names of the children of `module` that make queries, keys and values; None if it has none."""
    children = dict(module.named_children())
    for names in SPLIT:
        if all(n in children and is_linear(children[n]) for n in names):
            return names
    return next(((n, n, n) for n in FUSED if n in children and is_linear(children[n])), None)


def _ends(name: str, block: nn.Module, attention: str) -> tuple[str, ...]:
    """Return the block ends of a layer, `attention` the name of its attention within it ("": it has none)."""
    parts = [n for n, part in block.named_children() if any(p.dim() > 1 for p in part.parameters())]
    first = attention.split(".")[0] if attention else parts[0] if parts else ""
    rest = [n for n in parts if n != first]
    ends = [_end(block, [first], whole=not attention)] if first else []
    return tuple(f"{name}.{end}" for end in [*ends, *([_end(block, rest, whole=False)] if rest else [])])


def _end(block: nn.Module, parts: list[str], *, whole: bool) -> str:
    """Return the last linear layer of some parts of a block that follow each other, or the last part where it is no such.

    Experts (one tensor, or a list) have no single last layer.
    """
    last = block.get_submodule(parts[-1])
    experts = any(p.dim() > 2 for p in last.parameters()) or any(
        isinstance(m, nn.ModuleList) for m in last.modules()
    )
    inside = [n for n, m in last.named_modules() if is_linear(m) and not _projects(last, n)]
    if whole or experts or not inside:
        return parts[-1]
    return f"{parts[-1]}.{inside[-1]}" if inside[-1] else parts[-1]


def _projects(part: nn.Module, name: str) -> bool:
    """Return whether a linear layer of a part makes queries, keys or values (GPT-J has them first or last)."""
    owner, _, leaf = name.rpartition(".")
    return leaf in (_projections(part.get_submodule(owner)) or ())


# ---------------------------------------------------------------- activations, computed again

# bytes that enter all layers together: below, keeping everything takes little memory
SMALL: Final = 2 << 20
LARGE: Final = 1 << 20  # bytes that enter one layer; from here on what it leaves behind counts
# layers, forward or again, after which free memory is given back: glibc does not use a freed block for another of its size
# where torch asks for aligned memory, so each layer leaves some MB behind that nothing can use
EVERY: Final = 5


# bytes that a layer keeps for each that enters it, before one is seen: few, so that only its first layer is kept in vain
FEWEST: Final = 16
HEAP: Final = 1.6  # back-propagation holds so much for each byte kept: glibc gives freed blocks back late


class Activations:
    """What the layers of a net keep for backward: at the first layer of a step it is decided for all of them."""

    def __init__(self, net: Any, layers: list[nn.Module], least: float, room: Callable[[], float]) -> None:
        config = net.config.get_text_config() if hasattr(net, "config") else None
        self.layers = max(
            len(layers), getattr(config, "num_hidden_layers", 0)
        )  # Albert runs one several times
        self.least, self.room = least, functools.cache(room)
        self.each: float = FEWEST  # bytes kept for each that enters a layer
        self.recomputed = False

    def has_room(self, entering: int) -> bool:
        return HEAP * self.layers * self.each * entering <= self.room()

    def of(self, layer: nn.Module, *, first: bool, gives_back: bool) -> Callable[..., Any]:
        """Return the forward of a layer that keeps its activations, or is run under a checkpoint."""
        forward = layer.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if gives_back and _entering(args, kwargs) >= LARGE:
                give_back()
            return forward(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            entering = _entering(args, kwargs)
            if not torch.is_grad_enabled() or entering < self.least:
                return forward(*args, **kwargs)
            if first:
                self.recomputed = not self.has_room(entering)
            if self.recomputed:
                return checkpoint(run, *args, use_reentrant=False, **kwargs)
            if not first:
                return forward(*args, **kwargs)
            with _kept(layer) as kept:
                out = forward(*args, **kwargs)
            self.each = max(self.each, sum(kept.values()) / entering)
            self.recomputed = not self.has_room(entering)
            return out

        return call


@contextmanager
def _kept(layer: nn.Module) -> Iterator[dict[int, int]]:
    """Yield the bytes that autograd keeps beside the layer's weights while the block runs, by address."""
    here = [p for p in layer.parameters() if not isinstance(p, LazyWeight)]
    weights = {p.untyped_storage().data_ptr() for p in here}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is kept as itself would hold its own graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@contextmanager
def by_layer(
    net: nn.Module, *, small: int | None = None, room: Callable[[], float] = lambda: 0
) -> Iterator[Activations]:
    """Checkpoint every layer of a net while the block runs, in steps whose activations would take more than `room()` bytes.

    A net that has no list of layers keeps its activations.  So does any net for a batch whose layers are entered by fewer than
    `small` bytes (None: `SMALL`) together.
    """
    try:
        layers = [net.get_submodule(layer.name) for layer in layers_of(net)]
    except ModelError:
        layers = []
    before = [layer.__dict__.get("forward") for layer in layers]
    least = (SMALL if small is None else small) / max(1, len(layers))
    activations = Activations(net, layers, least, room)
    for place, layer in enumerate(layers):
        layer.forward = activations.of(layer, first=place == 0, gives_back=place % EVERY == EVERY - 1)
    try:
        yield activations
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def _entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the bytes of the hidden states among a layer's arguments."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden.numel() * hidden.element_size() if isinstance(hidden, Tensor) else 0
