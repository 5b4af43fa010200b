# SPDX-License-Identifier: Apache-2.0
"""Run the rounds of `fleetune fleet serve` inside a Flower that is there already: the only place that imports `flwr`.

server_app.py, client_app.py    the two apps        shim.py    the folder that `flwr run` takes
"""

from __future__ import annotations

import os

# Flower would report every start to its makers and look for updates otherwise
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
