"""Finds a target's configuration and tokenizer, for verbs that need no weights. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from paceline.errors import ConfigError
from paceline.target.hub import described_target
from paceline.target.settings import TargetSection

Finder = Callable[[TargetSection], TargetSection]


def finder(target_config: Path | None) -> Finder:
    """Gives the section with a folder that has them. `target_config`: that folder, if target.model is not at
    hand. Raises ConfigError."""
    if target_config is not None:
        return lambda target: target.model_copy(update={"model": target_config, "revision": None})

    def find(target: TargetSection) -> TargetSection:
        try:
            return described_target(target)
        except ConfigError as error:
            other = "or give a folder with its config.json and tokenizer: --target-config FOLDER."
            raise ConfigError(error.what, why=error.why, next=f"{error.next.rstrip('.')}; {other}") from error

    return find
