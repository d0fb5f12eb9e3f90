"""What a start says before it starts: notes a line each, refusals all at once."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.c_compiler import Missing
from paceline.config.load import load_run_config
from paceline.engines.vllm.settings import VllmSection
from paceline.errors import ConfigError
from paceline.methods.table import METHODS
from paceline.roles import preflight as module
from paceline.roles.cost_plan import cost_plan
from paceline.roles.machine import Gpu, Machine
from paceline.roles.plan import RunPlan, plan_run
from paceline.roles.preflight import (
    Finding,
    a_server_can_be_started,
    enough_files_can_be_open,
    exports_take_the_draft,
    kernels_can_be_compiled,
    preflight,
    servers_draft_for_the_target,
    states_on_their_way_find_room,
    the_features_find_room,
    the_method_knows_where_it_starts,
    the_server_gives_states_of_the_target,
)
from paceline.target.shape import read_shape
from paceline.testing.tiny_folder import make_tiny_folder
from paceline.testing.tiny_run import TinyRun


def plan_with(directory: Path, budget_mib: int, folder: Path) -> Any:
    features = SimpleNamespace(
        directory=directory, memory=directory, budget_mib=budget_mib, is_shared=False, in_directory=True
    )
    return SimpleNamespace(config=SimpleNamespace(features=features, feature_folder=folder))


def test_shared_memory_that_is_smaller_than_the_budget_is_told_before_the_start(tmp_path: Path) -> None:
    """It can never hold it, or is too full now. A budget that fits is no finding, a place that is not there
    refuses."""
    space = os.statvfs(tmp_path)
    total_mib, free_mib = (n * space.f_frsize >> 20 for n in (space.f_blocks, space.f_bavail))
    for budget_mib, refuses in ((total_mib + 1, True), (min(free_mib + 100, total_mib), False)):
        [finding] = the_features_find_room(plan_with(tmp_path, budget_mib, tmp_path / "f"))
        assert finding.refuses == refuses
        for advice in ("lower features.budget_mib", "--shm-size=", "set features.directory to a folder on"):
            assert advice in finding.next
    assert not list(the_features_find_room(plan_with(tmp_path, 1, tmp_path / "f")))
    shared = plan_with(tmp_path, total_mib + 1, tmp_path / "f")
    shared.config.features.is_shared = True
    [finding] = the_features_find_room(shared)
    assert finding.next.startswith("Free some, or lower features.budget_mib to")
    for is_shared in (False, True):
        missing = plan_with(tmp_path / "none", 1, tmp_path / "f")
        missing.config.features.is_shared = is_shared
        [finding] = the_features_find_room(missing)
        assert finding.refuses


def test_few_open_files_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first of them is missing."""
    for limit, count in ((64, 1), (4096, 0), (resource.RLIM_INFINITY, 0)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert len(list(enough_files_can_be_open(plan_with(Path(), 1, Path())))) == count


@pytest.mark.parametrize(
    ("method", "formats", "noted"),
    [
        ("domino", ["vllm", "sglang"], 1),
        ("eagle3", ["vllm"], 0),
        ("mine", ["vllm"], 0),
        ("domino", ["own"], 0),
    ],
)
def test_an_export_that_takes_no_such_draft_is_noted_before_training(
    method: str, formats: list[str], noted: int
) -> None:
    """Not after it. What other packages export or train is theirs to know."""
    config = SimpleNamespace(
        method=SimpleNamespace(name=method), export=SimpleNamespace(formats=tuple(formats))
    )
    plan: Any = SimpleNamespace(config=config)
    assert len(list(exports_take_the_draft(plan))) == noted


def test_every_refusal_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one a start; and notes do not refuse."""

    def check(_: RunPlan) -> Iterator[Finding]:
        yield Finding("a is odd.", "Look at a.")
        yield Finding("b is wrong.", "Mend b.", refuses=True)
        yield Finding("c is wrong.", "Mend c.", refuses=True)

    monkeypatch.setattr(module, "CHECKS", [check])
    with pytest.raises(ConfigError) as caught:
        preflight(plan_with(Path(), 1, Path()))
    assert caught.value.what == "b is wrong.\nc is wrong."
    monkeypatch.setattr(module, "CHECKS", [lambda plan: [next(check(plan))]])
    assert preflight(plan_with(Path(), 1, Path())) == ["note: a is odd. Look at a."]


def plan_of_vllm(model: Path, place: Path, budget_mib: int, **knobs: Any) -> Any:
    plan = plan_with(place, budget_mib, place / "f")
    config = plan.config
    config.engine = VllmSection.parse(knobs)
    config.target = SimpleNamespace(model=model)
    config.capture = SimpleNamespace(group_size=8, groups_in_flight=2)
    config.data = SimpleNamespace(max_prompt_tokens=100, max_answer_tokens=28)
    return plan


def test_a_program_that_is_not_there_refuses_the_run_before_it_starts(tmp_path: Path) -> None:
    """Only where the run is to start a server."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    missing = plan_of_vllm(tmp_path, tmp_path, 1, managed=True, program=["no-such-program"])
    [finding] = a_server_can_be_started(missing)
    assert finding.refuses
    assert not list(
        a_server_can_be_started(plan_of_vllm(tmp_path, tmp_path, 1, managed=True, program=["sh"]))
    )
    assert not list(a_server_can_be_started(plan_of_vllm(tmp_path, tmp_path, 1, url="http://127.0.0.1:1")))


def test_a_server_that_finds_no_compiler_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may bring its own."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    monkeypatch.setattr(module, "c_compiler", lambda: None)
    [finding] = a_server_can_be_started(plan_of_vllm(tmp_path, tmp_path, 1, managed=True, program=["sh"]))
    assert not finding.refuses
    assert "apt-get install gcc" in finding.next


@pytest.mark.parametrize(
    ("method", "device", "says"),
    [
        ({"name": "dflash"}, "auto", "On cuda:0 the method dflash trains with a kernel"),
        ({"name": "domino"}, "cuda:0", "the method domino trains with a kernel"),
        ({"name": "dflash", "attention": "tiles"}, "auto", ""),
        ({"name": "dflash"}, "cpu", ""),
        ({"name": "p-eagle"}, "auto", ""),
        ({"name": "eagle3"}, "auto", ""),
    ],
    ids=str,
)
def test_a_kernel_that_nothing_here_can_compile_is_refused_before_anything_is_captured(
    method: dict[str, Any], device: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where training compiles one. What was compiled earlier may still lie there: then it is a note."""
    section = METHODS.find(method["name"]).parse(method)
    training = SimpleNamespace(device=device)
    plan: Any = SimpleNamespace(config=SimpleNamespace(method=section, training=training))
    gpu = Machine(2, 1 << 30, (Gpu("NVIDIA L4", 24 << 30, 8.9),), bfloat16=True)
    monkeypatch.setattr(module, "this_machine", lambda: gpu)
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    monkeypatch.setattr(module, "missing_for_triton", lambda: Missing("There is no gcc.", "Install it."))
    for before in (False, True):
        monkeypatch.setattr(module, "has_compiled_before", lambda before=before: before)
        found = list(kernels_can_be_compiled(plan))
        assert [finding.refuses for finding in found] == [not before] * bool(says)
        for finding in found:
            assert finding.what.startswith("There is no gcc.")
            assert says in finding.what
            assert finding.next.startswith("Install it. Or set method.attention: tiles")
    monkeypatch.setattr(module, "missing_for_triton", lambda: None)
    assert not list(kernels_can_be_compiled(plan))


@pytest.mark.parametrize(("method", "device"), [("eagle3", "auto"), ("dflash", "cpu")])
def test_a_start_that_compiles_nothing_does_not_ask_the_driver_for_it(
    method: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that sleeps takes seconds to answer."""
    asked: list[str] = []
    monkeypatch.setattr(module, "this_machine", lambda: asked.append("driver"))
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    section, training = METHODS.find(method).parse({"name": method}), SimpleNamespace(device=device)
    plan: Any = SimpleNamespace(config=SimpleNamespace(method=section, training=training))
    assert not list(kernels_can_be_compiled(plan))
    assert not asked


def test_room_for_states_on_their_way_is_counted_beside_the_budget(tmp_path: Path) -> None:
    """16 requests of 128 tokens, with 8 states of 32 numbers each at most: 2 MiB."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    space = os.statvfs(tmp_path)
    free_mib = (space.f_bavail * space.f_frsize >> 20) + 4096
    assert not list(states_on_their_way_find_room(plan_of_vllm(tmp_path, tmp_path, 1, url="http://h:1")))
    [finding] = states_on_their_way_find_room(plan_of_vllm(tmp_path, tmp_path, free_mib, url="http://h:1"))
    assert "may need 3 MiB beside features.budget_mib" in finding.what
    assert not finding.refuses


def plan_of_class(folder: Path, name: str, **sections: Any) -> Any:
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "architectures": [name]}))
    export = SimpleNamespace(formats=sections.get("formats", ()))
    method = SimpleNamespace(name="eagle3", notes=sections.get("notes", []))
    engine = VllmSection.parse({"url": "http://127.0.0.1:1"})
    target = SimpleNamespace(model=folder)
    return SimpleNamespace(config=SimpleNamespace(export=export, method=method, engine=engine, target=target))


def test_a_server_that_refuses_the_target_is_noted_once_before_the_start(tmp_path: Path) -> None:
    """For the exports that end the run, and for the engine; neither refuses, other releases may differ."""
    plan = plan_of_class(tmp_path, "Gemma3ForCausalLM", formats=("vllm", "speculators", "sglang"))
    [export] = servers_draft_for_the_target(plan)
    [engine] = the_server_gives_states_of_the_target(plan)
    assert "vLLM 0.32 refuses this target with a draft (Gemma3ForCausalLM" in export.what
    assert "engine: {name: transformers}" in engine.next
    assert not export.refuses
    assert not engine.refuses
    plan.config.engine = SimpleNamespace(name="transformers")
    plan.config.export.formats = ()
    assert not list(servers_draft_for_the_target(plan))
    assert not list(the_server_gives_states_of_the_target(plan))
    plan = plan_of_class(tmp_path, "LlamaForCausalLM", formats=("vllm", "sglang"))
    assert not list(servers_draft_for_the_target(plan))
    assert not list(the_server_gives_states_of_the_target(plan))


def test_what_the_method_says_of_its_folders_is_noted(tmp_path: Path) -> None:
    """And refuses nothing."""
    plan = plan_of_class(tmp_path, "LlamaForCausalLM", notes=[("It names no target.", "See its card.")])
    assert list(the_method_knows_where_it_starts(plan)) == [Finding("It names no target.", "See its card.")]


def test_a_target_that_memory_cannot_hold_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan says the same, once: the sizes in its config are wrong, or the machine is too small."""
    run = TinyRun(tmp_path, make_tiny_folder(tmp_path / "model"))
    small = Machine(processors=2, memory_bytes=1 << 30, gpus=(), bfloat16=False)
    monkeypatch.setattr(module, "this_machine", lambda: small)
    assert not list(module.the_target_finds_memory(plan_run(load_run_config(run.run_file))))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    plan = plan_run(load_run_config(run.run_file))
    with pytest.raises(
        ConfigError, match=r"1000000000 layers and takes at least .* this machine has 1.0 GiB"
    ):
        preflight(plan)
    refused = [one.what for one in cost_plan(load_run_config(run.run_file)).findings if one.refuses]
    assert sum("memory" in what for what in refused) == 1


def test_a_target_of_another_family_that_fits_is_not_refused_for_its_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts in every second layer are counted in each; the files tell what there is."""
    folder = make_tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps({**config, **experts}))
    plan = plan_run(load_run_config(TinyRun(tmp_path, folder).run_file))
    shape = read_shape(folder)

    def refused(memory_bytes: int) -> bool:
        machine = Machine(processors=2, memory_bytes=memory_bytes, gpus=(), bfloat16=False)
        monkeypatch.setattr(module, "this_machine", lambda: machine)
        return bool(list(module.the_target_finds_memory(plan)))

    counted = 4 * shape.parameters
    assert counted > 2 * shape.weights_bytes
    assert not refused(shape.weights_bytes)
    assert refused(shape.weights_bytes - 1)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    assert not refused(counted // 3)
    assert refused(counted // 5)


def test_the_largest_gpu_says_whether_a_target_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's first one may be a small one for the screen, and CUDA's first one the fastest."""
    folder = make_tiny_folder(tmp_path / "model")
    run = TinyRun(tmp_path, folder, target={"model": str(folder), "dtype": "auto"})
    plan = plan_run(load_run_config(run.run_file))
    needed = read_shape(folder).weights_bytes // 2  # in bfloat16, which the old one has not
    small, large = Gpu("NVIDIA T400", needed // 2, 7.5), Gpu("NVIDIA RTX A6000", needed, 8.6)
    for gpus, fits in (((small, large), True), ((small,), False), ((), True)):
        machine = Machine(2, 1 << 40, gpus, bfloat16=True, has_unknown_gpus=not gpus)
        monkeypatch.setattr(module, "this_machine", lambda machine=machine: machine)
        assert bool(list(module.the_target_finds_memory(plan))) != fits
