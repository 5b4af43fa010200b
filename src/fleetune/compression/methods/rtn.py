"""Round every weight to the nearest value of its group's grid: the baseline of all quantisation.

The scheme has no paper of its own.  As the baseline it is in Frantar et al., ICLR 2023, arXiv 2210.17323, section 5.
At 3 bits it breaks most models: use `optq` there.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fleetune.common.settings import setting
from fleetune.compression import Solved
from fleetune.compression.layerwise import grids

PAPER = "the baseline of Frantar et al., ICLR 2023, arXiv 2210.17323"


@dataclass(frozen=True)
class Solver:
    """The settings of rounding to nearest."""

    data: ClassVar[bool] = False

    bits: int = setting(4, "b", "bits of a code: 2, 3, 4, 5 or 8")
    group: int = setting(32, "g", "columns that share a scale (0: the whole row)")
    grid: str = setting(
        "ggml", "grid", "ggml, symmetric, asymmetric, universal, iq4_nl; q6_k, q5_k, q4_k, q3_k, q2_k, iq4_xs"
    )

    def problems(self) -> list[str]:
        """List what is wrong with the settings."""
        return grids.grid_problems(self.grid, self.bits, self.group)

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError(*problems)
        for name, value in zip(
            ("bits", "group"), grids.settled(self.grid, self.bits, self.group), strict=True
        ):
            object.__setattr__(self, name, value)  # what the grid says

    def check(self, name: str, R: int, C: int) -> str:
        """Say why rows of C columns cannot be divided into groups, or "" when they can."""
        return grids.row_problem(name, C, self.grid, self.group)

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        """Round every group to its grid; H is not used."""
        grid, group = grids.Grid(self.grid, self.bits), self.group or W.shape[1]
        grids.refuse_pruned(W, grid)
        return Solved(grids.rounded(W, grid, group))
