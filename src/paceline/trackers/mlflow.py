"""MLflow. Its server is MLFLOW_TRACKING_URI, as everywhere with MLflow; the experiment is the project.

The run is found again by a tag, and its metric `train/step` says how far it is. A call has been done when it
returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paceline.trackers.package import imported, reaching
from paceline.trackers.tracker import Point, TrackedRun

NAME = "MLflow"
TAG = "paceline.run"
BATCH = 900  # metrics in one call; MLflow takes 1000


class MLflow:
    def __init__(self, run: TrackedRun) -> None:
        """Raises ConfigError without the package, PacelineError."""
        mlflow = imported("mlflow", "mlflow")
        self._metric = mlflow.entities.Metric
        with reaching(NAME, "open the run"):
            self._client: Any = mlflow.MlflowClient()
            experiment = self._client.get_experiment_by_name(run.project)
            place = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
            known = self._client.search_runs([place], f"tags.`{TAG}` = '{run.key}'", max_results=1)
            if known:
                self._id = known[0].info.run_id
                self._client.update_run(self._id, status="RUNNING")
            else:
                found = self._client.create_run(place, run_name=run.name, tags={TAG: run.key})
                self._id = found.info.run_id
                parameters = [mlflow.entities.Param(key, str(value)) for key, value in run.settings.items()]
                self._client.log_batch(self._id, params=parameters[:100])

    def newest(self) -> Mapping[str, int]:
        with reaching(NAME, "read the run"):
            metrics = self._client.get_run(self._id).data.metrics
        ends = "/step"
        return {name.removesuffix(ends): int(value) for name, value in metrics.items() if name.endswith(ends)}

    def write(self, points: Sequence[Point]) -> None:
        metrics = [
            self._metric(name, value, int(point.time * 1000), point.step)
            for point in points
            for name, value in {**point.named, f"{point.series}/step": point.step}.items()
        ]
        with reaching(NAME, "take the points"):
            for first in range(0, len(metrics), BATCH):
                self._client.log_batch(self._id, metrics=metrics[first : first + BATCH])

    def close(self) -> None:
        with reaching(NAME, "end the run"):
            self._client.set_terminated(self._id)
