"""Writes docs/cli.md from the commands themselves: their help, arguments and options."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer.main

from paceline.cli.main import app

WORDS = {Path: "PATH", int: "N", float: "NUMBER"}


def command_tables() -> str:
    """A part for each verb, in the order of `paceline --help`, in Markdown."""
    return "\n".join(_group(typer.main.get_command(app), "paceline"))


def _group(command: Any, name: str) -> Iterator[str]:
    for verb, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from _group(inner, f"{name} {verb}")
        else:
            yield from _command(inner, f"{name} {verb}")


def _command(command: Any, name: str) -> Iterator[str]:
    parameters = [one for one in command.params if one.name != "help"]
    given = [one for one in parameters if one.param_type_name == "argument"]
    words = [f"[{_bare(one)}]" if not one.required else _bare(one) for one in given]
    yield f"## {name}\n"
    yield f"```\n{' '.join([name, *words])}{' [OPTIONS]' * (len(given) < len(parameters))}\n```\n"
    yield f"{_paragraphs(command.help)}\n"
    if parameters:
        yield "| | | default |\n|---|---|---|"
        for one in parameters:
            yield f"| `{_name(one)}` | {_cell(one.help)} | {_default(one)} |"
        yield ""


def _bare(argument: Any) -> str:
    return f"{argument.metavar.strip('[]')}{' ...' * (argument.nargs == -1)}"


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _bare(parameter)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {parameter.metavar or _kind(parameter)}"


def _kind(parameter: Any) -> str:
    """What an option takes, in a word."""
    kind = parameter.type_descriptor.annotation
    kind = next(iter(get_args(kind)), kind)
    return WORDS.get(kind, "TEXT")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value in (None, False, []) or callable(value) else f"`{value}`"


def _paragraphs(text: str) -> str:
    """Help as Markdown; what is written like {name: NAME} is code."""
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")
