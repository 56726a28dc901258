"""Metrics and files for MLflow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byol_fast.trackers.base import Metrics, RunInfo, Status
from byol_fast.utils.records import flatten

_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
# MLflow's limits on a request, and on the length of a parameter.
_MAX_METRICS, _MAX_PARAMS, _MAX_LENGTH = 1000, 100, 6000


class MLflowTracker:
    """A run of MLflow: metrics, options and environment as parameters, and files as artifacts.

    Server, experiment and credentials come from MLflow's environment variables: `MLFLOW_TRACKING_URI`,
    `MLFLOW_EXPERIMENT_NAME` and others.
    """

    name = "mlflow"

    def begin(self, run: RunInfo) -> str:
        """Start a run, or continue the one of a resumed run, whose parameters stay as they were."""
        import mlflow
        from mlflow.entities import Metric, Param

        self._mlflow: Any = mlflow
        self._metric = Metric
        self._run_id = str(mlflow.start_run(run_id=run.tracker_run, run_name=run.name).info.run_id)
        self._client = mlflow.MlflowClient()
        if run.tracker_run is None:
            values = flatten(run.config | {"environment": run.environment}).items()
            params = [Param(name, str(value)[:_MAX_LENGTH]) for name, value in values]
            for start in range(0, len(params), _MAX_PARAMS):
                self._client.log_batch(self._run_id, params=params[start : start + _MAX_PARAMS])
        return self._run_id

    def log(self, metrics: Sequence[Metrics]) -> None:
        """Log the values, in few requests."""
        now = int(1000 * time.time())
        values = [self._metric(name, value, now, step) for step, named in metrics for name, value in named.items()]
        for start in range(0, len(values), _MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=values[start : start + _MAX_METRICS])

    def artifact(self, path: Path) -> None:
        """Save a file among the run's artifacts."""
        self._client.log_artifact(self._run_id, str(path))

    def end(self, status: Status) -> None:
        """End the run."""
        self._mlflow.end_run(_STATUS[status])
