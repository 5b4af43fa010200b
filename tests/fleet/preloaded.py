"""Run a command of ours in a process that is forked from one in which everything is imported: it starts in a moment.

So many kills hit the work, and not the import of torch.
"""

import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import torch

import fleetune.fleet.door
import fleetune.fleet.line
import fleetune.tuning.run.run  # noqa: F401
from fleetune.cli.main import main
from fleetune.fleet import worker


def command(words: list[str], said: str, held: bool = False) -> None:
    """Run `fleetune WORDS`; what it says is added to the file `said`.

    The n-th work of a device that is `held` lasts until there is a file go-n.
    """
    torch.set_num_threads(1)
    work, calls = worker.work, itertools.count(1)

    def waiting(*given: Any) -> bytes:
        go = Path(f"go-{next(calls)}")
        while not go.exists():
            time.sleep(0.05)
        return work(*given)

    if held:
        worker.work = waiting
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.exit(main(words))
