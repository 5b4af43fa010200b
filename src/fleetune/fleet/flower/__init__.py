"""Run a recipe as a Flower app: on SuperNodes that are there already, or on Flower's simulation engine.

This folder alone imports `flwr`: the documented `flwr.app`, `flwr.serverapp` and `flwr.clientapp`.
"""

import os
from pathlib import Path
from typing import Final

from fleetune.common import __version__
from fleetune.common.files import write_atomic
from fleetune.errors import UsageError

# Flower would report every start to its makers and look for updates otherwise
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

PROJECT: Final = f"""\
[project]
name = "fleetune-app"
version = "{__version__}"
description = "Fleetune on SuperNodes: the code is that of the installed package"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fleetune"

[tool.flwr.app.components]
serverapp = "fleetune_app.server_app:app"
clientapp = "fleetune_app.client_app:app"

[tool.flwr.app.config]
recipe = ""  # path of a TOML recipe on the server, or the recipe itself
resume = ""  # or a stopped run to go on with: a path, a number, or latest
out = "runs"  # folder of the runs, on the server
simulate = false  # whether the nodes are those of a simulation: each has the rows of the recipe's client of its number
offline = false  # fetch nothing
wait = 0  # SuperNodes before the first round; 0: the recipe's clients
grace = 60.0  # seconds to wait for a SuperNode that has gone
round-deadline = 0.0  # seconds for a round; 0: 20 times the median answer, 600 at least
"""

# Flower reads the text of these files, and looks for an assignment
PART: Final = """\
from fleetune.fleet.flower import {part} as installed

app = installed.app
"""


def write_app(folder: Path) -> None:
    """Write the app that `flwr run` takes into a new or empty folder; UsageError for one that has something in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already", hint="take a new folder")
    code = folder / "fleetune_app"
    code.mkdir(parents=True)
    write_atomic(folder / "pyproject.toml", PROJECT.encode())
    write_atomic(code / "__init__.py", b"")
    for part in ("server_app", "client_app"):
        write_atomic(code / f"{part}.py", PART.format(part=part).encode())
