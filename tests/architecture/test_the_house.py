"""Rules of the house that a reader relies on: every claim has its test, files stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.methods.eagle3.method import Eagle3Method
from paceline.target.facts import TargetFacts
from paceline.telemetry import EVENTS

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def claimed(document: str) -> list[str]:
    """Test names and paths in backticks or links of a document."""
    text = (ROOT / document).read_text()
    return sorted(set(re.findall(r"(?:tests/[\w/]+(?:\.py)?|src/paceline/[\w/]+\.py|\btest_\w+)", text)))


@pytest.mark.parametrize("document", ["docs/guarantees.md", "README.md"])
def test_every_claim_names_a_test_that_exists(document: str) -> None:
    """A guarantee whose test is gone must go too."""
    tests = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "src/paceline/testing").rglob("*_suite.py")]
    names = set(re.findall(r"def (test_\w+)", "\n".join(path.read_text() for path in tests)))
    names |= {path.stem for path in tests}
    for claim in claimed(document):
        assert (ROOT / claim).exists() if "/" in claim else claim in names, f"{document} names {claim}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_file_fits_in_one_head(path: Path) -> None:
    """No source file has more than 500 lines."""
    assert len(path.read_text().splitlines()) <= 500


def test_no_module_has_a_name_that_says_nothing() -> None:
    """A file is named after the one thing it holds."""
    banned = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "base", "core"}
    assert not banned & {path.stem for path in SOURCES}


PACKAGES = sorted(path.parent for path in (ROOT / "src/paceline").glob("*/__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_package_says_what_it_holds(package: Path) -> None:
    """Where it holds adapters, also where contract, names and adapters are."""
    told = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    assert told
    files = [name for name, _ in re.findall(r"\b(\w+(\.py|/))", told)]
    assert all((package / name).exists() for name in files)
    if (package / "table.py").exists():
        assert files[1] == "table.py"
        assert "dapter" in told


def test_the_ledgers_contract_names_every_adapter() -> None:
    """Who reads it learns of each store."""
    text = (ROOT / "src/paceline/ledger/ledger.py").read_text()
    stores = sorted(path.parent.name for path in (ROOT / "src/paceline/ledger/stores").glob("*/__init__.py"))
    [told] = re.findall(r"Adapters: (.*?)\. ", text)
    assert sorted(told.split(", ")) == [f"stores/{name}" for name in stores]


def test_only_methods_name_their_tensors() -> None:
    """A method declares its features; what captures, stores, sizes and loads them knows no name.

    In `data` the same words are keys of other people's files, in an engine's `wire` of a server's HTTP.
    """
    facts = TargetFacts(32, 8, 61, "float32", (2,), "model", "tokenizer")
    names = "|".join(feature.name for feature in Eagle3Method().features(facts))
    for path in SOURCES:
        inside = path.relative_to(ROOT / "src" / "paceline").parts[0]
        if inside not in ("methods", "testing", "data") and path.stem != "wire":
            assert not re.search(rf"[\"'](?:{names})[\"']", path.read_text()), path


def test_one_place_decides_what_auto_stands_for() -> None:
    """No component asks by itself whether there is a CUDA device: the run file says where it computes."""
    asking = [path.name for path in SOURCES if "is_available(" in path.read_text()]
    assert asking == ["precision.py"]


def test_every_path_of_the_guide_to_adding_exists() -> None:
    """Who adds a method, an engine, a store, a ledger or an export reads and edits what is there."""
    text = (ROOT / "docs" / "adding.md").read_text()
    named = set(re.findall(r"`((?:src|tests|docs)/[\w./-]+)`", text))
    assert len(named) > 15
    for path in sorted(named):
        assert (ROOT / path).exists(), path


def test_nothing_unpickles() -> None:
    """Files from a disk are data, never code."""
    loaders = r"\b(import|from) (pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\b"
    for path in SOURCES:
        assert not re.search(rf"{loaders}|torch\.load\(|trust_remote_code=True", path.read_text()), path


def test_only_the_command_line_prints() -> None:
    """Everything else reports events or raises."""
    for path in SOURCES:
        if "cli" not in path.parts and "testing" not in path.parts:
            assert not re.search(r"^\s*print\(", path.read_text(), re.MULTILINE), path


def told_events() -> set[str]:
    """The names in calls of `report("name", ...)`, `self._report(...)` and `events.write(...)`."""
    told = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())) if "testing" not in path.parts else ():
            if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
                continue
            called = ast.unparse(node.func)
            if called.removeprefix("self.").lstrip("_") == "report" or called == "events.write":
                told.add(node.args[0].value)
    return told


def test_every_event_is_in_the_list_that_documents_them() -> None:
    """And none is left there that nothing tells any more."""
    assert told_events() == set(EVENTS)


# CONTRIBUTING.md says why; the list may only become shorter.
MANY_PARAMETERS = {
    "build_disagg_online_consumer",
    "build_disagg_online_producer",
}
PARAMETERS_MAX = 8


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Of modules and classes; a constructor goes under the name of its class."""
    for path in SOURCES:
        for scope in ast.walk(ast.parse(path.read_text())):
            for node in scope.body if isinstance(scope, ast.Module | ast.ClassDef) else ():
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield getattr(scope, "name", node.name) if node.name == "__init__" else node.name, node


def test_no_function_has_more_parameters_than_a_reader_remembers() -> None:
    """At most 8; more belong into a value of their own."""
    found = set()
    for name, function in functions():
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        if len([argument for argument in named if argument.arg not in ("self", "cls")]) > PARAMETERS_MAX:
            found.add(name)
    assert found <= MANY_PARAMETERS
