"""Writes the run file that the tests of this folder launch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_of_hosts import SECTIONS, Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes it, with these sections instead of some."""

    def written(folder: Path = tmp_path, **sections: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump({**copy.deepcopy(SECTIONS), **sections}))
        return path

    return written
