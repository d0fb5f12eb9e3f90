"""A comparison: variants of one run's method and training, over the same features. No torch.

A variant says what it changes; everything else is the run file's. The features lie in the comparison's
folder, and so does what each variant gave, under a digest of all that decided it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from paceline.config.load import given_sections, parse_run_config, read_sections
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.methods.table import DEFAULT_METHOD, METHODS
from paceline.section import Count, Section, nearest
from paceline.target.version import files_version

VARIED = ("method", "training")  # sections
SIZES = ({"tokens_per_step", "batch_size"}, {"micro_batch_tokens", "micro_batch_size"})
PREPARED, RESULT, TRAINED = "features.json", "result.json", "training.json"
VARIANTS_MAX = 256


class Variant(Section):
    """`sections`: method and training, as a run file would give them."""

    name: str
    sections: dict[str, dict[str, Any]]


class Comparison(Section):
    """What `paceline compare` and `paceline sweep` ask for beside the run file.

    `prompts`: the first so many of the run's data, each answered in every round; None: all. `tokens` or
    `minutes` bound the training of each variant; without either it is as long as a run's.
    """

    directory: Path
    variants: Annotated[tuple[Variant, ...], Field(min_length=1, max_length=VARIANTS_MAX)]
    prompts: Count | None = None
    tokens: Count | None = None
    minutes: Annotated[float, Field(gt=0.0)] | None = None

    @model_validator(mode="after")
    def _one_budget(self) -> Comparison:
        if self.tokens is not None and self.minutes is not None:
            raise ValueError("tokens and minutes both end the training: choose one")
        return self

    def config_of(self, config: RunConfig, number: int) -> RunConfig:
        """The run file with the variant's sections. Raises ConfigError for settings that do not fit."""
        variant = self.variants[number]
        given = {**given_sections(config), **variant.sections}
        parsed = parse_run_config(given, source=f"the variant {variant.name}")
        return parsed.model_copy(update={"target": config.target})

    def folder_of(self, config: RunConfig, number: int, features: str) -> Path:
        """Where the variant's draft and figures lie; `features`: the name of their folder.

        Another setting, target, sample or version of Paceline gives another folder.
        """
        own = self.config_of(config, number)
        decides = {
            "version": version("paceline"),
            "features": features,
            "method": own.method.model_dump(mode="json"),
            "starts": [files_version(folder) for folder in own.method.folders],
            "training": own.training.model_dump(mode="json"),
            "evaluation": own.evaluation.model_dump(mode="json"),
            "seed": own.run.seed,
            "threads": own.machine.consumer_threads,
            "budget": [self.prompts, self.tokens, self.minutes],
        }
        return self.directory / "variants" / digest_of(decides)


def digest_of(value: Any) -> str:
    """Of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def prepared(directory: Path) -> dict[str, Any]:
    """What the capture wrote down last: the name of the features' folder, and how much lies in it."""
    found: dict[str, Any] = json.loads((directory / PREPARED).read_bytes())
    return found


# -- variants ----------------------------------------------------------------------------------


def variants_of_files(config: RunConfig, run_file: Path, paths: Sequence[Path]) -> list[Variant]:
    """The run file itself, then each file: overrides of method and training, or a run file of its own.

    Raises ConfigError for a file that is neither, and for two of one name.
    """
    given = given_sections(config)
    found = [Variant(name=run_file.stem, sections=_varied(given))]
    for path in paths:
        data = read_sections(path)
        if "run" in data:
            data = given_sections(parse_run_config(data, source=str(path)))
            found.append(Variant(name=path.stem, sections=_varied(data)))
        else:
            found.append(Variant(name=path.stem, sections=overridden(given, data, source=str(path))))
    names = [variant.name for variant in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(
            f"Two variants are called {twice[0]!r}.",
            why="A variant is named after its file, and the run file itself is the first.",
            next="rename one of the files.",
        )
    return found


def foreign_parts(config: RunConfig, paths: Sequence[Path]) -> list[str]:
    """Sections of the variants' run files that differ from the run file's and are not used, in words."""
    notes = []
    for path in paths:
        data = read_sections(path)
        if "run" not in data:
            continue
        other = parse_run_config(data, source=str(path))
        kept = ("target", "data", "engine", "capture", "evaluation", "machine")
        differ = [name for name in kept if getattr(other, name) != getattr(config, name)]
        if other.run.seed != config.run.seed:
            differ.append("run.seed")
        if differ:
            notes.append(f"of {path} only method and training are used; it differs in {', '.join(differ)}")
    return notes


def swept(config: RunConfig, settings: Sequence[str]) -> list[Variant]:
    """One variant for each combination of values; a setting is `KEY=VALUE,VALUE,...` with YAML values.

    Raises ConfigError for a key that no variant may change, or without a value.
    """
    axes = [_axis(text) for text in settings]
    given, found = given_sections(config), []
    for values in itertools.product(*[[(key, value) for value in values] for key, values in axes]):
        sections = dict(_varied(given))
        # A method's name decides which other settings there are.
        for key, value in sorted(values, key=lambda pair: pair[0] != "method.name"):
            sections = overridden(sections, _nested(key, value, sections), source=f"--set {key}")
        name = " ".join(f"{key.partition('.')[2]}={_short(value)}" for key, value in values)
        found.append(Variant(name=name, sections=sections))
    return found


def overridden(given: Mapping[str, Any], changes: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The sections `method` and `training` of `given` with `changes`.

    Where a method of another name is chosen, the settings that it shares with the run file's stay. A size in
    tokens replaces that in samples, and the other way round. Raises ConfigError for another section.
    """
    for name, values in changes.items():
        if name not in VARIED:
            raise ConfigError(
                f"{source} changes {name!r}, and a variant changes only {' and '.join(VARIED)} "
                f"({nearest(str(name), list(VARIED))}).",
                why="Variants are compared over the same target, samples and held-out prompts.",
                next="compare runs of different data by `paceline train` and `paceline evaluate`.",
            )
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {name!r} holds no settings.", next=f"write {name}: {{KEY: VALUE}}")
    sections = _varied(given)
    method, new = sections["method"], dict(changes.get("method", {}))
    before = method.get("name", DEFAULT_METHOD)
    if new.get("name", before) != before:
        known = METHODS.find(str(new["name"])).model_fields
        method = {key: value for key, value in method.items() if key in known and key != "name"}
    training, chosen = sections["training"], dict(changes.get("training", {}))
    for pair in SIZES:
        if chosen.keys() & pair:
            training = {key: value for key, value in training.items() if key not in pair}
    return {"method": {**method, **new}, "training": {**training, **chosen}}


def _varied(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: dict(given.get(name, {})) for name in VARIED}


def _axis(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    section, _, knob = key.partition(".")
    try:
        found = yaml.safe_load(f"[{values}]") if equals and knob else None
    except yaml.YAMLError:
        found = None
    if not found or section not in VARIED:
        raise ConfigError(
            f"--set {text} is not SECTION.KEY=VALUE,VALUE,...",
            why=f"A sweep varies settings of {' and '.join(VARIED)}.",
            next="for example: --set training.learning_rate=1e-3,3e-4 --set method.loss=kl,tv",
        )
    return key, list(found)


def _nested(key: str, value: Any, sections: Mapping[str, Any]) -> dict[str, Any]:
    """`value` at a dotted key, beside what the section has there."""
    section, first, *rest = key.split(".")
    if not rest:
        return {section: {first: value}}
    whole = deepcopy(sections[section].get(first, {}))
    inner = whole = whole if isinstance(whole, dict) else {"name": whole}
    for name in rest[:-1]:
        inner = inner.setdefault(name, {})
    inner[rest[-1]] = value
    return {section: {first: whole}}


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
