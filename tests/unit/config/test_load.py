"""Run files: a mistake is named, with what to write instead, and nothing is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from paceline.config.load import (
    flat,
    load_run_config,
    parse_run_config,
    recorded_config,
    refuse_changes,
)
from paceline.errors import ConfigError
from paceline.methods.table import METHODS

MINIMAL: dict[str, Any] = {
    "run": {"name": "r", "directory": "runs/r"},
    "target": {"model": "models/m"},
    "prompts": {"path": "p.jsonl"},
    "evaluation": {"prompts": "h.jsonl"},
}


def with_values(**sections: dict[str, Any]) -> dict[str, Any]:
    return {name: {**MINIMAL.get(name, {}), **sections.get(name, {})} for name in {**MINIMAL, **sections}}


def test_every_shipped_recipe_loads() -> None:
    """A recipe that does not load is a lie."""
    recipes = list((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        load_run_config(recipe)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"learning_rat": 1e-3}}, "did you mean 'learning_rate'"),
        ({"trainig": {"batch_size": 8}}, "did you mean 'training'"),
        ({"training": {"batch_size": 0}}, "training.batch_size.*greater than or equal to 1, given 0"),
        ({"training": {"batch_size": "many"}}, "training.batch_size.*given 'many'"),
        ({"training": {"batch_size": 2, "micro_batch_size": 4}}, "micro_batch_size must not exceed"),
        ({"method": {"name": "medusa"}}, r"method\.name: There is no draft method 'medusa'.*one of: eagle3"),
        ({"method": {"name": "eagel3"}}, "did you mean 'eagle3'"),
        ({"method": {"name": ["eagle3"]}}, r"method\.name: There is no draft method"),
        ({"method": {"name": "eagle3", "ttt_step": 2}}, "method.ttt_step.*did you mean 'ttt_steps'"),
        ({"method": {"first_samples": 0}}, "method.first_samples.*given 0"),
        ({"engine": {"name": "vlm"}}, r"engine\.name: There is no engine 'vlm'.*transformers"),
        ({"engine": {"devise": "cpu"}}, "engine.devise.*did you mean 'device'"),
        ({"features": {"store": "disk"}}, r"features\.store: There is no feature store 'disk'.*shm"),
        ({"training": {"device": "gpu"}}, "training.device.*cuda: and its number, given 'gpu'"),
        ({"run": {"name": "../up", "directory": "x"}}, "run.name"),
        ({"machine": {"producer_threads": 10**9}}, "producer_threads.*less than or equal to 4096"),
        ({"machine": {"zzz": 1}}, "known: producers, producer_timeout_s, trainers, trainer_timeout_s"),
    ],
)
def test_a_wrong_value_or_key_is_named(sections: dict[str, dict[str, Any]], message: str) -> None:
    """The message carries the key, the value and the nearest right one."""
    with pytest.raises(ConfigError, match=message):
        parse_run_config(with_values(**sections), source="run.yaml")


def test_a_missing_section_is_named() -> None:
    """What must be there and is not is said by name."""
    data = {name: section for name, section in MINIMAL.items() if name != "target"}
    with pytest.raises(ConfigError, match="'target' is missing"):
        parse_run_config(data, source="run.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", ""])
def test_a_file_that_is_no_run_file_is_refused(tmp_path: Path, text: str) -> None:
    """Broken YAML and other shapes get advice, not a traceback."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="Next:"):
        load_run_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run_config(tmp_path / "nowhere.yaml")


def test_a_changed_setting_is_refused_with_a_diff() -> None:
    """A resumed run keeps the settings that decide its weights."""
    recorded = flat(parse_run_config(MINIMAL, source="x"))
    changed = with_values(training={"learning_rate": 5e-4}, run={"seed": 3}, method={"transfer": "float8"})
    with pytest.raises(ConfigError) as caught:
        refuse_changes(recorded, parse_run_config(changed, source="x"))
    assert "training.learning_rate: 0.001 -> 0.0005" in str(caught.value)
    assert "run.seed: 0 -> 3" in str(caught.value)
    assert 'method.transfer: "exact" -> "float8"' in str(caught.value)


def test_settings_that_decide_no_bit_may_change() -> None:
    """Budget, recomputation, evaluation and checkpoint interval are free between two starts."""
    recorded = flat(parse_run_config(MINIMAL, source="x"))
    free = with_values(
        features={"budget_mib": 2048},
        method={"recompute": True},
        evaluation={"draft_tokens": 2},
        checkpoint={"interval_steps": 5},
    )
    refuse_changes(recorded, parse_run_config(free, source="x"))


def test_a_knob_that_is_younger_than_the_run_had_its_default() -> None:
    """A run of before goes on under a version with more knobs, unless one of those is set."""
    recorded = flat(parse_run_config(MINIMAL, source="x"))
    older = {key: value for key, value in recorded.items() if key not in ("engine.name", "training.beta2")}
    refuse_changes(older, parse_run_config(MINIMAL, source="x"))
    with pytest.raises(ConfigError, match=r"training\.beta2: 0\.95 -> 0\.5"):
        refuse_changes(older, parse_run_config(with_values(training={"beta2": 0.5}), source="x"))


def test_a_missing_engine_section_means_transformers() -> None:
    """Run files of before engines could be chosen load unchanged."""
    config = parse_run_config(MINIMAL, source="x")
    assert (config.engine.name, config.features.store, config.method.name) == (
        "transformers",
        "shm",
        "eagle3",
    )


def test_the_recorded_configuration_is_a_run_file(tmp_path: Path) -> None:
    """What the ledger recorded can be written out and loaded again."""
    config = parse_run_config(MINIMAL, source="x")
    text = recorded_config(flat(config), tmp_path)
    again = parse_run_config(yaml.safe_load(text), source="x")
    assert again.run.directory == tmp_path
    assert again.model_copy(update={"run": config.run}) == config
    with pytest.raises(ConfigError, match="no configuration"):
        recorded_config({}, tmp_path)


@pytest.mark.parametrize("name", METHODS.names())
def test_the_recorded_configuration_of_every_method_is_a_run_file(tmp_path: Path, name: str) -> None:
    """It names all settings, also those that belong to a choice that was not made."""
    config = parse_run_config({**MINIMAL, "method": {"name": name}}, source="test")
    again = parse_run_config(yaml.safe_load(recorded_config(flat(config), tmp_path)), source="recorded")
    assert again.method == config.method


DEEP = "[" * 5000
BOMB = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [*{p}, *{p}]\n"
    for p, c in zip("abcdefghijklmnopqrstuvw", "bcdefghijklmnopqrstuvwx", strict=True)
)
NAMED_BOMB = "x: &a [y, y]\nrun: {name: " + "[" * 12 + "*a" + ", *a]" * 12 + "}\n" + BOMB


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        BOMB,
        NAMED_BOMB,
        "a: &a [*a]",
        "a: " + "9" * 5000,
        "run: {name: a, name: b}",
        "a: 2001-13-45",
        "a: !!python/name:os.system",
        "[a",
        "\x00",
        "a: {[1]: 2}",
    ],
    ids=range(11),
)
def test_a_hostile_file_is_refused_at_once(tmp_path: Path, text: str) -> None:
    """Aliases that stand for billions of values, brackets without an end, numbers beyond any."""
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_run_config(tmp_path / "run.yaml")


def test_a_path_with_nul_is_named(tmp_path: Path) -> None:
    """No system call takes it, and the first one that is given it would fail with no word of where."""
    text = yaml.safe_dump(with_values(run={"directory": "a\0b"}))
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.directory contains NUL"):
        load_run_config(tmp_path / "run.yaml")


def test_a_number_of_very_many_digits_is_named_as_one(tmp_path: Path) -> None:
    """Python refuses to write it into a message."""
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(MINIMAL) + f"machine: {{restarts_max: -0x{'f' * 9000}}}\n"
    )
    with pytest.raises(ConfigError, match="restarts_max"):
        load_run_config(tmp_path / "run.yaml")


def test_a_project_may_move_with_its_prompts() -> None:
    """What they are is told by their digest, wherever they lie."""
    recorded = flat(parse_run_config(MINIMAL, source="run.yaml"))
    moved = with_values(prompts={"path": "elsewhere/p.jsonl"})
    refuse_changes(recorded, parse_run_config(moved, source="run.yaml"))


DATA = {name: section for name, section in MINIMAL.items() if name != "prompts"}


def test_the_section_prompts_is_a_data_section_with_one_file_of_prompts() -> None:
    """And a run that was started with it goes on with either."""
    old = parse_run_config(with_values(prompts={"rounds": 3, "temperature": 0.5}), source="x")
    source = {"path": "p.jsonl", "format": "prompts"}
    new = parse_run_config({**DATA, "data": {**source, "rounds": 3, "temperature": 0.5}}, source="x")
    assert old == new
    recorded = {
        key.replace("data.", "prompts."): value
        for key, value in flat(old).items()
        if key not in ("data.sources", "data.answers", "data.too_long")
    }
    refuse_changes({**recorded, "prompts.path": "p.jsonl"}, new)
    with pytest.raises(ConfigError, match=r"data\.rounds: 2 -> 3"):
        refuse_changes({**recorded, "prompts.rounds": 2}, new)
    again = yaml.safe_load(recorded_config({**recorded, "prompts.path": "p.jsonl"}, Path("runs/r")))
    assert parse_run_config(again, source="x") == new


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"prompts": {"path": "p", "round": 2}}, r"unknown key 'prompts.round' \(did you mean 'rounds'"),
        ({"prompts": {}}, "'prompts.path' is missing"),
        ({"prompts": {"path": "p"}, "data": {"path": "p"}}, "'prompts' and 'data' both say what to read"),
        ({"data": {"path": "p", "answer": "data"}}, "did you mean 'answers'"),
        ({"data": {"rounds": 2}}, "it names nothing to read"),
        ({"data": {"path": "p", "sources": [{"path": "q"}]}}, "give 'path' inside of 'sources'"),
        ({"data": {"sources": [{"path": "q", "wieght": 2}]}}, r"'data.sources.0.wieght' .*mean 'weight'"),
        ({"data": {"sources": [{"path": "q", "hub": "a/b"}]}}, "either a path or a hub name"),
        ({"data": {"path": "p", "weight": 0}}, "weight.*greater than 0"),
        ({"data": {"path": "p", "format": "xml"}}, "format.*given 'xml'"),
    ],
)
def test_a_mistake_in_what_is_read_is_named(sections: dict[str, Any], message: str) -> None:
    """By the names that the file uses."""
    with pytest.raises(ConfigError, match=message):
        parse_run_config({**DATA, **sections}, source="run.yaml")


def test_mistakes_of_all_sections_are_named_together() -> None:
    """Those of the section `prompts`, too."""
    with pytest.raises(ConfigError, match=r"2 problems: 'prompts\.path' is missing; .*batch_size"):
        parse_run_config({**DATA, "prompts": {}, "training": {"batch_size": 0}}, source="run.yaml")


def test_answers_may_come_from_another_run() -> None:
    """Then there is nothing else to read."""
    config = parse_run_config({**DATA, "data": {"answers": "runs/other"}}, source="x")
    assert config.data.other_run == Path("runs/other")
    assert (
        parse_run_config({**DATA, "data": {"path": "p", "answers": "data"}}, source="x").data.other_run
        is None
    )


def test_a_path_with_nul_is_named_wherever_it_stands(tmp_path: Path) -> None:
    """Deep in a list, too."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**DATA, "data": {"sources": [{"path": "a\0b"}]}}))
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.path contains NUL"):
        load_run_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_is_a_valid_run_file(recipe: Path) -> None:
    assert load_run_config(recipe).run.name == recipe.stem
