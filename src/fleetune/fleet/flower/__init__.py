# SPDX-License-Identifier: Apache-2.0
"""Run a recipe as a Flower app: on SuperNodes that are there already, or on Flower's simulation engine.

    server_app.py, client_app.py    the two parts of the app; `fleetune fleet app` writes the folder that `flwr run` takes
    partition.py                    who a client of a simulation is, and which rows it has
    records.py, shim.py             bytes in Flower's messages; the files of the app

This folder is the only place that imports `flwr`: `flwr.app`, `flwr.serverapp` and `flwr.clientapp` alone, which Flower
documents.
"""

from __future__ import annotations

import os

# Flower would report every start to its makers and look for updates otherwise
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
