"""Split the tensors of experts as runtimes have them: one tensor each of all experts' gates, ups and downs.

transformers has [E, rows, columns] with the rows of an expert's gate and up together; llama.cpp and mlx-lm have three tensors.
"""

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np

# what the configurations call the number of experts
COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# the end of a parameter's name -> the ends of its parts' names
_ENDS: Final = {
    "experts.gate_up_proj": ("experts.gate_proj.weight", "experts.up_proj.weight"),
    "experts.gate_up_proj_bias": ("experts.gate_proj.bias", "experts.up_proj.bias"),
    "experts.down_proj": ("experts.down_proj.weight",),
    "experts.down_proj_bias": ("experts.down_proj.bias",),
}
# the same of what has another name in the gguf package's map
_ENDS_IN_GGUF: Final = _ENDS | {
    ".shared_mlp.input_linear.weight": (
        ".mlp.shared_experts.gate_proj.weight",
        ".mlp.shared_experts.up_proj.weight",
    ),
    ".gate.moe_statics.e_score_correction_bias": (".moe_statics.e_score_correction.bias",),
    ".self_attn.sinks": (".self_attn.sinks.weight",),
}
STACKED: Final = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")  # the file's tensors
_ONE_ROW: Final = ("ffn_gate_inp_shexp.weight", "exp_probs_b.bias")  # a vector in the file


class Part(NamedTuple):
    """A part of a parameter."""

    name: str
    number: int
    of: int  # the number of the parameter's parts

    def order(self, shape: tuple[int, ...], matrix: bool, paired: bool) -> np.ndarray | None:
        """Return which of all rows of the parameter each row of the part is, int64; None: all of them, as they are.

        `shape` is the parameter's, [.., rows, columns] of a matrix and [.., rows] of a bias; `paired`: gates and ups alternate.
        """
        if self.of == 1:
            return None
        before, rows = (shape[:-2], shape[-2]) if matrix else (shape[:-1], shape[-1])
        own = np.arange(rows).reshape((-1, self.of) if paired else (self.of, -1))
        taken = own[:, self.number] if paired else own[self.number]
        found: np.ndarray = (np.arange(math.prod(before))[:, None] * rows + taken).reshape(-1)
        return found


def stacked(parameter: str) -> list[Part]:
    """Return the parts of a parameter; one, under the parameter's own name, of those that are no experts'."""
    return _split(parameter, _ENDS)


def parts(parameter: str) -> list[Part]:
    """Return the parts of a parameter as `stacked` does, under names of the gguf package's map."""
    return _split(parameter.replace(".block_sparse_moe.", ".mlp."), _ENDS_IN_GGUF)


def _split(name: str, ends: Mapping[str, tuple[str, ...]]) -> list[Part]:
    for end, found in ends.items():
        if name.endswith(end):
            front = name.removesuffix(end)
            return [Part(front + part, i, len(found)) for i, part in enumerate(found)]
    return [Part(name, 0, 1)]


def is_bias(tensor: str) -> bool:
    """Return whether a tensor of the file is a bias, of one layer or of all experts'."""
    return tensor.endswith(".bias")


def part_shape(shape: tuple[int, ...], part: Part, tensor: str) -> tuple[int, ...]:
    """Return the shape in the file of a part of a parameter of this shape (with the rows of a matrix last but one)."""
    if tensor.endswith(_ONE_ROW):
        return shape[-1:]
    rows = -1 if is_bias(tensor) or len(shape) == 1 else -2
    whole = list(shape)
    whole[rows] //= part.of
    return tuple(whole)


def count(config: Any) -> int:
    """Return the number of experts of a layer; 0 where a configuration has none."""
    return next((int(n) for name in COUNTS if (n := getattr(config, name, None))), 0)
