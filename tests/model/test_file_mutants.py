"""Every bug planted below checkpoints, refs and features is found by the check named for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.testing.mutants_files import CHECKS, MUTANTS, seeds_to_detect

SEEDS = 20


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_in_files_is_found(memory: Path, name: str) -> None:
    """Or the check proves nothing."""
    assert seeds_to_detect(name, memory, SEEDS) is not None


@pytest.mark.parametrize("check", CHECKS)
def test_the_product_itself_passes_the_check(memory: Path, check: str) -> None:
    """What a mutant fails is the mutant's doing."""
    CHECKS[check](memory / "sound", 0)
