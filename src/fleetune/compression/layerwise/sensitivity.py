"""Estimate how much an error in each output of a matrix changes the model's next-token distributions.

To second order, the KL divergence that an error e of a layer's outputs causes at one token is e' F e / 2, with F the Fisher
information: the mean of g g', g the gradient of -log p(y) by these outputs and y drawn from the model's own p.  With F's diagonal
alone, for a matrix W [R, C] with inputs x and an error E = Q - W, as if g and x were independent (K-FAC: Martens and Grosse 2015,
arXiv 1503.05671),

    KL  ~  1/2 sum_i F_i (E_i H E_i'),        F_i = mean g_i^2,  H = mean x x'        (means over tokens)

The output head has F_v = mean p_v (1 - p_v), times the square of a factor on the logits.  A row of the input table counts only
where its token is: there G = mean g g' takes H's place, and the token's share that of F.  An expert's output y_te counts r_te
times in the layer's, so the gradient by it is r_te g_t; one step back gives that by gate and up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetune.compression.layerwise.activations import hooked
from fleetune.compression.layerwise.experts import GATE_UP, Experts
from fleetune.data.encode import Encoded, collate
from fleetune.evaluation.losses import pad_id, predictors
from fleetune.models.lazy import in_memory
from fleetune.models.net.layers import by_layer
from fleetune.models.net.model import Model

PIECE: Final = 1 << 23  # logits alive at a time


@dataclass(frozen=True)
class Sensitivity:
    """What errors cost at each output, as means over the tokens of some windows."""

    rows: dict[str, Tensor]  # layer's name in the net -> F float64 [R]
    head: Tensor  # float64 [V]: F of the head's rows
    table: Tensor  # float64 [H, H]: G of the embedding's outputs
    shares: Tensor  # float64 [V]: each token's share of the windows
    experts: dict[str, Tensor]  # parameter of experts -> F float64 [experts, R] of each


def measure(
    model: Model,
    windows: Tensor,
    names: list[str],
    seed: int,
    on_window: Callable[[int, int], None] = lambda number, count: None,
    experts: Sequence[Experts] = (),
) -> Sensitivity:
    """Measure the sensitivity of the linear layers `names`, of experts, head and embedding on windows int64 [n, length].

    One window is in memory at a time, its activations layer by layer.  `on_window(number, count)` may raise to stop.
    """
    net: Any = model.net
    table, V = net.get_input_embeddings(), net.get_input_embeddings().weight.shape[0]
    found = {n: torch.zeros(net.get_submodule(n).weight.shape[0], dtype=torch.float64) for n in names}
    head = torch.zeros(V, dtype=torch.float64)
    G = torch.zeros(table.weight.shape[1], table.weight.shape[1], dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)

    with by_layer(net), _observed(net, found), squares(experts) as of_experts, torch.enable_grad():
        for number, window in enumerate(windows):
            on_window(number, len(windows))
            leaf, times = _back(model, window, draw, head)
            g = times * _gradient_of(leaf).reshape(-1, len(G)).double().cpu()
            G.addmm_(g.T, g)
    tokens = windows.numel()
    shares = torch.bincount(windows.reshape(-1), minlength=V).double() / tokens
    of_layers, of_routed = ({n: f / tokens for n, f in each.items()} for each in (found, of_experts))
    return Sensitivity(of_layers, head / tokens, G / tokens, shares, of_routed)


def _back(model: Model, window: Tensor, draw: torch.Generator, head: Tensor) -> tuple[Tensor, float]:
    """Run a window int64 [length] forward and back; add p (1 - p) of all tokens to `head` [V].

    Returns the embedding's outputs, which have their gradient, and the factor that they are of the table's rows.
    """
    net: Any = model.net
    table, norm = net.get_input_embeddings(), list[float]()

    def see(module: nn.Module, args: Any, out: Tensor) -> None:
        norm.append(float(out.detach().norm()))

    with _first(table) as embedded, net.get_output_embeddings().register_forward_hook(see):
        batch = collate([Encoded(ids=window.numpy(), n_prompt=1)], pad_id(model), model.device)
        hidden, logits = predictors(net, batch)
        size = max(1, PIECE // len(table.weight))
        gradient = _gradient(hidden.detach(), logits, size, draw, head, norm)
        torch.autograd.backward(hidden, gradient)
    return embedded[-1]


def _gradient(
    hidden: Tensor,
    logits: Callable[[Tensor], Tensor],
    size: int,
    draw: torch.Generator,
    head: Tensor,
    norm: list[float],
) -> Tensor:
    """Return the gradient of sum -log p(y) by the head's inputs [N, H], y drawn from p, `size` tokens at a time.

    p (1 - p) is added to `head` [V].  `norm` then ends with the norm of what the head returned last: a model
    may change its logits after the head.
    """
    parts = []
    whole = float(hidden.norm())  # if these are all logits, their head is not called again
    for rows in hidden.split(size):  # type: ignore[no-untyped-call]
        x = rows.clone().requires_grad_()
        seen = len(norm)
        z = logits(x).float()
        p = z.detach().softmax(-1)
        scale = (float(z.detach().norm()) if len(norm) > seen else whole) / norm[-1]
        head += scale**2 * (p * (1 - p)).sum(0, dtype=torch.float64).cpu()[: len(head)]
        u = torch.rand(len(p), 1, generator=draw).to(p.device)
        y = torch.searchsorted(p.cumsum(-1), u).clamp_(max=p.shape[1] - 1)
        p.scatter_add_(1, y, torch.full_like(y, -1, dtype=p.dtype))
        torch.autograd.backward(z, p)
        parts.append(_gradient_of(x))
    return torch.cat(parts)


def _gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _add_squares(to: Tensor, g: Tensor) -> None:
    to += g.reshape(-1, len(to)).double().square().sum(0).cpu()


@contextmanager
def _first(table: Any) -> Iterator[list[tuple[Tensor, float]]]:
    """Make the embedding's outputs the leaf that gradients flow to; the list gets it, and what it is of the table's rows.

    Some modules multiply the rows by a number.
    """
    leaves = list[tuple[Tensor, float]]()

    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        rows = F.embedding(args[0], module.weight)
        leaf = out.detach().requires_grad_()
        leaves.append((leaf, float(out.norm()) / max(float(rows.norm()), 1e-30)))
        return leaf

    with table.register_forward_hook(hook):
        yield leaves


def _observed(net: nn.Module, sums: Mapping[str, Tensor]) -> ExitStack:
    """Return a context in which each backward pass adds the squared gradients of a layer's outputs to its [R] in `sums`."""

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def watch(module: nn.Module, args: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda g: _add_squares(sums[name], g))  # type: ignore[no-untyped-call]

        return watch

    return hooked(net.get_submodule(name).register_forward_hook(hook(name)) for name in sums)


class _Call(NamedTuple):
    """What the experts of a layer were called with."""

    x: Tensor  # [T, H]
    chosen: Tensor  # int64 [T, k]: each token's experts
    weights: Tensor  # [T, k]: of what they return

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the tokens that chose an expert, int64 [n], and what it returns for each counts, [n, 1]."""
        token, slot = (self.chosen == number).nonzero(as_tuple=True)
        return token, self.weights[token, slot, None].float()


@contextmanager
def squares(experts: Sequence[Experts]) -> Iterator[dict[str, Tensor]]:
    """Add up the squared gradients of the outputs of experts in every backward pass while the block runs.

    The sums are float64 [experts, R] over each expert's tokens, by parameter.
    """
    sums = {
        name: torch.zeros(W.shape[:2], dtype=torch.float64)
        for each in experts
        for name, W in each.matrices.items()
    }

    def hook(each: Experts) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watch(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            call = _Call(*(given.detach() for given in args))
            if out.requires_grad:
                out.register_hook(lambda g: _add_routed(each, call, g, sums))  # type: ignore[no-untyped-call]

        return watch

    with hooked(each.module.register_forward_hook(hook(each)) for each in experts):
        yield sums


@torch.no_grad()
def _add_routed(each: Experts, call: _Call, g: Tensor, sums: dict[str, Tensor]) -> None:
    """Add the squares of the gradients by what the experts' matrices return; g [T, H] is that by the experts' output."""
    up, down = each.parameters
    with in_memory(each.module):
        for number in torch.unique(call.chosen).tolist():
            token, r = call.of(number)
            by_y = g[token].float() * r
            z = each.linear(GATE_UP, number, call.x[token]).float().requires_grad_()
            with torch.enable_grad():
                a = each.activation(z)
            (by_z,) = torch.autograd.grad(a, z, by_y @ each.matrices[down][number].float())
            for name, by in ((up, by_z), (down, by_y)):
                sums[name][number] += by.double().square().sum(0).cpu()
