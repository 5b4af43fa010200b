"""Train some of the model's own parameters as fp32 copies: biases, norms, or all.

BitFit (Ben Zaken, Ravfogel, Goldberg, ACL 2022, arXiv 2106.10199) trains the biases alone.  A bias by which a router only chooses
experts (ERNIE 4.5's) has no gradient and counts as none.
"""

from dataclasses import dataclass
from typing import Any, Final

from fleetune.adapters.attachment import ParameterCopies
from fleetune.errors import ModelError
from fleetune.models.net.model import Model, named_tensors

CHOOSING: Final = "e_score_correction_bias"


def norms(net: Any) -> list[str]:
    """Return the names of the norms' parameters: of modules whose name or class says so (GPT-2 calls them `ln_1`)."""
    found = {name for name, module in net.named_modules() if "norm" in type(module).__name__.lower()}
    return [
        n
        for n, p in named_tensors(net)
        if p.dim() == 1 and ("norm" in n.lower() or n.rpartition(".")[0] in found)
    ]


@dataclass(frozen=True)
class Bitfit:
    """The biases; in a model that has none, the weights of its norms."""

    def put_on(self, model: Model, seed: int) -> ParameterCopies:
        """Replace them by copies, which start at their values whatever the seed."""
        biases = [n for n, _ in named_tensors(model.net) if n.endswith("bias") and not n.endswith(CHOOSING)]
        names = biases or norms(model.net)
        if not names:
            raise ModelError("the model has neither biases nor norms to tune", hint="choose another module")
        return ParameterCopies(model.net, names)


@dataclass(frozen=True)
class Full:
    """Every tensor of the model."""

    def put_on(self, model: Model, seed: int) -> ParameterCopies:
        """Replace all by copies, which start at their values whatever the seed."""
        return ParameterCopies(model.net, {n for n, _ in named_tensors(model.net)})
