"""Prompts as people have them, through the real command."""

from __future__ import annotations

import json
from pathlib import Path

from paceline.testing.tiny_run import TinyRun


def test_long_prompts_fail_and_a_complete_run_is_extended(tiny_model: Path, tmp_path: Path) -> None:
    """How many and where is said at the start; the others are trained, and later those that were added."""
    run = TinyRun(
        tmp_path, tiny_model, prompts={"max_prompt_tokens": 60, "rounds": 1}, training={"passes": 2}
    )
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[2:2] = [json.dumps({"id": n, "prompt": "wheel " * 20}) for n in range(2)]
    path.write_text("\n".join(lines) + "\n")
    first = run.command("train")
    assert first.returncode == 0, first.stderr
    assert "2 prompts fail, longer than the 60 tokens" in first.stdout
    assert f"the first: {path}, line 3; {path}, line 4" in first.stdout
    assert "20 samples trained" in first.stdout
    with path.open("a") as file:
        file.writelines(json.dumps({"prompt": f"another wind {'abc'[n]}"}) + "\n" for n in range(3))
    longer = run.command("train")
    assert longer.returncode == 0, longer.stderr
    assert "23 samples trained" in longer.stdout
    checked = run.command("fsck")
    assert checked.returncode == 0, checked.stdout
    path.write_text(path.read_text().replace("another wind a", "another wind z"))
    edited = run.command("train")
    assert edited.returncode == 2
    assert "not those that this run was started with" in edited.stderr
