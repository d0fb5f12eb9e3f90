"""Writes docs/errors.md from the tree in errors.py and from every text in the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import paceline
from paceline import errors
from paceline.errors import PacelineError

SOURCES = Path(paceline.__file__).parent
PARTS = ("what", "why", "next")


@dataclass(frozen=True)
class ErrorText:
    """The text of one place that makes an error, with … for what is known only then, by its parts."""

    kind: str
    module: str
    line: int
    parts: Mapping[str, str]


def kinds(of: type[PacelineError] = PacelineError) -> Iterator[type[PacelineError]]:
    """The tree, each class before those that derive from it."""
    for kind in of.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield kind
            yield from kinds(kind)


def texts() -> list[ErrorText]:
    """Of every place that makes an error of the tree, by module and line."""
    names = {PacelineError.__name__, *(kind.__name__ for kind in kinds())}
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        module = ".".join(path.relative_to(SOURCES).with_suffix("").parts)
        if module.startswith("testing."):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _called(node) in names and node.args:
                given = {"what": node.args[0], **{key.arg or "": key.value for key in node.keywords}}
                parts = {name: _text(given[name]) for name in PARTS if name in given}
                found.append(ErrorText(_called(node), module, node.lineno, parts))
    return found


def error_tables() -> str:
    """The tree with its exit codes, and every text under its class, in Markdown."""
    by_kind: dict[str, list[ErrorText]] = {}
    for text in texts():
        by_kind.setdefault(text.kind, []).append(text)
    rows = [_row(kind) for kind in kinds()]
    parts = ["## The tree\n", "| error | exit code | meaning |\n|---|---|---|", *rows, ""]
    every: list[type[PacelineError]] = [PacelineError, *kinds()]
    for kind in every:
        known = sorted({_entry(text) for text in by_kind.get(kind.__name__, ())} - {""})
        if known:
            parts += [f"## {kind.__name__}\n", f"{_meaning(kind)} Exit code {kind.exit_code}.\n", *known, ""]
    return "\n".join(parts)


def _row(kind: type[PacelineError]) -> str:
    depth = len([base for base in kind.__mro__ if issubclass(base, PacelineError)]) - 2
    others = [base.__name__ for base in kind.__bases__ if not issubclass(base, PacelineError)]
    also = f" Also a `{others[0]}` of Python." if others else ""
    return f"| {'— ' * depth}`{kind.__name__}` | {kind.exit_code} | {_meaning(kind)}{also} |"


def _meaning(kind: type[PacelineError]) -> str:
    return (kind.__doc__ or "").partition("\n")[0]


def _entry(text: ErrorText) -> str:
    """One text as an item of a list; "" if nothing of it is known before it happens."""
    told = {name: _escaped(part) for name, part in text.parts.items() if part.strip("… .")}
    if "what" not in told:
        return ""
    lines = [f"- **{told['what']}**", *(f"  {told[name]}" for name in ("why",) if name in told)]
    return "\n".join([*lines, *(f"  *Next:* {told[name]}" for name in ("next",) if name in told)])


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _text(node: ast.expr) -> str:
    """The constant text of an expression, with … for the rest."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(map(_text, node.values)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return re.sub("…+", "…", _text(node.left) + _text(node.right))
    return "…"


def _escaped(text: str) -> str:
    """For Markdown: outside of `code` nothing is markup."""
    shown = " ".join(text.split()).split("`")
    plain = [re.sub(r"([\\*_<>\[\]#|])", r"\\\1", part) for part in shown]
    return "`".join(shown[number] if number % 2 else part for number, part in enumerate(plain))
