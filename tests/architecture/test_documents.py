"""The documentation's site: every page can be found, and no link leads to nothing."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lay_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lay_pages", ROOT / "scripts" / "lay_pages.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def named(part: object) -> Iterator[str]:
    """The pages of a part of the navigation."""
    if isinstance(part, str):
        yield part
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from named(inner)


def test_every_page_is_in_the_navigation_once(lay_pages: ModuleType) -> None:
    """A page that nobody finds is not written for users: add it to `nav` in zensical.toml."""
    found = list(named(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    assert sorted(found) == sorted(lay_pages.pages().values())


def test_the_site_builds_without_a_warning(lay_pages: ModuleType, tmp_path: Path) -> None:
    """`make docs`: links, and the anchors that they name, exist."""
    lay_pages.lay(tmp_path / "build" / "pages")
    (tmp_path / "zensical.toml").write_text((ROOT / "zensical.toml").read_text())
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "build" / "site" / "guarantees.html").exists()


def test_a_link_to_a_file_that_is_no_page_becomes_its_path(lay_pages: ModuleType) -> None:
    """The site has no tests and no recipes; the reader is told where they are in the source."""
    text = lay_pages.page(ROOT / "README.md")
    assert "`tests/model/test_simulation.py`" in text
    assert "](guarantees.md)" in text
    assert "](tests/" not in text


def test_a_link_to_nothing_is_refused(
    lay_pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.md").write_text("See [there](gone.md).")
    monkeypatch.setattr(lay_pages, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"page\.md links to gone\.md"):
        lay_pages.page(tmp_path / "page.md")


# Words that name no actor. `who` stands only behind the person it means: a process is named by its role.
NO_ACTOR = re.compile(
    r"\b(nobody|somebody|everybody|anybody|whoever|whom|(?<!user )(?<!users )who)\b", re.IGNORECASE
)

HISTORIES = {"LOG.md", "decisions.md"}  # what was written then stays
PROMPTS = {"Who leads?"}  # for the target, not for users


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of a module that a user may see, by their lines: all but the docstrings."""
    tree = ast.parse(path.read_text())
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.lineno, node.value


def test_messages_name_the_actor() -> None:
    """A producer, the consumer, a reader, the server or the user did it; `nobody` helps no reader."""
    nameless = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted((ROOT / "src" / "paceline").rglob("*.py"))
        if "testing" not in path.parts
        for line, text in messages(path)
        if NO_ACTOR.search(text) and text not in PROMPTS
    ]
    assert not nameless, "\n".join(nameless)


def test_pages_name_the_actor() -> None:
    """As messages do. Code between backquotes is quoted."""
    nameless = [
        f"{path.relative_to(ROOT)}:{line}: {found[0]}"
        for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
        if path.name not in HISTORIES
        for line, text in enumerate(path.read_text().splitlines(), 1)
        if (found := NO_ACTOR.search(re.sub("`[^`]*`", "", text)))
    ]
    assert not nameless, "\n".join(nameless)
