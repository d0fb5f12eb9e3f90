"""From a YAML file to a RunConfig, and from two of them to a readable diff.

Relative paths in the file are relative to the folder it is run from. A wrong key names the
nearest right one; a changed value of a resumed run names both values and the way out.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from paceline.config.run import CHANGEABLE, RunConfig
from paceline.errors import ConfigError
from paceline.regular_files import read_regular

FILE_BYTES_MAX = 1 << 20
VALUES_MAX = 10_000


def load_run_config(path: Path) -> RunConfig:
    """Raises ConfigError naming the file, the key and what to write instead."""
    try:
        text = read_regular(path, FILE_BYTES_MAX).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"The run file {path} cannot be read ({why}).", next="paceline train recipes/smollm2-cpu.yaml"
        ) from error
    try:
        _refuse_hostile(yaml.compose(text, yaml.SafeLoader))
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(
            f"{path} is not a valid run file: {what}", next=f"mend {path} and run it again."
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no sections.", next="start from a copy of recipes/smollm2-cpu.yaml.")
    return parse_run_config(data, source=str(path))


def _refuse_hostile(root: yaml.Node | None) -> None:
    """A few aliases of aliases stand for billions of values. Raises yaml.YAMLError, RecursionError."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = VALUES_MAX  # of one that holds itself
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
        return sizes[id(node)]

    if root is not None and size(root) > VALUES_MAX:
        raise yaml.YAMLError(f"it has more than {VALUES_MAX} values, those behind aliases counted.")


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in keys.items() if count > 1 and key != "<<"]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} is given twice.")
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def parse_run_config(data: Mapping[str, Any], *, source: str) -> RunConfig:
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        problems = [_advice(problem) for problem in error.errors()]
        raise ConfigError(
            f"{source} has {len(problems)} problem{'s' * (len(problems) > 1)}: " + "; ".join(problems) + ".",
            why="Nothing was started and nothing was changed.",
            next=f"mend {source} and run the same command again.",
        ) from error


def _advice(problem: Any) -> str:
    where = [str(part) for part in problem["loc"]]
    name = ".".join(where)
    if problem["type"] == "extra_forbidden":
        known = _keys_at(where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        right = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {name!r} ({right})"
    if problem["type"] == "missing":
        return f"{name!r} is missing"
    given = f", given {_shown(problem['input'])}" if not isinstance(problem["input"], dict) else ""
    return f"{name or 'the file'}: {problem['msg']}{given}"


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # more digits than Python writes
        return "a number of very many digits"


def _keys_at(where: list[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in where:
        inner = model.model_fields[part].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, BaseModel)
        model = inner
    return list(model.model_fields)


def flat(config: RunConfig) -> dict[str, Any]:
    """{"training.batch_size": 8, ...}, JSON values."""
    return dict(_leaves(config.model_dump(mode="json"), ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def refuse_changes(recorded: Mapping[str, Any], config: RunConfig) -> None:
    """Raise ConfigError with a diff if the run was started under other values that matter.

    `recorded` is `flat(config)` of the run's first start.
    """
    now = flat(config)
    changed = [
        key
        for key in sorted({*recorded, *now})
        if recorded.get(key) != now.get(key) and not _is_changeable(key)
    ]
    if not changed:
        return
    lines = [f"  {key}: {json.dumps(recorded.get(key))} -> {json.dumps(now.get(key))}" for key in changed]
    raise ConfigError(
        f"Run {config.run.name!r} in {config.run.directory} was started with other settings:\n"
        + "\n".join(lines)
        + "\n",
        why="Going on would make weights that no single run file describes. The run is untouched.",
        next="put the old values back, or set a new run.name and run.directory.",
    )


def _is_changeable(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)


def recorded_config(recorded: Mapping[str, Any], directory: Path) -> str:
    """The YAML of a run from what its ledger recorded. Raises ConfigError if it recorded nothing."""
    if not recorded or "run.name" not in recorded:
        raise ConfigError(
            f"The run in {directory} has recorded no configuration.",
            next="name its run file instead: paceline evaluate RUN.yaml",
        )
    tree: dict[str, dict[str, Any]] = {}
    for key, value in recorded.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    tree["run"]["directory"] = str(directory)
    return yaml.safe_dump(tree, sort_keys=False)
