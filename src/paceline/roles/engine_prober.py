"""The process of `paceline doctor RUN --probe`: builds the run's engine and probes it, as a producer would.

It takes no lock and no folder of the run: what it needs lies in a folder of a moment.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.engines.engine import TargetEngine
from paceline.engines.settings import EngineRun
from paceline.roles.question import answer
from paceline.target.hub import local_target


@contextmanager
def trial_engine(config: RunConfig, report: Callable[..., None]) -> Iterator[TargetEngine]:
    """The run's engine, apart from the run. Raises EngineError for a target that it cannot run."""
    torch.set_num_threads(config.machine.producer_threads)
    target = local_target(config.target)
    with tempfile.TemporaryDirectory(prefix="paceline-trial-", dir=config.features.directory) as name:
        place = Path(name)

        def files() -> Path:
            (place / "files").mkdir(exist_ok=True)
            return place / "files"

        run = EngineRun(features=config.method.build().features, directory=place, files=files, report=report)
        with closing(config.engine.build(target, run)) as engine:
            yield engine


def probe(run_file: str) -> dict[str, Any]:
    notes: list[str] = []

    def report(event: str, **fields: Any) -> None:
        if event == "note":
            notes.append(str(fields.get("message", "")))

    with trial_engine(load_run_config(Path(run_file)), report) as engine:
        engine.probe()
        facts = engine.facts
        return {"dtype": facts.dtype, "device": facts.device, "notes": notes}


if __name__ == "__main__":
    sys.exit(answer(lambda run_file: json.dumps(probe(run_file))))
