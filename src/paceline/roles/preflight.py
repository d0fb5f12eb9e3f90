"""Preflight: checks before a run starts. Each finding is one line, a note or a refusal.

A check is a function of the plan that yields findings, listed in CHECKS. It starts nothing, loads no torch,
and is fast enough for a command line.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from paceline.errors import ConfigError
from paceline.features.ownership import bytes_of
from paceline.roles.plan import RunPlan

OPEN_FILES_MIN = 256  # for the ledger, locks, checkpoints, and the files of libraries


@dataclass(frozen=True)
class Finding:
    """`next`: what the user can do about it; `refuses`: the run must not start."""

    what: str
    next: str
    refuses: bool = False


Check = Callable[[RunPlan], Iterator[Finding]]


def preflight(plan: RunPlan) -> list[str]:
    """The notes, one line each. Raises ConfigError with all refusals, if there are any."""
    found = [finding for check in CHECKS for finding in check(plan)]
    refused = [finding for finding in found if finding.refuses]
    if refused:
        raise ConfigError(
            "\n".join(finding.what for finding in refused),
            why="Nothing was started and nothing was changed.",
            next="\n".join(dict.fromkeys(finding.next for finding in refused)),
        )
    return [f"note: {finding.what} {finding.next}" for finding in found]


def shared_memory_holds_the_budget(plan: RunPlan) -> Iterator[Finding]:
    """Compare the budget with the space: a container's /dev/shm has 64 MiB by default."""
    features = plan.config.features
    try:
        space = os.statvfs(features.directory)
    except OSError as error:
        yield Finding(
            f"features.directory {features.directory} cannot be used ({error.strerror}).",
            "Set features.directory to a folder in memory, such as /dev/shm.",
            refuses=True,
        )
        return
    total = space.f_blocks * space.f_frsize  # 0 where there is no limit
    other = f"Give more (`docker run --shm-size={features.budget_mib + 64}m`), set features.directory to a "
    other += "folder on a disk, or lower features.budget_mib to"
    if 0 < total < features.budget_mib << 20:
        yield Finding(
            f"{features.directory} holds {total >> 20} MiB in all, and features.budget_mib is "
            f"{features.budget_mib}.",
            f"{other} {max(1, total * 9 // 10 >> 20)}.",
            refuses=True,
        )
        return
    # The run reuses what an earlier start has left there.
    room = space.f_bavail * space.f_frsize + bytes_of(plan.config.feature_folder)
    if room < features.budget_mib << 20:
        yield Finding(
            f"{features.directory} has room for {room >> 20} MiB, and features.budget_mib is "
            f"{features.budget_mib}: the producer will stop when it is full.",
            f"{other} {max(1, room >> 20)}.",
        )


def enough_files_can_be_open(_: RunPlan) -> Iterator[Finding]:
    """Check the limit of open files, which the roles inherit."""
    limit, _most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limit < OPEN_FILES_MIN:
        yield Finding(
            f"Only {limit} files can be open at once, and a role needs up to {OPEN_FILES_MIN}.",
            "Raise the limit: `ulimit -n 1024`.",
        )


CHECKS: list[Check] = [shared_memory_holds_the_budget, enough_files_can_be_open]
