"""Errors: one tree, and every text of it says what happened, and what to do next."""

from __future__ import annotations

import ast
import errno
import re

import pytest

from paceline import errors
from paceline.cli.error_reference import SOURCES, ErrorText, error_tables, kinds, texts
from paceline.errors import PacelineError, UnforeseenError, explained

# Made in one module and turned into another error there, or a role's error told again by its supervisor.
ELSEWHERE = {"TemplateError", "RoleFailedError"}
# They are the reason in another error's text.
REASONS = {"target.chat_encoder", "roles.held_out", "training.ranks", "training.recovery"}


def test_all_errors_are_in_one_tree() -> None:
    """Whoever catches errors of Paceline finds them in one module, each with its meaning."""
    tree = {kind.__name__: kind for kind in kinds()}
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and "testing" not in path.parts:
                bases = {ast.unparse(base) for base in node.bases}
                if bases & {*tree, "PacelineError"} and node.name not in ELSEWHERE:
                    assert path == SOURCES / "errors.py", f"{node.name} in {path}"
    for kind in tree.values():
        assert kind.__doc__, kind
        assert kind.__doc__ != Exception.__doc__


def test_an_exit_code_tells_the_kind_of_an_error() -> None:
    """A kind and those that derive from it share one; a fenced process is told apart; 9 is the checker's."""
    own = {kind.__name__: kind.exit_code for kind in kinds() if "exit_code" in vars(kind)}
    assert len(set(own.values())) == len(own)
    assert not {0, 9, 130, 141} & set(own.values())
    assert own["FencedError"] == 11


@pytest.fixture(scope="module")
def every_text() -> list[ErrorText]:
    return texts()


def where(text: ErrorText) -> str:
    return f"{text.module}:{text.line}"


def test_every_text_says_what_happened_and_what_to_do(every_text: list[ErrorText]) -> None:
    """In sentences, without pleading or blaming, and with the next step."""
    for text in every_text:
        if text.module in REASONS and "next" not in text.parts:
            continue
        assert "next" in text.parts, where(text)
        assert text.parts["what"].rstrip("\n").endswith((".", "…", ")", ":")), where(text)
        assert text.parts.get("why", ".").rstrip().endswith((".", "…")), where(text)
        told = " ".join(text.parts.values())
        assert not re.search(r"(?i)\b(please|sorry|oops|invalid|illegal|abort)", told), where(text)


def test_every_text_is_on_the_page(every_text: list[ErrorText]) -> None:
    """With a mark for what is known only when it happens."""
    page = error_tables()
    assert len(every_text) > 300
    assert "**There is no …, neither a run's directory nor a run file.**" in page
    for kind in kinds():
        assert f"`{kind.__name__}`" in page


def test_nothing_in_a_text_is_markup_of_the_page() -> None:
    """A text may hold any character."""
    page = error_tables()
    assert page.count("`") % 2 == 0
    assert "<" not in re.sub(r"`[^`]*`|\\<", "", page)


@pytest.mark.parametrize("kind", [*kinds()], ids=lambda kind: kind.__name__)
def test_an_error_reads_the_same_whatever_python_error_it_is_too(kind: type[PacelineError]) -> None:
    """A KeyError would quote its text, an OSError would look for a number in it."""
    error = kind("It fell.", why="Gravity.", next="lift it")
    assert str(error) == "It fell. Gravity. Next: lift it"
    assert (error.what, error.why, error.next) == ("It fell.", "Gravity.", "lift it")
    assert explained(error) is error


@pytest.mark.parametrize(
    ("error", "what", "next"),
    [
        (OSError(errno.ENOSPC, "full", "/x"), "/x cannot be used (full).", "free space"),
        (OSError(errno.ESTALE, "stale"), "The system refused a request (stale).", "check that path"),
        (MemoryError(), "There is not enough memory.", "free some"),
        (KeyError("odd"), "that it does not know (KeyError: 'odd').", "paceline --debug"),
    ],
)
def test_an_error_of_another_kind_comes_with_advice_too(error: Exception, what: str, next: str) -> None:
    """In the same three parts."""
    told = explained(error)
    assert isinstance(told, UnforeseenError)
    assert told.what.endswith(what)
    assert told.next.startswith(next) or next in told.next


def test_no_error_is_only_in_the_module_and_never_made(every_text: list[ErrorText]) -> None:
    """A class that nothing raises, and that only groups nothing, would be a promise without a keeper."""
    made = {text.kind for text in every_text}
    for kind in kinds():
        assert kind.__name__ in made or kind.__subclasses__(), kind
    assert set(vars(errors)) >= {"PacelineError", "explained"}
