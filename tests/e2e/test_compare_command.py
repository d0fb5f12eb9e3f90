"""`paceline compare` as a user types it, every stage in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

from paceline.testing.tiny_run import TinyRun


def test_a_comparison_from_run_file_to_table(tmp_path: Path, tiny_model: Path) -> None:
    run = TinyRun(tmp_path, tiny_model, evaluation={"max_new_tokens": 8})
    report = tmp_path / "report.json"
    command = [*run.arguments("compare"), "--prompts", "8", "--tokens", "60", "--json", str(report)]
    first = run.run(command)
    assert first.returncode == 0, first.stderr
    assert "the features take at most" in first.stdout
    assert "Acceptance length alone misorders methods" in first.stdout
    [found] = json.loads(report.read_text())["variants"]
    assert found["name"] == "run"
    assert found["tokens"] >= 60
    assert found["evaluation"]["identical"] == 3
