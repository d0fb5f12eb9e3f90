"""A run file that init writes passes the plan, whatever was wished; the shipped recipes are such files."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from paceline.cli.options import INIT_OPTIONS
from paceline.config.load import load_run_config, parse_run_config
from paceline.errors import ConfigError
from paceline.exports.drafted_methods import TAKEN, servers_of
from paceline.exports.table import EXPORTS
from paceline.methods.table import DEFAULT_METHOD, METHODS
from paceline.roles import cost_plan as cost_plans
from paceline.roles import starter
from paceline.roles.cost_plan import cost_plan
from paceline.roles.machine import Machine
from paceline.roles.starter import Given, start_run

ROOT = Path(__file__).parents[3]
TARGETS = ROOT / "tests" / "targets"
RECIPES = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "gpt-oss-20b": "openai/gpt-oss-20b",
}
INSTALLED = """
from typing import ClassVar, Literal
from paceline.engines.settings import EngineSection
from paceline.methods.features import fused_states
from paceline.methods.settings import MethodSection

class PlainSection(MethodSection):
    component: ClassVar[str] = "guesses:Guess"
    name: Literal["plain"] = "plain"

    def features(self, target):
        return fused_states((2,), target, "exact")

    def num_parameters(self, target):
        return 1

class GuessSection(PlainSection):
    name: Literal["guess"] = "guess"
    width: int = 5

    @classmethod
    def starting_values(cls, target, *, large):
        return [("width", target.hidden_size, "as wide as the target" if large else "")]

class OracleSection(EngineSection):
    component: ClassVar[str] = "guesses:Oracle"
    name: Literal["oracle"] = "oracle"
    shrine: str = ""

    @classmethod
    def starting_values(cls, run, gpus):
        return [("shrine", f"{run} on {gpus}", "")]
"""
PROMPTS, HELD_OUT = Path("prompts/train.jsonl"), Path("prompts/heldout.jsonl")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(starter, "this_machine", lambda: Machine(6, 0, (), bfloat16=True))


def given(folder: Path, **options: Any) -> Given:
    chosen = {"target": "Qwen/Qwen3-8B", "data": PROMPTS, "heldout": HELD_OUT, "gpus": 2}
    there = {"output": folder / "run.yaml", "target_config": TARGETS / "qwen3-8b"}
    return Given(**{**chosen, **there, **options})


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_are_what_init_writes(tmp_path: Path, name: str) -> None:
    """Made again: paceline init with the options in the recipe's head, and --target-config for the test's
    copy of the target's config.json. Each passes the plan without weights."""
    recipe = ROOT / "recipes" / f"{name}.yaml"
    written = given(
        tmp_path,
        target=RECIPES[name],
        serve="vllm",
        output=tmp_path / f"{name}.yaml",
        target_config=TARGETS / name,
    )
    start_run(written)
    text = written.output.read_text()
    made = shlex.join([str(written.output)])
    assert recipe.read_text() == text.replace(made, f"recipes/{name}.yaml")
    plan = cost_plan(load_run_config(recipe), gpu="H200", target_config=TARGETS / name)
    assert plan.fits, plan.findings
    assert plan.time.total_s is not None


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name", ["smollm2-cpu", "chat-cpu"])
def test_the_recipes_of_processors_fit_every_processor(
    name: str, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without bfloat16 keeps states in float32, and a sample takes twice the bytes."""
    monkeypatch.setattr(cost_plans, "this_machine", lambda: Machine(2, 0, (), bfloat16=bfloat16))
    config = load_run_config(ROOT / "recipes" / f"{name}.yaml")
    plan = cost_plan(config, target_config=TARGETS / "smollm2-135m")
    assert plan.target.dtype == ("bfloat16" if bfloat16 else "float32")
    assert plan.window.budget_bytes > plan.window.needed_bytes


@pytest.mark.parametrize("method", METHODS.own)
@pytest.mark.parametrize(("gpus", "serve"), [(0, "none"), (1, "vllm"), (2, "none"), (4, "sglang")])
def test_every_wish_gives_a_file_that_plans(tmp_path: Path, method: str, gpus: int, serve: str) -> None:
    started = start_run(given(tmp_path, method=method, gpus=gpus, serve=serve))
    config = load_run_config(tmp_path / "run.yaml")
    assert config == started.config
    assert config.engine.name == {"none": "transformers"}.get(serve, serve)
    plan = cost_plan(config, gpu="H200", target_config=TARGETS / "qwen3-8b")
    refused = [finding.what for finding in plan.findings if finding.refuses]
    assert not refused
    assert plan.window.budget_bytes > plan.window.needed_bytes


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's methods and engine."""
    (info := tmp_path / "beside" / "guesses-1.0.dist-info").mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guesses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[paceline.methods]\nguess = guesses:GuessSection\nplain = guesses:PlainSection\n"
        "[paceline.engines]\noracle = guesses:OracleSection\n"
    )
    (info.parent / "guesses.py").write_text(INSTALLED)
    monkeypatch.syspath_prepend(str(info.parent))
    monkeypatch.delitem(sys.modules, "guesses", raising=False)


@pytest.mark.parametrize(("method", "started_at"), [("guess", {"width": 4096}), ("plain", {})])
def test_an_installed_method_says_where_it_starts(
    tmp_path: Path, installed: None, method: str, started_at: dict[str, Any]
) -> None:
    """By default with its section's own values; servers are named only where an export takes its drafts."""
    start_run(given(tmp_path, method=method, serve="none"))
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written["method"] == {"name": method, "first_samples": 128, **started_at}
    assert "export" not in written


def test_an_installed_engine_runs_the_target(tmp_path: Path, installed: None) -> None:
    """And says with what it starts, as ours do."""
    config = start_run(given(tmp_path, serve="oracle", name="r")).config
    assert config.engine.model_dump(exclude_defaults=True) == {"shrine": "r on 2"}


def test_the_help_names_every_method_of_ours() -> None:
    """It is a fixed text, because the command line's help waits for no table."""
    *names, last = METHODS.own
    named = f"{', '.join(names)} or {last}.".replace(DEFAULT_METHOD, f"{DEFAULT_METHOD} (the default)")
    assert INIT_OPTIONS["method"][1] == named


def test_exports_are_those_that_take_the_method() -> None:
    """What is known before there is a draft is what the exports themselves take; each ends with one."""
    assert EXPORTS.own.keys() == TAKEN.keys()
    for name in EXPORTS.own:
        assert list(EXPORTS.find(name).layouts) == list(TAKEN[name])
    assert all(servers_of(method) for method in METHODS.own)


def test_small_and_short_targets_get_small_figures(tmp_path: Path) -> None:
    """Not more positions, layers or tokens than the target has, nor more first samples than the data."""
    (folder := tmp_path / "model").mkdir()
    sizes = {"hidden_size": 32, "num_hidden_layers": 8, "vocab_size": 61, "max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "question {n}"}}\n' for n in range(40)))
    config = start_run(
        given(tmp_path, target=str(folder), target_config=None, gpus=0, data=data, heldout=None)
    ).config
    assert config.data.max_prompt_tokens + config.data.max_answer_tokens < 128
    assert config.method.first_samples <= 38
    assert (config.machine.producer_threads, config.machine.consumer_threads) == (3, 3)
    assert config.data.sources[0].path == tmp_path / "model-eagle3.train.jsonl"
    assert cost_plan(config).fits


def test_nothing_that_exists_is_replaced_unless_told(tmp_path: Path) -> None:
    """Neither the run file nor the files of prompts; and what cannot be finished leaves nothing."""
    wish = given(tmp_path, heldout=None, name="mine")
    for name in ("run.yaml", "mine.train.jsonl", "mine.heldout.jsonl"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(ConfigError, match=f"{name} exists"):
            start_run(wish)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()
    (tmp_path / "run.yaml").write_text("old")
    start_run(given(tmp_path, overwrite=True))
    assert "precious" not in (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").unlink()
    with pytest.raises(ConfigError, match="is a folder"):
        start_run(given(tmp_path, output=tmp_path))
    broken = given(tmp_path, heldout=None, name="no name: at all")
    with pytest.raises(ConfigError, match=r"run\.name"):
        start_run(broken)
    assert list(tmp_path.iterdir()) == []


def test_of_two_at_once_one_writes_all_and_the_other_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data may take minutes to read; a file that appears meanwhile is somebody's, and stays."""
    output = tmp_path / "run.yaml"

    def meanwhile(*_: Any) -> int:
        output.write_text("theirs")
        return 1024

    monkeypatch.setattr(starter, "_budget_mib", meanwhile)
    with pytest.raises(ConfigError, match=f"{output} exists"):
        start_run(given(tmp_path, heldout=None))
    assert output.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [output]


def test_a_run_file_is_utf8_in_every_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read as UTF-8 whatever wrote it."""
    data = tmp_path / "räder.jsonl"
    data.write_text("".join(f'{{"prompt": "question {n}"}}\n' for n in range(40)))
    monkeypatch.setattr(Path, "write_text", _written_as_latin)
    start_run(given(tmp_path, data=data))
    assert load_run_config(tmp_path / "run.yaml").data.sources[0].path == data


def _written_as_latin(path: Path, text: str) -> None:
    path.write_bytes(text.encode("latin-1"))


def test_what_is_read_is_never_replaced(tmp_path: Path) -> None:
    """Not even with --overwrite, or by another name of the same file; and a failure leaves the old files."""
    data = tmp_path / "mine.train.jsonl"
    data.write_bytes(PROMPTS.read_bytes())
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "mine.heldout.jsonl").write_text("precious")
    for read in (data, tmp_path / "link"):
        with pytest.raises(ConfigError, match="would be read and replaced"):
            start_run(given(tmp_path, name="mine", data=read, heldout=None, overwrite=True))
    with pytest.raises(ConfigError, match="would be read and replaced"):
        start_run(given(tmp_path, data=data, output=data, overwrite=True))
    with pytest.raises(ConfigError):
        start_run(given(tmp_path, name="../mine", data=data, heldout=None, overwrite=True))
    assert data.read_bytes() == PROMPTS.read_bytes()
    assert (tmp_path / "mine.heldout.jsonl").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "link",
        "mine.heldout.jsonl",
        "mine.train.jsonl",
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "eagel3"}, "did you mean 'eagle3'"),
        ({"serve": "ollama"}, "--serve is 'ollama'"),
        ({"gpus": -1}, "--gpus is -1"),
        ({"name": "no name: at all"}, "The run file has 1 problem: run.name"),
        ({"data": Path("nowhere.jsonl")}, "nowhere.jsonl"),
        ({"heldout": Path("nowhere.jsonl")}, "nowhere.jsonl"),
        ({"target_config": Path("nowhere")}, "There is no model in nowhere"),
        ({"target": "org/none", "target_config": None}, "--target-config"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        start_run(given(tmp_path, **options))
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("odd", ["a: b # c", "{x}", "line\nbreak", "\u202eright", "*star", "ünï \udcff"])
def test_foreign_names_stay_what_they_are(tmp_path: Path, odd: str) -> None:
    """YAML's own signs, line breaks and marks in a path are quoted; in the head they are escaped."""
    (folder := tmp_path / odd).mkdir()
    data = folder / "data.jsonl"
    data.write_bytes(PROMPTS.read_bytes())
    written = start_run(given(tmp_path, data=data))
    config = load_run_config(tmp_path / "run.yaml")
    assert config == written.config
    assert config.data.sources[0].path == data
    head = (tmp_path / "run.yaml").read_text().splitlines()[:4]
    assert all(line.startswith("#") for line in head)


def test_a_run_file_is_checked_as_any_other(tmp_path: Path) -> None:
    start_run(given(tmp_path))
    text = (tmp_path / "run.yaml").read_text()
    assert parse_run_config(yaml.safe_load(text), source="run.yaml").run.name == "qwen3-8b-eagle3"
    assert max(map(len, text.splitlines()[4:])) <= 110
