"""Loads a run file as a RunConfig, and refuses changed settings of a started run with a diff.

Relative paths in the file are relative to the working directory. The error for an unknown key suggests the
nearest known key; the error for changed settings shows both values and what to do.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, create_model

from paceline.config.run import RunConfig
from paceline.data.settings import PromptsSection
from paceline.engines.table import ENGINES
from paceline.errors import ConfigError
from paceline.features.table import STORES
from paceline.ledger.table import LEDGERS
from paceline.methods.table import DEFAULT_METHOD, METHODS
from paceline.regular_files import read_regular
from paceline.section import Section, problems, without_secrets

FILE_BYTES_MAX = 1 << 20
VALUES_MAX = 10_000


def load_run_config(path: Path) -> RunConfig:
    """Raises ConfigError naming the file, the key and what to write instead."""
    return parse_run_config(read_sections(path), source=str(path))


def read_sections(path: Path) -> dict[str, Any]:
    """The sections of a run file, or of a part of one, as they stand there. Raises ConfigError."""
    try:
        text = read_regular(path, FILE_BYTES_MAX).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"The run file {path} cannot be read ({why}).",
            next="give the run file itself, such as recipes/smollm2-cpu.yaml.",
        ) from error
    try:
        _refuse_hostile(yaml.compose(text, yaml.SafeLoader))
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else without_secrets(str(error))
        raise ConfigError(
            f"{path} is not a valid run file: {what}", next=f"mend {path} and run it again."
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no sections.", next="start from a copy of recipes/smollm2-cpu.yaml.")
    for key, value in _texts(data, ""):
        if "\0" in value:
            raise ConfigError(
                f"{path}: {key} contains NUL, which no path or name may.",
                next=f"mend {path} and run it again.",
            )
    return data


def given_sections(config: RunConfig) -> dict[str, Any]:
    """What the run file says, without the defaults of what it does not say, as JSON values."""
    return config.model_dump(mode="json", exclude_unset=True)


def _texts(value: object, name: str) -> Iterator[tuple[str, str]]:
    """Every text of the file, with the name of its key."""
    if isinstance(value, str):
        yield name, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _texts(part, f"{name}.{key}" if name else str(key))


def _refuse_hostile(root: yaml.Node | None) -> None:
    """Refuse nested aliases that stand for billions of values. Raises yaml.YAMLError, RecursionError."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = VALUES_MAX  # in case it contains itself
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
        return sizes[id(node)]

    if root is not None and size(root) > VALUES_MAX:
        raise yaml.YAMLError(f"it has more than {VALUES_MAX} values, counting those behind aliases.")


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in keys.items() if count > 1 and key != "<<"]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} is given twice.")
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


# Sections with variants: the table of variants, the key that selects one, and the default.
VARIANTS = {
    "engine": (ENGINES, "name", "transformers"),
    "features": (STORES, "store", "shm"),
    "ledger": (LEDGERS, "store", "sqlite"),
    "method": (METHODS, "name", DEFAULT_METHOD),
}


def parse_run_config(data: Mapping[str, Any], *, source: str) -> RunConfig:
    model = _model_of(tuple(_chosen(data, section) for section in VARIANTS))
    data, told = _prompts_as_data(data)
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        told += problems(error, model)
    if told:
        raise ConfigError(
            f"{source} has {len(told)} problem{'s' * (len(told) > 1)}: " + "; ".join(told) + ".",
            why="Nothing was started and nothing was changed.",
            next=f"mend {source} and run the same command again.",
        )
    return config


def _prompts_as_data(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The run file with its section `prompts`, if it has one, as the section `data`; and its mistakes."""
    if "prompts" not in given:
        return given, []
    rest = {name: values for name, values in given.items() if name != "prompts"}
    if "data" in given:
        return rest, ["'prompts' and 'data' both say what to read: keep 'data'"]
    try:
        section = PromptsSection.model_validate(given["prompts"])
    except ValidationError as error:
        readable = {"sources": [{"path": "."}]}  # so that the mistakes of the other sections are found, too
        return {**rest, "data": readable}, problems(error, PromptsSection, "prompts")
    return {**rest, "data": section.as_data()}, []


def _chosen(data: Mapping[str, Any], section: str) -> type[Section]:
    """The variant of a section that the file selects. Raises ConfigError for an unknown name."""
    table, tag, default = VARIANTS[section]
    given = data.get(section)
    name = given.get(tag, default) if isinstance(given, Mapping) else default
    try:
        found: type[Section] = table.find(name if isinstance(name, str) else reprlib.repr(name))
    except ConfigError as error:
        raise ConfigError(f"{section}.{tag}: {error.what}", why=error.why, next=error.next) from error
    return found


@lru_cache
def _model_of(chosen: tuple[type[Section], ...]) -> type[RunConfig]:
    fields: dict[str, Any] = {
        name: (section, Field(default_factory=section))
        for name, section in zip(VARIANTS, chosen, strict=True)
    }
    return create_model("RunConfig", __base__=RunConfig, **fields)


def flat(config: RunConfig) -> dict[str, Any]:
    """{"training.batch_size": 8, ...}, JSON values."""
    return _knobs(config.model_dump(mode="json"))


def _knobs(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}.{key}": value for name, values in sections.items() for key, value in values.items()}


def setting(recorded: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A recorded setting by its key."""
    return _named(recorded).get(key, default)


def _named(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings, with those of a section `prompts` under the names of the section `data`."""
    old = {key: value for key, value in recorded.items() if key.startswith("prompts.")}
    named = {key: value for key, value in recorded.items() if key not in old}
    for key, value in old.items():
        name = key.removeprefix("prompts.")
        is_path = name == "path"
        named["data.sources" if is_path else f"data.{name}"] = (
            [{"path": value, "format": "prompts"}] if is_path else value
        )
    return named


def refuse_changes(recorded: Mapping[str, Any], config: RunConfig) -> None:
    """Raise ConfigError with a diff if settings changed that may not change in a started run.

    `recorded` is `flat(config)` of the run's first start.
    """
    # A knob that is newer than the run had its default value.
    now, recorded = flat(config), {**_defaults(config), **_named(recorded)}
    changed = [
        key
        for key in sorted(recorded.keys() | now.keys())
        if recorded.get(key) != now.get(key) and not _is_changeable(key, config)
    ]
    if not changed:
        return
    lines = [f"  {key}: {json.dumps(recorded.get(key))} -> {json.dumps(now.get(key))}" for key in changed]
    raise ConfigError(
        f"Run {config.run.name!r} in {config.run.directory} was started with other settings:\n"
        + "\n".join(lines)
        + "\n",
        why="No single run file would describe the weights. The run is untouched.",
        next="put the old values back, or set a new run.name and run.directory.",
    )


def binding(config: RunConfig) -> dict[str, Any]:
    """The settings that may decide the weights, as `flat` gives them."""
    return {key: value for key, value in flat(config).items() if not _is_changeable(key, config)}


def _defaults(config: RunConfig) -> dict[str, Any]:
    """The default of every knob that has one."""
    sections = {name: type(section).model_construct().model_dump(mode="json") for name, section in config}
    return _knobs(sections)


def _is_changeable(key: str, config: RunConfig) -> bool:
    section, _, knob = key.partition(".")
    changeable: tuple[str, ...] = getattr(getattr(config, section, None), "changeable", ())
    return "*" in changeable or knob in changeable


def recorded_config(recorded: Mapping[str, Any], directory: Path) -> str:
    """The run file, as YAML, from the settings in the ledger. Raises ConfigError if it has none."""
    if not recorded or "run.name" not in recorded:
        raise ConfigError(
            f"The run in {directory} has recorded no configuration.",
            next="name its run file instead: paceline evaluate RUN.yaml",
        )
    tree: dict[str, dict[str, Any]] = {}
    for key, value in _named(recorded).items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    tree["run"]["directory"] = str(directory)
    return yaml.safe_dump(tree, sort_keys=False)
