"""Every tracker: its name, and what opens it: a function of a TrackedRun that returns a Tracker."""

from __future__ import annotations

from paceline.table import Table

TRACKERS = Table(
    "tracker",
    "paceline.trackers",
    {
        "tensorboard": "paceline.trackers.tensorboard:TensorBoard",
        "wandb": "paceline.trackers.wandb:WandB",
        "mlflow": "paceline.trackers.mlflow:MLflow",
        "trackio": "paceline.trackers.trackio:Trackio",
    },
)
