"""Fine-tune all weights by zeroth-order descent with every direction stored in memory (ZO-SGD).

Ghadimi, Lan: "Stochastic First- and Zeroth-Order Methods for Nonconvex Stochastic Programming", SIAM J. Optim.
2013, arXiv 1309.5549 (section 3, the RSGF method), with the two-sided estimate of Spall: "Multivariate
Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation", IEEE TAC 1992 (equation 2.2).

## Algorithm

    g = (L(w + eps z; B) - L(w - eps z; B)) / (2 eps),   w <- w - eta g z

The step of `mezo` (whose paper's section 2 names this the baseline with twice the memory of inference), and the same numbers bit
for bit: but z, one number a weight in the weights' type, is written out before the step and read by both evaluations.  It is
here to measure the memory; there is no reason to train with it.

## Differences from the paper

- The step is a ledger entry, so the update is no pass over z.
- Signs as directions, nearly orthogonal by default (`hashed`); Spall's are independent (`law=rademacher`), Ghadimi and Lan's
  `gaussian` (in a 16-bit model the z that is stored is rounded to 16 bits, the ledger's is not).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from fleetune.data import Batches
from fleetune.models.net.model import Model
from fleetune.models.shapes import Shape
from fleetune.tuning.exchange.footprint import Footprint
from fleetune.tuning.exchange.messages import Payload
from fleetune.tuning.methods import mezo

KIND = "ledger"
PAPER = "Ghadimi and Lan, SIAM J. Optim. 2013, arXiv 1309.5549"
SENDS = "one integer a step up; the ledger's sums down"
CLIENTS = 1


@dataclass(frozen=True)
class Method(mezo.Method):
    """MeZO's hyper-parameters and defaults, since the two are compared; its rate is constant."""

    decay: ClassVar[int] = 0  # type: ignore[misc]  # no setting here

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Do MeZO's round with every direction stored."""
        view, _ = self.opened(model, payload)
        with view.storing():
            return super().local(model, payload, batches, key, memory)

    def footprint(self, shape: Shape) -> Footprint:
        return super().footprint(shape)._replace(stores_direction=True)
