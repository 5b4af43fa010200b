# SPDX-License-Identifier: Apache-2.0
"""State the version of Fleetune, and what else decides the last bits of a result."""

import platform

__version__ = "0.1.0"


def processor(device: str) -> str:
    """Return the kind of processor behind a device of torch's, with the instructions that torch uses on it."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
