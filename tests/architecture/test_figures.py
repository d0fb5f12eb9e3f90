"""The figures in the README are those that were measured, and the same wherever they stand again."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.readme import README, expected

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_newest_figures() -> None:
    """`python -m benchmarks.readme` brings it up to date; nobody types them."""
    assert README.read_text() == expected()


def test_the_recipes_result_is_that_of_its_newest_report() -> None:
    """In the README, and where the short recipe of `make quality` is compared with the whole one."""
    newest = max((ROOT / "benchmarks" / "results").glob("*-smollm2-cpu.json"))
    measured = json.loads(newest.read_text())["evaluation"]
    tree, chain = (f"{one['acceptance_length']:.2f}" for one in (measured, measured["chain"]))
    shown = README.read_text()
    assert f"{tree} with a tree of 7 guesses, and {chain} with a chain of 3" in " ".join(shown.split())
    assert f"the whole recipe {tree} and {chain}." in (ROOT / "benchmarks" / "quality.py").read_text()


def test_make_train_takes_the_same_time_wherever_it_is_told() -> None:
    told = {
        "README.md": "measures the draft (",
        "Makefile": "then measure it (",
        "recipes/smollm2-cpu.yaml": "in ",
    }
    for page, before in told.items():
        assert f"{before}about a quarter of an hour" in (ROOT / page).read_text(), page
