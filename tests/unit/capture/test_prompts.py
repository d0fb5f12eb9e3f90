"""Prompt files: fixed order, stable ids, and a broken line that costs nothing but its message."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.capture.prompts import prompts_digest, read_prompts
from paceline.errors import ConfigError


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_prompts_keep_the_order_of_the_file(tmp_path: Path) -> None:
    """Blank lines are nothing; a prompt without an id gets one from its text."""
    path = write(tmp_path, '{"id": "b", "prompt": "two"}', "", '{"prompt": "one"}')
    first = read_prompts(path)
    assert [p.text for p in first] == ["two", "one"]
    assert first[0].prompt_id == "b"
    assert read_prompts(path) == first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x", "prompt": ', "line 2: it is not JSON"),
        ("[1, 2]", 'line 2: it has no text under "prompt"'),
        ('{"id": "x", "prompt": "  "}', 'line 2: it has no text under "prompt"'),
        ('{"id": 7, "prompt": "p"}', "line 2: .*not a string"),
        ('{"id": "a", "prompt": "again"}', "line 2: the id 'a' was used before"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    """File, line number, what is wrong and what to do."""
    path = write(tmp_path, '{"id": "a", "prompt": "fine"}', line)
    with pytest.raises(ConfigError, match=message):
        read_prompts(path)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    """Neither an empty file, nor none, nor binary data starts a run."""
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(write(tmp_path, "", ""))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "binary")


def test_the_digest_depends_on_text_and_order(tmp_path: Path) -> None:
    """A resumed run notices an edited prompt file."""
    one, two = '{"id": "a", "prompt": "x"}', '{"id": "b", "prompt": "y"}'
    digests = {
        prompts_digest(read_prompts(write(tmp_path, *lines))) for lines in [(one, two), (two, one), (one,)]
    }
    assert len(digests) == 3


def test_the_shipped_sets_do_not_share_a_prompt() -> None:
    """Acceptance length is measured on prompts that were never trained."""
    folder = Path(__file__).parents[3] / "prompts"
    train, heldout = read_prompts(folder / "train.jsonl"), read_prompts(folder / "heldout.jsonl")
    assert len(train) >= 300
    assert not {p.text for p in train} & {p.text for p in heldout}
