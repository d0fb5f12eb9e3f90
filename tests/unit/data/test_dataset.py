"""Prompt files: fixed order, stable ids, read block by block, and a broken line that fails alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from paceline.data.formats import ID_BYTES_MAX
from paceline.data.opening import open_file
from paceline.data.prompts import Prompt
from paceline.data.source import BLOCK
from paceline.errors import ConfigError
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.testing.synthetic import HIDDEN


def write(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def prompts_of(path: Path) -> list[Prompt]:
    file = open_file(path)
    return file.read(0, file.size)


def test_prompts_keep_the_order_of_the_file(tmp_path: Path) -> None:
    """Blank lines are nothing; a prompt without an id gets one from its text."""
    path = write(tmp_path, '{"id": "b", "prompt": "two"}', "", '{"prompt": "one"}')
    first = prompts_of(path)
    assert [p.text for p in first] == ["two", "one"]
    assert first[0].prompt_id == "b"
    assert prompts_of(path) == first


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "x", "prompt": ', "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[1, 2]", 'it has no text under "prompt"'),
        (b'{"id": "x", "prompt": "  "}', "its prompt is empty"),
        (b'{"id": "a", "prompt": ""}', "its prompt is empty"),
        (b'{"id": null, "prompt": "p"}', 'its "id" is neither a string nor a number'),
        (b'{"id": true, "prompt": "p"}', 'its "id" is neither a string nor a number'),
        (b'{"id": NaN, "prompt": "p"}', 'its "id" is neither a string nor a number'),
        (b'{"id": "x", "prompt": "\\ud800"}', "its prompt cannot be encoded"),
        (b'{"prompt": "\\ud800"}', "its prompt cannot be encoded"),
        (b'{"id": "\\ud800", "prompt": "p"}', 'its "id" cannot be encoded'),
        (b'{"id": "x", "prompt": "\xff"}', "it is not UTF-8"),
        (b'{"messages": [{"role": "user", "content": "p"}]}', 'it holds a chat ("messages")'),
        (b'{"conversations": [{"from": "human", "value": "p"}]}', 'it holds a chat ("conversations")'),
        (b'{"id": "' + b"x" * 4000 + b'", "prompt": "p"}', 'its "id" is too long: 4002 bytes'),
        (b'{"id": "unreadable-line-9", "prompt": "p"}', "its \"id\" begins with 'unreadable-line-'"),
        (b'{"id": "a", "prompt": "other"}', "its \"id\" belongs to another text: 'a', in line 1"),
    ],
)
def test_a_broken_line_keeps_its_place_and_says_what_is_wrong(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    """File and line number are in the reason; no other prompt has another id or place for it."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"id": "a", "prompt": "fine"}\n' + line + b'\n{"prompt": "also fine"}\n')
    file = open_file(path)
    first, broken, last = file.read(0, 9)
    assert (first, last) == tuple(
        prompts_of(write(tmp_path, '{"id": "a", "prompt": "fine"}', '{"prompt": "also fine"}'))
    )
    assert broken.prompt_id == "unreadable-line-2"
    assert broken.broken.startswith(f"{path}, line 2: {reason}")
    assert not first.broken
    (broken.broken + broken.prompt_id).encode()  # the ledger can hold both
    assert file.notes == [f"1 of 3 prompts fail, the first: {broken.broken}"]


def test_numbers_are_ids(tmp_path: Path) -> None:
    """As they are written, so that a file of numbered prompts is one of prompts."""
    path = write(tmp_path, '{"id": 7, "prompt": "p"}', '{"id": -2.5, "prompt": "q"}')
    assert [p.prompt_id for p in prompts_of(path)] == ["7", "-2.5"]


def test_the_longest_id_fits_a_slot_of_the_feature_store(tmp_path: Path) -> None:
    """A run never stops in its middle over an id that was taken at its start."""
    import torch

    longest = "\x00" * ((ID_BYTES_MAX - 2) // 6)  # what JSON writes longest
    [prompt] = prompts_of(write(tmp_path, json.dumps({"id": longest, "prompt": "p"})))
    assert not prompt.broken
    features = SharedMemoryFeatureStore(tmp_path / "store", budget_bytes=8 << 20, owner=True)
    tensors = {f"a_feature_of_some_method_{n}": torch.zeros(512, HIDDEN) for n in range(6)}
    features.put(f"{'r' * 64}:9999/{prompt.prompt_id}", tensors, generation=2**60)
    features.destroy()


def test_a_line_that_repeats_another_is_taken_once(tmp_path: Path) -> None:
    """With a note that counts them; ids of the file decide, so the same text under another id is another."""
    one, two = '{"prompt": "one"}', '{"id": "b", "prompt": "two"}'
    file = open_file(write(tmp_path, one, two, one, two, '{"id": "c", "prompt": "two"}', one))
    assert [p.prompt_id for p in file.read(1, 9)] == ["b", "c"]
    assert file.size == 3
    assert file.repeated == [3, 4, 6]
    assert file.notes == [
        "3 lines repeat an earlier one and are used once, the first: "
        "line 3 repeats line 1; line 4 repeats line 2; line 6 repeats line 1"
    ]


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    """Neither an empty file, nor none, nor one that is something else starts a run."""
    with pytest.raises(ConfigError, match="holds no prompt"):
        open_file(write(tmp_path, "", ""))
    with pytest.raises(ConfigError, match="cannot be read"):
        open_file(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"holds no prompt.*line 1: it is not JSON"):
        open_file(write(tmp_path, "id,prompt", "a,text"))
    with pytest.raises(ConfigError, match=r"holds no prompt.*holds a chat .*section `data`"):
        open_file(write(tmp_path, '{"messages": []}'))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"holds no prompt.*line 1: it is not UTF-8"):
        open_file(tmp_path / "binary")


def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path) -> None:
    """A FIFO would be waited for, and /dev/zero never ends."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path, Path("a\0b"), Path("x" * 300)):
        with pytest.raises(ConfigError, match="cannot be read"):
            open_file(path)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """JSON text may hold other separators as they are, and what is blank around it does not matter: a byte
    order mark, or the record separator of JSON text sequences."""
    path = tmp_path / "prompts.jsonl"
    first = '\ufeff{"id": "a", "prompt": "one\u2028two"}\r\n'
    path.write_bytes((first + '\x1e{"id": "b", "prompt": "x"}\n').encode())
    assert [(p.prompt_id, p.text) for p in prompts_of(path)] == [("a", "one\u2028two"), ("b", "x")]


def numbered(count: int) -> list[str]:
    return [json.dumps({"id": f"p{n}", "prompt": f"question {n}"}) for n in range(count)]


def test_a_start_reads_what_it_needs_of_a_large_file(tmp_path: Path) -> None:
    """100,000 prompts are looked through once; every later start reads one block for one group."""
    path, kept = write(tmp_path, *numbered(100_000)), tmp_path / "index.json"
    assert open_file(path, index_path=kept).source.num_read == 100_000
    later = open_file(path, index_path=kept)
    assert (later.size, later.source.num_read) == (100_000, 0)
    assert [p.prompt_id for p in later.read(70_000, 64)] == [f"p{n}" for n in range(70_000, 70_064)]
    assert later.source.num_read <= BLOCK + 1
    later.read(70_064, 64)
    assert later.source.num_read <= BLOCK + 1, "a block is read once for its groups"


def test_every_block_is_read_as_the_whole_file_is(tmp_path: Path) -> None:
    """Whatever stands at its edges: blank, broken and repeated lines."""
    lines = numbered(2 * BLOCK)
    for place in (5, BLOCK - 1, BLOCK, BLOCK + 7):
        lines[place : place + 1] = [
            lines[place],
            "",
            "broken",
            lines[0],
            json.dumps({"id": "p1", "prompt": "z"}),
        ]
    path, kept = write(tmp_path, *lines), tmp_path / "index.json"
    whole = open_file(path, index_path=kept)
    everything = whole.read(0, whole.size)
    assert whole.size == 2 * BLOCK + 8
    for first in range(0, whole.size, 500):
        assert open_file(path, index_path=kept).read(first, 500) == everything[first : first + 500]


def test_a_file_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    """By the digest of the block that is read, or by a look through it all at the next start."""
    path, kept = write(tmp_path, *numbered(9)), tmp_path / "index.json"
    file = open_file(path, index_path=kept)
    write(tmp_path, *numbered(8), json.dumps({"id": "p8", "prompt": "question 9"}))
    with pytest.raises(ConfigError, match=r"was changed during the run \(line 1 to the end\)"):
        file.read(0, 1)
    again = open_file(path, index_path=kept)
    assert again.source.num_read == 9
    assert again.digests(9) != file.digests(9)


def test_digests_are_those_of_the_first_prompts(tmp_path: Path) -> None:
    """So that a longer file is known again by its beginning; they depend on ids, texts and order."""
    path = write(tmp_path, *numbered(BLOCK + 40))
    known = open_file(path).digests(BLOCK + 10)
    assert len(known) == 2
    assert open_file(write(tmp_path, *numbered(3 * BLOCK))).digests(BLOCK + 10) == known
    assert open_file(write(tmp_path, *numbered(BLOCK + 10))).digests(BLOCK + 10) == known
    one, two, bad = '{"id": "a", "prompt": "x"}', '{"id": "b", "prompt": "y"}', "nonsense"
    files = [(one, two), (two, one), (one,), (one, bad), (one, bad + "!")]
    assert len({open_file(write(tmp_path, *lines)).digests(9)[0] for lines in files}) == 5


def test_the_shipped_sets_do_not_share_a_prompt() -> None:
    """Acceptance length is measured on prompts that were never trained."""
    folder = Path(__file__).parents[3] / "prompts"
    texts = {p.text for p in prompts_of(folder / "heldout.jsonl")}
    train = open_file(folder / "train.jsonl", heldout=texts)
    assert train.size >= 300
    assert train.index.shared == 0
    assert open_file(folder / "train.jsonl", heldout=[train.read(5, 1)[0].text]).index.shared == 1
