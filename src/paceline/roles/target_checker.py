"""The process of `paceline doctor RUN` that reads the target's files as the roles do when they start.

Configuration, tokenizer and template are used once, and what the target's version is a digest of is read.
No weights are held in memory: `--probe` loads them.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing, suppress
from pathlib import Path

from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.engines.served.settings import ServedSection
from paceline.errors import LedgerMissingError
from paceline.roles.question import answer
from paceline.roles.target_binding import refuse_other_target
from paceline.target.folder import INDEX, WEIGHTS, TensorFiles, read_config
from paceline.target.hub import described_target, is_of_hub
from paceline.target.layout import head_layout
from paceline.target.model import build_empty, library_config
from paceline.target.tokenizer import PromptEncoder
from paceline.target.version import TargetVersion


def check(run_file: str) -> str:
    """What was looked at. Raises the error with which a start would end."""
    given = load_run_config(Path(run_file))
    config = given.model_copy(update={"target": described_target(given.target)})
    folder = config.target.model
    if isinstance(
        config.engine, ServedSection
    ):  # the server may know families that the library does not build
        library_config(folder)
    else:
        build_empty(folder)
    PromptEncoder.of(config.target)
    if is_of_hub(given.target) and not _is_fetched(folder):
        return "its configuration, tokenizer and template; the start fetches its weights"
    files = TensorFiles(folder)
    files.refuse_missing()
    head_layout(folder, read_config(folder))
    _refuse_another(config)
    return "its configuration, tokenizer, template and files of weights"


def _is_fetched(folder: Path) -> bool:
    """Whether all weights are there. A sharded model's index comes with its description."""
    names = set(TensorFiles(folder).shard_of.values()) if (folder / INDEX).is_file() else {WEIGHTS}
    return all((folder / name).is_file() for name in names)


def _refuse_another(config: RunConfig) -> None:
    """Raise ConfigError if it is not the target that the run has captured from."""
    with suppress(LedgerMissingError), closing(config.view_ledger()) as view:
        if view.snapshot().committed:
            refuse_other_target(view, config)
            return
    TargetVersion.of(config.target.model)


if __name__ == "__main__":
    sys.exit(answer(lambda run_file: json.dumps(check(run_file))))
