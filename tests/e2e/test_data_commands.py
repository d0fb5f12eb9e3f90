"""What a user sees of data, through the real command; and runs of other data than plain prompts."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

from paceline.testing.tiny_run import TinyRun


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return TinyRun.execute([sys.executable, "-m", "paceline.cli.main", *arguments], os.environ)


def test_a_file_is_checked_with_the_target_and_its_time_measured(tiny_model: Path, tmp_path: Path) -> None:
    """In one command; and its errors are those of every command."""
    turns = [{"role": "user", "content": "a wheel"}, {"role": "assistant", "content": "turns"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\nbroken\n")
    checked = command(
        *("data", "check", str(path), "--target", str(tiny_model), "--answers", "data", "--measure"),
        *("--template", "brief=true", "--too-long", "truncate"),
    )
    assert checked.returncode == 0, checked.stderr
    assert "2 samples (1 messages)" in checked.stdout
    assert "<bos>a wheel<eos><bos>[[turns<eos>]]" in checked.stdout
    assert "time: 1 samples took" in checked.stdout
    refused = command("data", "check", str(path), "--target", str(tmp_path))
    assert refused.returncode == 2
    assert "no config.json" in refused.stderr
    assert command("data", "check", str(tmp_path / "none")).returncode == 2


def test_a_run_file_is_checked_as_its_run_would_read_it(tiny_model: Path, tmp_path: Path) -> None:
    """Its sources, its target and its limits, before it has started."""
    run = TinyRun(tmp_path, tiny_model)
    checked = command("data", "check", str(run.run_file))
    assert checked.returncode == 0, checked.stderr
    assert f"{tmp_path / 'train.jsonl'}: JSON lines, 20 samples" in checked.stdout
    assert "the target writes up to 12 tokens" in checked.stdout
    assert not run.directory.exists()


def test_a_run_trains_on_a_mixture_of_chats_and_prompts(tiny_model: Path, tmp_path: Path) -> None:
    """Compressed, weighted, and of several formats; the run is bound to it."""
    run = TinyRun(tmp_path, tiny_model)
    turns = [{"role": "user", "content": "the wind"}, {"role": "assistant", "content": "lets go"}]
    chats = [
        {"id": n, "conversations": [{**turns[0], "content": f"wind {chr(97 + n)}"}, turns[1]]}
        for n in range(6)
    ]
    (tmp_path / "chats").write_bytes(gzip.compress("\n".join(map(json.dumps, chats)).encode()))
    sources = [
        {"path": str(tmp_path / "train.jsonl"), "weight": 0.5},
        {"path": str(tmp_path / "chats"), "weight": 2},
    ]
    run.config["data"] = {"sources": sources, "max_answer_tokens": 12, "max_prompt_tokens": 60}
    del run.config["prompts"]
    run.write()
    trained = run.command("train")
    assert trained.returncode == 0, trained.stderr
    assert "22 samples trained" in trained.stdout
    sources[1]["weight"] = 1
    run.write()
    other = run.command("train")
    assert other.returncode == 2
    assert "sizes or weights of the sources" in other.stderr
