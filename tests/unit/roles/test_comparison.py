"""What a variant changes, and what it cannot change; which results are another variant's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from paceline.config.load import load_run_config, parse_run_config
from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.roles.comparison import (
    VARIANTS_MAX,
    Comparison,
    Variant,
    foreign_parts,
    swept,
    variants_of_files,
)

RUN: dict[str, dict[str, Any]] = {
    "run": {"name": "r", "directory": "runs/r"},
    "target": {"model": "models/m"},
    "prompts": {"path": "p.jsonl"},
    "method": {"draft_vocab_size": 48, "first_samples": 8, "ttt_steps": 3, "dtype": "float32", "loss": "kl"},
    "training": {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01},
    "evaluation": {"prompts": "h.jsonl"},
}


@pytest.fixture
def config() -> RunConfig:
    return parse_run_config(RUN, source="run.yaml")


def written(folder: Path, name: str, sections: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(sections))
    return path


def configs(config: RunConfig, variants: list[Variant], **rest: Any) -> list[RunConfig]:
    comparison = Comparison(directory=Path("c"), variants=tuple(variants), **rest)
    return [comparison.config_of(config, number) for number in range(len(variants))]


def test_the_run_file_is_the_first_variant(config: RunConfig) -> None:
    variants = variants_of_files(config, Path("run.yaml"), [])
    assert [variant.name for variant in variants] == ["run"]
    assert configs(config, variants) == [config]


def test_every_shipped_variant_fits_its_run_file() -> None:
    folder = Path(__file__).parents[3] / "recipes" / "compare"
    run, *_ = found = sorted(folder.glob("*.yaml"), key=lambda path: path.stem != "run")
    config = load_run_config(run)
    variants = variants_of_files(config, run, found[1:])
    methods = {own.method.name for own in configs(config, variants)}
    assert methods == {"eagle3", "p-eagle", "dflash", "dspark", "domino", "dflash2"}


def test_a_variant_keeps_what_it_does_not_change(config: RunConfig, tmp_path: Path) -> None:
    path = written(tmp_path, "slow.yaml", {"training": {"learning_rate": 0.001}})
    [_, slow] = configs(config, variants_of_files(config, Path("run.yaml"), [path]))
    assert (slow.training.learning_rate, slow.training.batch_size) == (0.001, 4)
    assert slow.method == config.method


def test_a_size_in_tokens_replaces_one_in_samples(config: RunConfig, tmp_path: Path) -> None:
    sizes = {"tokens_per_step": 64, "micro_batch_tokens": 32}
    path = written(tmp_path, "packed.yaml", {"training": sizes})
    [_, packed] = configs(config, variants_of_files(config, Path("run.yaml"), [path]))
    assert {name: getattr(packed.training, name) for name in sizes} == sizes
    assert packed.training.learning_rate == 0.01


def test_another_method_keeps_the_settings_that_both_have(config: RunConfig, tmp_path: Path) -> None:
    """Its own settings, of which the run file knows nothing, have their defaults."""
    paths = [
        written(tmp_path, "p.yaml", {"method": {"name": "p-eagle"}}),
        written(tmp_path, "d.yaml", {"method": {"name": "dflash", "layers": 1}}),
    ]
    variants = variants_of_files(config, Path("run.yaml"), paths)
    assert variants[1].sections["method"] == {**RUN["method"], "loss": {"name": "kl"}, "name": "p-eagle"}
    [_, _, block] = configs(config, variants)
    assert (block.method.name, block.method.first_samples, block.method.dtype) == ("dflash", 8, "float32")
    assert "draft_vocab_size" not in variants[2].sections["method"]


def test_of_a_variants_run_file_only_method_and_training_are_used(config: RunConfig, tmp_path: Path) -> None:
    """Said in a note, where the other sections differ."""
    sections = {
        **RUN,
        "target": {"model": "models/other"},
        "training": {"batch_size": 2, "micro_batch_size": 1},
    }
    path = written(tmp_path, "whole.yaml", {**sections, "run": {**RUN["run"], "seed": 5}})
    [_, whole] = configs(config, variants_of_files(config, Path("run.yaml"), [path]))
    assert (whole.target, whole.run) == (config.target, config.run)
    assert (whole.training.batch_size, whole.training.learning_rate) == (2, 1e-3)
    [note] = foreign_parts(config, [path])
    assert note.endswith("differs in target, run.seed")
    assert foreign_parts(config, [written(tmp_path, "same.yaml", RUN)]) == []


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"data": {"rounds": 2}}, r"changes 'data'.*only method and training"),
        ({"methods": {"name": "dflash"}}, r"did you mean 'method'"),
        ({"method": "dflash"}, r"'method' holds no settings"),
        ({"method": {"name": "dflesh"}}, r"dflesh"),
    ],
)
def test_a_variant_of_anything_else_is_refused(
    config: RunConfig, tmp_path: Path, sections: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        variants_of_files(config, Path("run.yaml"), [written(tmp_path, "v.yaml", sections)])


def test_two_variants_of_one_name_are_refused(config: RunConfig, tmp_path: Path) -> None:
    path = written(tmp_path, "run.yaml", {"training": {"passes": 2}})
    with pytest.raises(ConfigError, match="Two variants are called 'run'"):
        variants_of_files(config, Path("run.yaml"), [path])


def test_a_wrong_setting_names_its_variant(config: RunConfig, tmp_path: Path) -> None:
    path = written(tmp_path, "v.yaml", {"training": {"learning_rat": 1}})
    with pytest.raises(ConfigError, match=r"the variant v has 1 problem.*did you mean 'learning_rate'"):
        configs(config, variants_of_files(config, Path("run.yaml"), [path]))


def test_a_sweep_is_the_product_of_its_values(config: RunConfig) -> None:
    losses = "method.loss=kl,{name: lk_lambda, eta: 2}"
    variants = swept(config, ["training.learning_rate=1e-3,3e-4", losses])
    assert [variant.name for variant in variants][:2] == [
        "learning_rate=1e-3 loss=kl",
        'learning_rate=1e-3 loss={"name": "lk_lambda", "eta": 2}',
    ]
    found = configs(config, variants)
    assert [(one.training.learning_rate, one.method.model_dump()["loss"]["name"]) for one in found] == [
        (1e-3, "kl"),
        (1e-3, "lk_lambda"),
        (3e-4, "kl"),
        (3e-4, "lk_lambda"),
    ]


def test_a_sweep_reaches_settings_within_a_setting(config: RunConfig) -> None:
    """Beside what the run file says there, and whatever order a method's name is given in."""
    [muon] = configs(
        config, swept(config, ["training.optimizer.momentum=0.8", "training.optimizer.name=muon"])
    )
    assert (muon.training.optimizer.name, muon.training.optimizer.momentum) == ("muon", 0.8)
    [block] = configs(config, swept(config, ["method.block_size=4", "method.name=dflash"]))
    assert block.method.model_dump()["block_size"] == 4


@pytest.mark.parametrize(
    "text", ["training.passes", "passes=1", "run.seed=1,2", "training.passes=", "method.x=["]
)
def test_what_is_no_sweep_is_refused(config: RunConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=r"--set .* is not SECTION\.KEY"):
        swept(config, [text])


def test_a_budget_is_one_of_two_and_variants_are_not_without_number(config: RunConfig) -> None:
    one = {"name": "v", "sections": {}}
    with pytest.raises(ConfigError, match="choose one"):
        Comparison.parse({"directory": "c", "variants": [one], "tokens": 1, "minutes": 1})
    with pytest.raises(ConfigError, match="variants"):
        Comparison.parse({"directory": "c", "variants": [one] * (VARIANTS_MAX + 1)})


def test_what_decides_a_result_names_its_folder(config: RunConfig) -> None:
    """A result is found again exactly when nothing that decides it has changed."""
    variants = [Variant(name="a", sections={"training": {"passes": 1}})]

    def folder(config: RunConfig, variant: Variant, features: str = "f", **budget: Any) -> Path:
        return Comparison(directory=Path("c"), variants=(variant,), **budget).folder_of(config, 0, features)

    first = folder(config, variants[0])
    assert folder(config, Variant(name="b", sections={"training": {"passes": 1}})) == first
    evaluation = config.evaluation.model_copy(update={"max_prompts": 3})
    others = [
        folder(config, Variant(name="a", sections={"training": {"passes": 2}})),
        folder(config, variants[0], "g"),
        folder(config, variants[0], tokens=5),
        folder(config, variants[0], minutes=5),
        folder(config, variants[0], prompts=5),
        folder(config.model_copy(update={"evaluation": evaluation}), variants[0]),
        folder(config.model_copy(update={"run": config.run.model_copy(update={"seed": 3})}), variants[0]),
    ]
    assert len({first, *others}) == 8


def test_a_result_is_another_where_the_draft_that_it_starts_from_has_changed(
    config: RunConfig, tmp_path: Path
) -> None:
    """Its path alone does not say which draft lies there."""
    variant = Variant(name="a", sections={"method": {"start_from": str(tmp_path)}})
    comparison, folders = Comparison(directory=Path("c"), variants=(variant,)), set()
    for content in ("one", "other"):
        (tmp_path / "config.json").write_text(content)
        folders.add(comparison.folder_of(config, 0, "f"))
    assert len(folders) == 2
