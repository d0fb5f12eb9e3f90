"""Weights & Biases. Where it sends to, and the key, are its own settings (`wandb login`, WANDB_MODE).

`train/step` and `heldout/step` are the axes, since held-out points come later than their steps: with W&B's
own step, which only grows, they would take the place of training steps that follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paceline.trackers.package import imported, reaching
from paceline.trackers.tracker import HELDOUT, TRAIN, Point, TrackedRun

NAME = "W&B"
# Of itself it records the paths of program and folder, the commit, and the load of the machine.
SILENT = {
    "console": "off",
    "disable_git": True,
    "save_code": False,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
}


class WandB:
    def __init__(self, run: TrackedRun) -> None:
        """Raises ConfigError without the package, PacelineError."""
        wandb = imported("wandb", "wandb")
        with reaching(NAME, "open the run"):
            self._run: Any = wandb.init(
                project=run.project,
                id=run.key,
                name=run.name,
                resume="allow",
                dir=str(run.directory),
                config=dict(run.settings),
                settings=wandb.Settings(**SILENT),
            )
            for series in (TRAIN, HELDOUT):
                self._run.define_metric(f"{series}/*", step_metric=f"{series}/step")

    def newest(self) -> Mapping[str, int]:
        """What an earlier process has sent; nothing while W&B is offline."""
        with reaching(NAME, "read the run"):
            found = {series: self._run.summary.get(f"{series}/step") for series in (TRAIN, HELDOUT)}
        return {series: int(step) for series, step in found.items() if step is not None}

    def write(self, points: Sequence[Point]) -> None:
        with reaching(NAME, "take the points"):
            for point in points:
                self._run.log({**point.named, f"{point.series}/step": point.step})

    def close(self) -> None:
        with reaching(NAME, "send the last points"):
            self._run.finish()
