"""`paceline clean`: lists or frees feature folders that no run needs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from paceline.cli.plain import say
from paceline.roles.abandoned_folders import feature_folders, free_abandoned


def clean_folder(console: Console, base: Path, *, free: bool) -> None:
    """List every feature folder of this user in `base` with its run; with `free`, free abandoned ones."""
    abandoned, freed_bytes, kept = 0, 0, 0
    for found in feature_folders(base):
        kept += not found.abandoned
        abandoned += found.abandoned
        verdict = "left"
        if found.abandoned:
            freed_bytes += found.num_bytes
            verdict = ("freed" if free_abandoned(found) else "left") if free else "abandoned"
        say(console, f"{found.folder}  {found.num_bytes / 2**20:.1f} MiB  {verdict}: {found.why}")
    if not abandoned:
        say(console, f"{base} holds no feature folder that is abandoned ({kept} in use or unknown)")
    elif not free:
        say(
            console,
            f"Nothing was changed. Free {abandoned} folders ({freed_bytes / 2**20:.1f} MiB) with: "
            f"paceline clean {base} --yes",
        )
