"""The plan's sum for models that this machine has not run: what is private, what a file backs, what the disk must read.

    python -m benchmarks.memory_table

prints the table of docs/memory.md: llamas of 1 to 13 B weights as Q4_0 files, one row of 256 tokens a step, base mapped.
"""

import argparse
from typing import Final

from benchmarks.shape import llama
from fleetune.common.display import human_bytes
from fleetune.models.shapes import Shape, shape_of
from fleetune.models.stored import KEPT
from fleetune.planning import device_cost
from fleetune.planning.device_cost import Workload
from fleetune.tuning import methods
from fleetune.tuning.exchange.footprint import Footprint

# hidden, inner, layers, heads, heads of keys and values, vocabulary
MODELS: Final = {
    "1.1 B (TinyLlama)": (2048, 5632, 22, 32, 4, 32000),
    "3.2 B (Llama 3.2)": (3072, 8192, 28, 24, 8, 128256),
    "6.7 B (Llama 2)": (4096, 11008, 32, 32, 32, 32000),
    "13.0 B (Llama 2)": (5120, 13824, 40, 40, 40, 32000),
}
WORK: Final = Workload(1, 256, 1, "fp32", "mapped")
FILE: Final = 18 / 32  # bytes of a weight in Q4_0
# over the file, a step
PASSES: Final = {"inference": 1, "mezo": 1, "fedkseed, back-propagating": 3, "fedit": 3}
MAPPED_FLOOR: Final = 120e6  # of the process itself: code and data that files back
DEVICES: Final = (2, 4, 8, 16)  # GB
LEFT: Final = 0.5e9  # for the system


def footprint(name: str, of: Shape) -> Footprint:
    """The work of a device."""
    if name == "inference":
        return Footprint("none")
    if name.startswith("fedkseed"):
        return methods.make("fedkseed", {"backprop": 1.0}).footprints(of)[1]  # type: ignore[attr-defined, no-any-return]
    return methods.make(name, {}).sized(1, 1).footprint(of)  # type: ignore[attr-defined, no-any-return]


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| llama | method | peak | of it private | file | read a step | fits |")
    print("|---|---|---|---|---|---|---|")
    for model, sizes in MODELS.items():
        of = shape_of(llama(*sizes))
        file = of.params * FILE
        for name, passes in PASSES.items():
            parts = device_cost.memory(of, WORK, footprint(name, of))
            peak = sum(parts.values())
            private = peak - min(KEPT, file) - MAPPED_FLOOR
            fits = [f"{ram} GB" for ram in DEVICES if peak + LEFT <= ram * 1e9]
            cells = [human_bytes(peak), human_bytes(private), human_bytes(file), human_bytes(passes * file)]
            print(
                f"| {model} | {name} | {' | '.join(cells)} | {fits[0] + ' and more' if fits else 'none of them'} |"
            )


if __name__ == "__main__":
    main()
