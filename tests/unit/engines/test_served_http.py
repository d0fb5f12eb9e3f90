"""The key of a server: read from its variable, sent in a header, and told by nothing."""

from __future__ import annotations

import traceback

import pytest

from paceline.engines.served.http import Http, NoAnswerError, key_of
from paceline.errors import ConfigError


@pytest.mark.parametrize("around", ["\n", "\r\n", " ", "\t\r"])
def test_a_key_is_read_without_the_end_of_its_line(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of secrets ends with one, and one written elsewhere with two characters."""
    monkeypatch.setenv("KEY_OF_TESTS", f"sk-SECRET{around}")
    assert key_of("KEY_OF_TESTS") == "sk-SECRET"
    monkeypatch.setenv("KEY_OF_TESTS", around)
    with pytest.raises(ConfigError, match="no environment variable KEY_OF_TESTS"):
        key_of("KEY_OF_TESTS")


@pytest.mark.parametrize("inside", ["\n", "\r", "\x7f", "\x85", "\u2026", "\udc80"])
def test_a_key_that_no_header_can_carry_is_refused_untold(
    inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the variable's name alone."""
    monkeypatch.setenv("KEY_OF_TESTS", f"sk-{inside}SECRET")
    with pytest.raises(ConfigError, match="key in KEY_OF_TESTS") as refused:
        key_of("KEY_OF_TESTS")
    assert "SECRET" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("key", ["sk-SECRET\n", "sk-SECRET\u2026"])
def test_an_error_about_a_header_does_not_quote_it(key: str) -> None:
    """Neither in its words nor in the errors behind it."""
    with pytest.raises(NoAnswerError, match="cannot be sent") as failed:
        Http("http://127.0.0.1:9", key).exchange("GET", "/health", None, 1.0)
    assert "SECRET" not in "".join(traceback.format_exception(failed.value))
