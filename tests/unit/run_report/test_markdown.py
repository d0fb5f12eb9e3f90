"""A report as Markdown: figures as they are, and foreign text as text."""

from __future__ import annotations

import pytest

from paceline.run_report.markdown import as_markdown
from paceline.run_report.tables import Part


def shown(text: str) -> str:
    return as_markdown(Part("Title", (text,)))[2]


def test_an_interval_stays_as_it_is() -> None:
    assert shown("1.500 [1.400, 1.600]") == "1.500 [1.400, 1.600]"
    assert shown("[-0.1, 0.2] in length") == "[-0.1, 0.2] in length"


@pytest.mark.parametrize("link", ["[1, 2](http://there)", "[1, 2][there]", "[1, 2]: http://there"])
def test_foreign_text_makes_no_link_of_an_interval(link: str) -> None:
    assert shown(link).startswith(r"\[1, 2]")
