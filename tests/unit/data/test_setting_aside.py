"""Prompts that are set aside share no question with the data that is left, and nothing is lost silently."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from paceline.data.opening import open_data, open_held_out
from paceline.data.prompts import asked
from paceline.data.setting_aside import ASIDE_MAX, set_aside
from paceline.data.settings import SourceSection
from paceline.errors import ConfigError


def chat(n: int, question: str) -> dict[str, Any]:
    turns = [("user", question), ("assistant", "a\u2028b"), ("user", f"and {n}?")]
    return {"id": f"c{n}", "messages": [{"role": role, "content": text} for role, text in turns]}


def as_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\r\n" for record in records))


def as_array(path: Path, records: list[Any]) -> None:
    path.write_text(json.dumps(records, indent=2, ensure_ascii=False))


def as_gzip(path: Path, records: list[Any]) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))


@pytest.mark.parametrize("write", [as_lines, as_array, as_gzip])
def test_what_is_set_aside_is_no_question_of_what_is_left(tmp_path: Path, write: Any) -> None:
    """Whatever the file is; a run takes both files as data and held-out prompts."""
    source, training, held_out = (tmp_path / name for name in ("data", "train.jsonl", "held.jsonl"))
    write(source, [chat(n, f"what is {n % 30}?") for n in range(200)])
    found = set_aside(source, training, held_out)
    assert (found.held_out, found.training, found.shared, found.broken) == (10, 190, 0, 0)
    aside = open_held_out(held_out)
    keys = {asked(prompt)[-1][0] for prompt in aside.read(0, 20)}
    data = open_data([SourceSection(path=training)], heldout=keys)
    assert (data.size, data.sources[0].index.shared) == (190, 0)


def test_the_share_is_spread_over_the_file_and_limited(tmp_path: Path) -> None:
    source, training, held_out = (tmp_path / name for name in ("data", "train", "held"))
    as_lines(source, [{"id": f"p{n}", "prompt": f"question {n}"} for n in range(2000)])
    assert set_aside(source, training, held_out).held_out == ASIDE_MAX
    numbers = [int(json.loads(line)["id"][1:]) for line in held_out.read_text().splitlines()]
    assert max(numbers) - min(numbers) > 1800


def test_repeats_and_broken_records_are_counted(tmp_path: Path) -> None:
    """A repeat of a held-out question is in neither file; a record that cannot be read is in neither, too."""
    source, training, held_out = (tmp_path / name for name in ("data", "train", "held"))
    prompts = [{"id": f"p{n}", "prompt": f"question {n % 20}"} for n in range(40)]
    source.write_text(
        "".join(json.dumps(prompt) + "\n" for prompt in prompts) + "{\n\n\udcff\n", errors="surrogateescape"
    )
    found = set_aside(source, training, held_out)
    assert (found.held_out, found.shared, found.training) == (2, 2, 36)
    assert found.broken >= 2


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "data"
    as_lines(source, [{"prompt": "only one"}])
    with pytest.raises(ConfigError, match="1 usable record"):
        set_aside(source, tmp_path / "train", tmp_path / "held")
    as_lines(source, [{"id": str(n), "prompt": "the same"} for n in range(5)])
    with pytest.raises(ConfigError, match="Every record"):
        set_aside(source, tmp_path / "train", tmp_path / "held")
