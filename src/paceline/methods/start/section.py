"""The setting `start_from` of a method's section. No torch."""

from __future__ import annotations

from pathlib import Path

from paceline.methods.settings import MethodSection
from paceline.methods.start.folder import read_start_folder


class StartSection(MethodSection):
    """`start_from`: the folder of a draft of this method and target, from which weights and shape come. It
    is a public folder, an export, or a checkpoint of a run. It must stay in its place, and its content may
    not change."""

    start_from: Path | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        return () if self.start_from is None else (self.start_from,)

    def refuse_start(self, folder: Path) -> None:
        """Raise ConfigError for a folder that no run of these settings can start from."""

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Raises ConfigError for a folder of `start_from` that no run can start from."""
        if self.start_from is None:
            return []
        self.refuse_start(self.start_from)
        start = read_start_folder(self.start_from)
        if start.target_name or start.target_version:
            return []
        return [
            (
                f"{self.start_from} (method.start_from) does not say for which target it was trained: only "
                "its sizes, its vocabulary and, where it has one, its embedding are compared.",
                "See on its model card that it drafts for this very target, not for its base model, another "
                "fine-tuning or release: it would start from worse guesses, without an error.",
            )
        ]
