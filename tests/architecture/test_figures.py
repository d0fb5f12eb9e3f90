"""The benchmark figures in the README are those that were measured."""

from __future__ import annotations

from benchmarks.readme import README, expected


def test_the_readme_shows_the_newest_figures() -> None:
    """`python -m benchmarks.readme` brings it up to date; nobody types them."""
    assert README.read_text() == expected()
