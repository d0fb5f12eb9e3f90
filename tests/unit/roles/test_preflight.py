"""What a start says before it starts: notes a line each, refusals all at once."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.errors import ConfigError
from paceline.roles import preflight as module
from paceline.roles.plan import RunPlan
from paceline.roles.preflight import (
    Finding,
    enough_files_can_be_open,
    preflight,
    shared_memory_holds_the_budget,
)


def plan_with(directory: Path, budget_mib: int, folder: Path) -> Any:
    features = SimpleNamespace(directory=directory, budget_mib=budget_mib)
    return SimpleNamespace(config=SimpleNamespace(features=features, feature_folder=folder))


def test_shared_memory_that_is_smaller_than_the_budget_is_told_before_the_start(tmp_path: Path) -> None:
    """It can never hold it, or is too full now. A budget that fits is no finding, a place that is not there
    refuses."""
    space = os.statvfs(tmp_path)
    total_mib, free_mib = (n * space.f_frsize >> 20 for n in (space.f_blocks, space.f_bavail))
    for budget_mib, refuses in ((total_mib + 1, True), (min(free_mib + 100, total_mib), False)):
        [finding] = shared_memory_holds_the_budget(plan_with(tmp_path, budget_mib, tmp_path / "f"))
        assert finding.refuses == refuses
        for advice in ("lower features.budget_mib", "--shm-size=", "set features.directory to a folder on"):
            assert advice in finding.next
    assert not list(shared_memory_holds_the_budget(plan_with(tmp_path, 1, tmp_path / "f")))
    [finding] = shared_memory_holds_the_budget(plan_with(tmp_path / "none", 1, tmp_path / "f"))
    assert finding.refuses


def test_few_open_files_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first of them is missing."""
    for limit, count in ((64, 1), (4096, 0), (resource.RLIM_INFINITY, 0)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert len(list(enough_files_can_be_open(plan_with(Path(), 1, Path())))) == count


def test_every_refusal_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one a start; and notes do not refuse."""

    def check(_: RunPlan) -> Iterator[Finding]:
        yield Finding("a is odd.", "Look at a.")
        yield Finding("b is wrong.", "Mend b.", refuses=True)
        yield Finding("c is wrong.", "Mend c.", refuses=True)

    monkeypatch.setattr(module, "CHECKS", [check])
    with pytest.raises(ConfigError) as caught:
        preflight(plan_with(Path(), 1, Path()))
    assert caught.value.what == "b is wrong.\nc is wrong."
    monkeypatch.setattr(module, "CHECKS", [lambda plan: [next(check(plan))]])
    assert preflight(plan_with(Path(), 1, Path())) == ["note: a is odd. Look at a."]
