"""Prompt files: fixed order, stable ids, and a broken line that is set aside alone."""

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
    ("line", "prompt_id", "reason"),
    [
        (b'{"id": "x", "prompt": ', "line-2", "it is not JSON"),
        (b"[" * 100_000, "line-2", "it is not JSON"),
        (b"[1, 2]", "line-2", 'it has no text under "prompt"'),
        (b'{"id": "x", "prompt": "  "}', "x", 'it has no text under "prompt"'),
        (b'{"id": 7, "prompt": "p"}', "line-2", '"id" is not a string'),
        (b'{"id": null, "prompt": "p"}', "line-2", '"id" is not a string'),
        (b'{"id": "x", "prompt": "\\ud800"}', "x", "its prompt cannot be encoded"),
        (b'{"prompt": "\\ud800"}', "line-2", "its prompt cannot be encoded"),
        (b'{"id": "\\ud800", "prompt": "p"}', "line-2", '"id" cannot be encoded'),
        (b'{"id": "x", "prompt": "\xff"}', "line-2", "it is not UTF-8"),
        (b'{"id": "a", "prompt": ""}', "line-2", 'it has no text under "prompt"'),
    ],
)
def test_a_broken_line_keeps_its_place_and_says_what_is_wrong(
    tmp_path: Path, line: bytes, prompt_id: str, reason: str
) -> None:
    """File and line number are in the reason; no other prompt has another id or place for it."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"id": "a", "prompt": "fine"}\n' + line + b'\n{"prompt": "also fine"}\n')
    first, broken, last = read_prompts(path)
    assert (first, last) == tuple(
        read_prompts(write(tmp_path, '{"id": "a", "prompt": "fine"}', '{"prompt": "also fine"}'))
    )
    assert broken.prompt_id == prompt_id
    assert broken.broken.startswith(f"{path}, line 2: {reason}")
    assert not first.broken
    (broken.broken + broken.prompt_id).encode()  # the ledger can hold both


def test_the_id_of_a_broken_line_is_nobody_elses(tmp_path: Path) -> None:
    """A prompt may be called like the place of a line; it keeps its name."""
    path = write(tmp_path, "nonsense", '{"id": "line-1", "prompt": "p"}', '{"id": "line-1", "prompt": ""}')
    assert [p.prompt_id for p in read_prompts(path)] == ["line-1-broken", "line-1", "line-3"]


def test_an_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """Which of the two a sample is of could not be told."""
    path = write(tmp_path, '{"id": "a", "prompt": "fine"}', '{"id": "a", "prompt": "again"}')
    with pytest.raises(ConfigError, match="line 2: the id 'a' was used before, in line 1"):
        read_prompts(path)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    """Neither an empty file, nor none, nor one that is something else starts a run."""
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(write(tmp_path, "", ""))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"holds no prompt.*line 1: it is not JSON"):
        read_prompts(write(tmp_path, "id,prompt", "a,text"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"holds no prompt.*line 1: it is not UTF-8"):
        read_prompts(tmp_path / "binary")


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """JSON text may hold other separators as they are, and what is blank around it does not matter: a byte
    order mark, or the record separator of JSON text sequences."""
    path = tmp_path / "prompts.jsonl"
    first = '\ufeff{"id": "a", "prompt": "one\u2028two"}\r\n'
    path.write_bytes((first + '\x1e{"id": "b", "prompt": "x"}\n').encode())
    assert [(p.prompt_id, p.text) for p in read_prompts(path)] == [("a", "one\u2028two"), ("b", "x")]


def test_the_digest_depends_on_text_and_order(tmp_path: Path) -> None:
    """A resumed run notices an edited prompt file."""
    one, two, bad = '{"id": "a", "prompt": "x"}', '{"id": "b", "prompt": "y"}', "nonsense"
    files = [(one, two), (two, one), (one,), (one, bad), (one, bad + "!")]
    digests = [prompts_digest(read_prompts(write(tmp_path, *lines))) for lines in files]
    assert len(set(digests)) == 5
    as_ever = "3c0b5eee5bd3bce6898141bcdfca2af00375730190bae65983c446a678a60014"
    assert digests[0] == as_ever, "a run that began goes on"


def test_the_shipped_sets_do_not_share_a_prompt() -> None:
    """Acceptance length is measured on prompts that were never trained."""
    folder = Path(__file__).parents[3] / "prompts"
    train, heldout = read_prompts(folder / "train.jsonl"), read_prompts(folder / "heldout.jsonl")
    assert len(train) >= 300
    assert not {p.text for p in train} & {p.text for p in heldout}
