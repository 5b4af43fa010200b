# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: every weight goes to the closest value of its group's grid; the baseline of all quantisation.

Needs no data.  On the grid of the runtime (`grid=ggml`) it is hard to beat by much at 4 bits; at 3 it falls apart.
The scheme has no paper of its own; as the baseline it is in Frantar et al. 2023, arXiv 2210.17323, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fleetune.compression import Solved
from fleetune.compression.layerwise.column_loop import nearest
from fleetune.compression.layerwise.grids import Grid
from fleetune.compression.methods.optq import check_grid, check_groups, dynamic, packed

PAPER = "the baseline of Frantar et al., ICLR 2023, arXiv 2210.17323"


@dataclass(frozen=True)
class Solver:
    """Settings; see `grids` for the kinds of grid."""

    data: ClassVar[bool] = False

    bits: int = field(default=4, metadata={"symbol": "b", "help": "bits of a code: 2, 3, 4 or 8"})
    group: int = field(
        default=32, metadata={"symbol": "g", "help": "columns that share a scale (0: the whole row)"}
    )
    grid: str = field(
        default="ggml", metadata={"symbol": "grid", "help": "ggml, symmetric, asymmetric or universal"}
    )
    search: bool = field(
        default=False, metadata={"symbol": "mse", "help": "try shrunken ranges, keep the best"}
    )

    def __post_init__(self) -> None:
        check_grid(self.grid, self.bits, self.group)

    def check(self, name: str, R: int, C: int) -> str:
        return check_groups(name, C, self.group)

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        """Every group on its grid, without regard to H."""
        grid, group = Grid(self.grid, self.bits, self.search), self.group or W.shape[1]
        return packed(grid, group, *dynamic(W, grid, group, nearest))
