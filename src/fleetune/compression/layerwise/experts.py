"""Solve the matrices of a mixture's experts, each with the Hessian of the tokens that were routed to it.

transformers has the matrices of a layer's experts in two parameters, [E, 2 F, H] (gate and up) and [E, H, F] (down); gpt-oss has
them transposed.  An expert that saw fewer tokens than columns has no Hessian of full rank, and gets that of all tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from fleetune.compression import Solved, Solver
from fleetune.compression.layerwise.blocks import MatrixResult
from fleetune.compression.layerwise.hessian import TOKENS_AT_ONCE, accumulate, lost, mirrored, share, trace
from fleetune.models.artefact import Quantised, dense, joined

GATE_UP, DOWN = "gate_up_proj", "down_proj"
FEW: Final = "saw fewer tokens than"  # in the note on experts that are solved on all tokens of their layer


class Experts(NamedTuple):
    """The experts of a layer."""

    name: str  # of their module in the net
    module: Any

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name, in the order in which a token meets them."""
        return {f"{self.name}.{part}": getattr(self.module, part) for part in (GATE_UP, DOWN)}

    @property
    def matrices(self) -> dict[str, Tensor]:
        """The parameters as [E, R, C] = [E, out, in] by name, in the same order; a transposed one is a view of it."""
        return {name: p.mT if self.transposed else p for name, p in self.parameters.items()}

    @property
    def transposed(self) -> bool:
        """Whether the parameters hold every matrix as [in, out]."""
        return bool(self.module.is_transposed)

    def linear(self, part: str, number: int, x: Tensor) -> Tensor:
        """Return what a matrix of an expert gives for its inputs x [n, C], [n, R]; `part` is GATE_UP or DOWN."""
        W = self.matrices[f"{self.name}.{part}"][number]
        bias = getattr(self.module, f"{part}_bias")[number] if self.module.has_bias else None
        return nn.functional.linear(x.to(W), W, bias)

    def activation(self, gates_and_ups: Tensor) -> Tensor:
        """Return what the downs read of what GATE_UP gives [n, 2 F], [n, F]."""
        inputs: Tensor = self.module._apply_gate(gates_and_ups)
        return inputs


class Routed(NamedTuple):
    """What a layer's experts were called with."""

    x: Tensor  # [T, H]
    chosen: Tensor  # int64 [T, k]: each token's experts

    def tokens(self, number: int) -> int:
        """Return how many tokens chose an expert."""
        return int((self.chosen == number).any(-1).sum())


def has_experts(block: nn.Module) -> bool:
    """Return whether a block has matrices of experts, in whatever form (a convolution's [C, 1, K] is none)."""
    return any(p.dim() == 3 and p.shape[1] > 1 for p in block.parameters())


def experts_of(name: str, block: nn.Module) -> list[Experts]:
    """Return the experts in a block whose matrices can be solved: gates with ups, and downs; `name` is the block's."""
    found = []
    for inner, module in block.named_modules():
        parts = [getattr(module, part, None) for part in (GATE_UP, DOWN)]
        if not all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in parts):
            continue
        if hasattr(module, "is_transposed"):  # transformers says how they are stored
            found.append(Experts(f"{name}.{inner}", module))
    return found


def parameters_of(linears: Mapping[str, nn.Linear], experts: Sequence[Experts]) -> dict[str, nn.Parameter]:
    """Return what is compressed of a block, by name, as the block holds it."""
    found = {f"{name}.weight": linear.get_parameter("weight") for name, linear in linears.items()}
    return found | {name: p for each in experts for name, p in each.parameters.items()}


def matrices_of(linears: Mapping[str, nn.Linear], experts: Sequence[Experts]) -> dict[str, Tensor]:
    """Return the same by name as matrices, [.., R, C] = [.., out, in]."""
    found: dict[str, Tensor] = {f"{name}.weight": linear.weight for name, linear in linears.items()}
    return found | {name: W for each in experts for name, W in each.matrices.items()}


def solve_experts(
    solver_of: Callable[[str], Solver],
    experts: Experts,
    routed: Routed | None,
    on_name: Callable[[str], None],
    *,
    placing: bool,
) -> Iterator[tuple[str, Quantised | Tensor, MatrixResult]]:
    """Yield each parameter of the experts of a layer, its compressed weights and the result over all experts.

    `solver_of` gives the solver of a parameter.  `routed` is None where nothing is known of the inputs.  With `placing` the
    compressed gates and ups are in place when the downs' inputs are computed.
    """
    for name, matrices in experts.matrices.items():
        on_name(name)
        count, _, C = matrices.shape
        solver, solved, error, given, few = solver_of(name), list[Solved](), 0.0, 0.0, list[int]()
        of_all = list[Tensor]()
        for number in range(count):
            W = matrices[number].detach().float().cpu()
            H, tokens = torch.zeros(C, C), 0
            if routed is not None:
                H, tokens = hessian(experts, name, number, routed, of_all)
                few += [tokens] * (tokens < C)
            solved.append(solver.solve(W, H))
            if routed is not None:
                error += lost(W, solved[-1], H)
                given += trace(W, H)
        weight = _stacked(solved, experts, name)
        if placing:
            parameter = experts.parameters[name]
            parameter.data = dense(weight).to(parameter)
        left = share(error, given) if routed is not None else float("nan")
        yield name, weight, MatrixResult(name, left, _notes(solved, few, C))


def hessian(
    experts: Experts, name: str, number: int, routed: Routed, of_all: list[Tensor] | None = None
) -> tuple[Tensor, int]:
    """Return the Hessian [C, C] of an expert's matrix, and how many tokens chose the expert: fewer than C, and it is of all.

    What gates and ups read is then the same for every expert: `of_all`, empty for a parameter's first expert, keeps it.
    """
    C = experts.matrices[name].shape[-1]
    tokens = routed.tokens(number)
    few = tokens < C
    if few and of_all:
        return of_all[0], tokens
    H = torch.zeros(C, C)
    x = routed.x if few else routed.x[(routed.chosen == number).any(-1)]
    for first in range(0, len(x), TOKENS_AT_ONCE):
        inputs = x[first : first + TOKENS_AT_ONCE]
        if name.endswith(DOWN):
            inputs = experts.activation(experts.linear(GATE_UP, number, inputs))
        accumulate(H, inputs.cpu())
    H = mirrored(H)
    if few and of_all is not None and not name.endswith(DOWN):
        of_all.append(H)
    return H, tokens


def _stacked(solved: list[Solved], experts: Experts, name: str) -> Quantised | Tensor:
    """Return the weights of all experts as one, of the parameter's shape."""
    weight, matrices = joined([each.weight for each in solved]), experts.matrices[name]
    if isinstance(weight, Quantised):
        return replace(weight, experts=len(solved), transposed=experts.transposed)
    rows = weight.view(matrices.shape).to(matrices.dtype)
    return rows.mT.contiguous() if experts.transposed else rows


def _notes(solved: list[Solved], few: list[int], C: int) -> tuple[str, ...]:
    said = []
    if few:
        seen = f"{len(few)} of {len(solved)} experts {FEW} columns, {C} (the least {min(few)})"
        said.append(f"{seen}: solved on all tokens of the layer")
    counts: Mapping[str, int] = Counter(note for each in solved for note in each.notes)
    return (*said, *(f"{note} ({n} of {len(solved)} experts)" for note, n in counts.items()))
