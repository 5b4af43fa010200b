# SPDX-License-Identifier: Apache-2.0
"""Log the figures of a run with MLflow, where MLFLOW_TRACKING_URI says (a server, a file store, a database).

The experiment is MLFLOW_EXPERIMENT_NAME, else "fleetune".
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any, Final

from fleetune.common.settings import Value
from fleetune.errors import UsageError
from fleetune.runs.trackers import PROJECT, Place

NEEDS: Final = "mlflow"
ORDER: Final = 30
STATUS: Final = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
LONGEST: Final = 500  # characters of a parameter in every version


class Tracker:
    """One run of MLflow; a resumed run goes on in it."""

    def __init__(self, place: Place) -> None:
        import mlflow
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        if place.offline and str(mlflow.get_tracking_uri()).startswith(("http", "databricks")):
            raise UsageError("MLFLOW_TRACKING_URI is a server, and nothing may be sent (--offline)")
        self._client: Any = MlflowClient()
        self._id = place.recall("mlflow") or self._new(place)
        self._client.update_run(self._id, status="RUNNING")
        known = self._client.get_run(self._id).data.params
        given = [Param(n, str(v)[:LONGEST]) for n, v in place.facts.items() if n not in known]
        self._client.log_batch(self._id, params=given)

    def _new(self, place: Place) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        id = str(self._client.create_run(experiment, run_name=place.name).info.run_id)
        place.keep("mlflow", id)
        return id

    def log(self, values: Mapping[str, float], round: int) -> None:
        """Log one metric per figure, with the round as its step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(n, v, now, round) for n, v in values.items()])

    def finish(self, summary: Mapping[str, Value], status: str) -> None:
        """Put the summary into the run's tags, and end it."""
        from mlflow.entities import RunTag

        self._client.log_batch(self._id, tags=[RunTag(n, str(v)) for n, v in summary.items()])
        self._client.set_terminated(self._id, STATUS[status])
