"""The examples of docs/python.md run as they stand, each in under 40 lines."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from paceline.methods.method import DraftMethod
from paceline.testing.method_suite import MethodSuite

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
EXAMPLES = dict(
    re.findall(r'^```python title="([\w.]+)"\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL)
)


def run(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / name).write_text(EXAMPLES[name])
    command = [sys.executable, name, *arguments]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name: str) -> None:
    assert len([line for line in EXAMPLES[name].splitlines() if line]) < 40


def test_a_trainer_of_ones_own_counts_every_number_once(tmp_path: Path) -> None:
    """It dies before its first checkpoint, then after one, and is started once too often."""
    for step in ("1", "3"):
        assert f"a crash after step {step}" in run(tmp_path, "own_trainer.py", step).stderr
    for _ in range(2):
        ended = run(tmp_path, "own_trainer.py")
        assert ended.stdout == f"{sum(range(100, 120))} after 5 steps\n", ended.stderr


def test_features_go_from_process_to_process(tmp_path: Path) -> None:
    ended = run(tmp_path, "two_processes.py")
    assert ended.stdout.startswith("the reader ended with 0\n"), ended.stderr
    assert "sample-0" in ended.stdout.splitlines()[1]


class TestBigram(MethodSuite):
    """The method of the page keeps the contract of all methods."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _importable(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("bigram")
        (folder / "bigram.py").write_text(EXAMPLES["bigram.py"])
        sys.path.insert(0, str(folder))

    def make(self) -> DraftMethod:
        method: DraftMethod = (
            import_module("bigram")
            .BigramSection(block_size=4, target_states=2, first_samples=4, dtype="float32")
            .build()
        )
        return method
