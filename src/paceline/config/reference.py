"""Writes docs/run-file.md from the sections themselves: their docstrings, types, limits and defaults."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from paceline.config.load import VARIANTS
from paceline.config.run import RunConfig
from paceline.section import Section

LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def run_file_tables() -> str:
    """A part for each section of a run file, in Markdown; for each variant of a section that has some."""
    parts: list[str] = []
    for name, field in RunConfig.model_fields.items():
        parts.append(f"## {name}\n")
        if name in VARIANTS:
            table, tag, default = VARIANTS[name]
            for variant in table.own:
                usual = ", the default" if variant == default else ""
                parts += _section(table.find(variant), f"{name}: {{{tag}: {variant}}}{usual}", name)
        else:
            assert isinstance(field.annotation, type)
            parts += _section(field.annotation, "", name)
    return "\n".join(parts)


def _section(section: type[Section], title: str, place: str) -> Iterator[str]:
    """Its text, its table, and the parts of the sections within it."""
    if title:
        yield f"### {title}\n"
    yield from _told(section)
    schema = section.model_json_schema()
    yield "| key | takes | default | |\n|---|---|---|---|"
    inner: dict[str, str] = {}
    for key, described in schema["properties"].items():
        for ref in re.findall(r'"#/\$defs/(\w+)"', json.dumps(described)):
            inner.setdefault(ref, f"{place}.{key}")
        free = "*" in section.changeable or key in section.changeable
        mark = "may change in a started run" if free else ""
        default = _default(section.model_fields[key])
        yield f"| `{key}` | {_takes(described, schema.get('$defs', {}))} | {default} | {mark} |"
    yield ""
    for ref, name in inner.items():
        for found in _subsections(section):
            if found.__name__ == ref:
                yield from _section(found, name, name)


def _subsections(section: type[Section]) -> set[type[Section]]:
    """The sections that its fields hold, alone or in a list."""
    left = [field.annotation for field in section.model_fields.values()]
    found: set[type[Section]] = set()
    while left:
        one: Any = left.pop()
        left += getattr(one, "__args__", ())
        if isinstance(one, type) and issubclass(one, Section):
            found.add(one)
    return found


def _told(section: type[Section]) -> Iterator[str]:
    """Its docstring, then those of the sections that it inherits keys from."""
    for one in section.__mro__:
        if issubclass(one, Section) and one is not Section and one.__doc__:
            yield inspect.cleandoc(one.__doc__) + "\n"
        if one is Section:
            return


def _takes(described: dict[str, Any], sections: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in described:
        target = sections[described["$ref"].rsplit("/", 1)[1]]
        return "a section" if "properties" in target else _takes(target, sections)
    if "anyOf" in described:
        return " or ".join(dict.fromkeys(_takes(one, sections) for one in described["anyOf"]))
    if "enum" in described:
        return ", ".join(f"`{value}`" for value in described["enum"])
    if "const" in described:
        return f"`{described['const']}`"
    kind = described.get("type", "any")
    if kind == "array":
        inner: Any = described.get("items") or next(iter(described.get("prefixItems", [])), {})
        return f"list: {_takes(inner, sections)}"
    if kind == "string" and described.get("format") == "path":
        return "path"
    names = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false"}
    limits = [f"{sign} {described[key]}" for key, sign in LIMITS.items() if key in described]
    return " ".join(
        [names.get(kind, "mapping" if kind == "object" else "nothing" if kind == "null" else kind), *limits]
    )


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, Section):
        return ""
    if value is None:
        return "none"
    return f"`{json.dumps(to_jsonable_python(value), ensure_ascii=False)}`"
