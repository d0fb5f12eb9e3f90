"""The run file's `export` section: the folders for inference servers that end a run. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from paceline.section import Count, Section

ExportDtype = Literal["bfloat16", "float32"]


class ExportSection(Section):
    """`formats`: names of exports (exports/table.py); without any, training ends without an export.

    `directory`: one format is written to it, several to folders of their names in it. By default every
    format has its folder in `export` in the run's directory. `step`: of a kept checkpoint, by default
    the best that was measured, or else the newest. `target_name`: how servers and readers find the target (a
    hub id or a path), by default the id that its folder was fetched under, or else its absolute path.
    """

    changeable: ClassVar[tuple[str, ...]] = ("*",)
    formats: tuple[str, ...] = ()
    directory: Path | None = None
    dtype: ExportDtype = "bfloat16"
    step: Count | None = None
    target_name: str | None = None

    def folders(self, run_directory: Path) -> dict[str, Path]:
        """The absolute folder of each format."""
        base = (self.directory or run_directory / "export").absolute()
        names = dict.fromkeys(self.formats)
        alone = self.directory is not None and len(names) == 1
        return {name: base if alone else base / name for name in names}
