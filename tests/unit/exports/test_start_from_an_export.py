"""A run starts from a public EAGLE-3 or P-EAGLE folder, whichever its layout, or refuses what it cannot
continue."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exports_case import Case, make_case
from safetensors.torch import load_file, save_file

from paceline.errors import ConfigError
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.settings import Eagle3Section
from paceline.methods.method import DraftMethod
from paceline.methods.table import METHODS
from paceline.target.head import TargetHead
from paceline.types import States

IDS = "eagle_aux_hidden_state_layer_ids"
Tensors = dict[str, torch.Tensor]


def edited(
    case: Case,
    folder: Path,
    config: Callable[[dict[str, Any]], object] = lambda _: None,
    tensors: Callable[[Tensors], object] = lambda _: None,
    name: str = "sglang",
) -> Path:
    """An exported folder with another config.json or other tensors."""
    case.export(name, folder)
    content = json.loads((folder / "config.json").read_text())
    config(content)
    (folder / "config.json").write_text(json.dumps(content))
    weights = load_file(folder / "model.safetensors")
    tensors(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def method_of(name: str, folder: Path, **settings: Any) -> DraftMethod:
    method: DraftMethod = METHODS.find(name).parse({"start_from": folder, **settings}).build()
    return method


def start(case: Case, folder: Path, **settings: Any) -> Tensors:
    method, head = method_of(case.draft.method, folder, **settings), TargetHead.load(case.folder)
    method.check_target(head)
    method.features(head.facts)
    return dict(method.build(head, [], seed=0).state_dict())


PARALLEL = {"name": "p-eagle", "norm_before_fc": True, "mask_token_id": 7}


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("target") / "model", **PARALLEL)


@pytest.mark.parametrize("name", ["vllm", "speculators"])
def test_a_parallel_draft_goes_on_with_its_mask(parallel: Case, name: str, tmp_path: Path) -> None:
    """The learned row and the mask token are the folder's, without a word in the settings."""
    folder = parallel.export(name, tmp_path / "draft")
    state = start(parallel, folder)
    assert state.keys() == parallel.draft.tensors.keys()
    assert all(torch.equal(tensor, parallel.draft.tensors[key]) for key, tensor in state.items())
    method, head = method_of("p-eagle", folder), TargetHead.load(parallel.folder)
    assert method.describe(method.restore(head, state)) == parallel.draft.sizes


def test_a_setting_beside_it_must_be_the_folders(case: Case, parallel: Case, tmp_path: Path) -> None:
    """One that says the same, or nothing, changes nothing."""
    one, other = case.export("vllm", tmp_path / "one"), parallel.export("vllm", tmp_path / "other")
    start(case, one, draft_vocab_size=48, ttt_steps=3)
    start(parallel, other, mask_token_id=7, norm_before_fc=True)
    with pytest.raises(ConfigError, match=r"method\.draft_vocab_size is 40, and the folder's is 48"):
        start(case, one, draft_vocab_size=40)
    with pytest.raises(ConfigError, match=r"method\.norm_output is True, and the folder's is False"):
        start(case, one, norm_output=True)
    with pytest.raises(ConfigError, match=r"method\.mask_token_id is 5, and the folder's is 7"):
        start(parallel, other, mask_token_id=5)


PARALLEL_REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "its mask token is 5 and 7": ("vllm", {"pard_token": 5}),
    "its mask token is missing": ("vllm", {"pard_token": None, "mask_token_id": None}),
    "leave fc_norm and norm_output out": ("vllm", {"norm_output": True}),
    "is 'eagle3', not 'peagle'": ("speculators", {"speculators_model_type": "eagle3"}),
}


@pytest.mark.parametrize("reason", PARALLEL_REFUSED)
def test_a_parallel_draft_that_servers_read_otherwise_is_refused(
    parallel: Case, reason: str, tmp_path: Path
) -> None:
    """With the reason, before anything is trained."""
    name, fields = PARALLEL_REFUSED[reason]
    folder = edited(parallel, tmp_path / "draft", lambda config: config.update(fields), name=name)
    with pytest.raises(ConfigError, match=reason):
        start(parallel, folder)


def test_a_draft_of_the_other_eagle_is_refused(case: Case, parallel: Case, tmp_path: Path) -> None:
    """Whether the folder says so, or only its tensors and fields do."""
    one, other = case.export("vllm", tmp_path / "one"), parallel.export("vllm", tmp_path / "other")
    with pytest.raises(ConfigError, match="of the method eagle3, not p-eagle"):
        start(parallel, one)
    with pytest.raises(ConfigError, match="of the method p-eagle, not eagle3"):
        start(case, other)
    unsaid = edited(parallel, tmp_path / "unsaid", lambda config: config.pop("paceline"), name="vllm")
    with pytest.raises(ConfigError, match=r"method\.name is p-eagle"):
        start(case, unsaid)


@pytest.mark.parametrize("name", ["vllm", "sglang", "speculators"])
def test_weights_and_vocabulary_maps_are_the_folders(case: Case, name: str, tmp_path: Path) -> None:
    """With midlayer or layers.0, with and without the target's embedding; the same rotary base and layers."""
    folder = case.export(name, tmp_path / "draft")
    state = start(case, folder)
    assert state.keys() == case.draft.tensors.keys()
    assert all(torch.equal(tensor, case.draft.tensors[key]) for key, tensor in state.items())
    method, head = Eagle3Method({"start_from": folder}), TargetHead.load(case.folder)
    assert method.describe(method.restore(head, state)) == case.draft.sizes
    assert method.learning_rate_scales() == {}


def layers_of(method: Eagle3Method, head: TargetHead) -> tuple[int, ...]:
    [aux, _last] = [f.source.layers for f in method.features(head.facts) if isinstance(f.source, States)]
    return aux


@pytest.mark.parametrize(
    "kept", [lambda c: c.pop("eagle_config"), lambda c: c.pop(IDS)], ids=["vllm's list", "sglang's list"]
)
def test_the_folders_layers_decide_the_features(
    case: Case, kept: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    """In either meaning, before anything is captured."""
    sizes = {**case.draft.sizes, "aux_layer_ids": (1, 3, 6)}
    other = replace(case, draft=replace(case.draft, sizes=sizes))
    folder = edited(other, tmp_path / "draft", kept)
    method = Eagle3Method({"start_from": folder})
    head = TargetHead.load(case.folder)
    assert layers_of(method, head) == (1, 3, 6)
    Eagle3Method({"start_from": folder, "aux_layers": (1, 3, 6)}).features(head.facts)
    with pytest.raises(ConfigError, match=r"aux_layers is \(1, 3, 7\), and the folder's is \(1, 3, 6\)"):
        Eagle3Method({"start_from": folder, "aux_layers": (1, 3, 7)}).features(head.facts)
    assert layers_of(Eagle3Method(), head) == (2, 4, 5)


REFUSED_FIELDS = {
    "norm_before_residual": True,
    "fc_norm": True,  # without its tensors
    "norm_before_fc": True,
    "attention_bias": True,
    "num_hidden_layers": 2,
    "hidden_act": "gelu",
    "architectures": ["LlamaForCausalLM"],
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "partial_rotary_factor": 0.5,
    "vocab_size": 62,
    "target_hidden_size": 64,
    "eagle_config": {"use_aux_hidden_state": False},
    IDS: [1, 3, 4],
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_what_is_not_implemented_or_not_this_targets_is_refused(
    case: Case, field: str, tmp_path: Path
) -> None:
    """With the reason, before anything is trained."""
    folder = edited(case, tmp_path / "draft", lambda config: config.update({field: REFUSED_FIELDS[field]}))
    with pytest.raises(ConfigError, match="cannot start from"):
        start(case, folder)


def test_a_draft_of_another_target_is_refused_by_digest_or_by_name(case: Case, tmp_path: Path) -> None:
    """The digest decides if there is one; else the last part of the name."""
    other = edited(case, tmp_path / "a", lambda c: c["paceline"]["target"].update(model="f" * 16))
    with pytest.raises(ConfigError, match="of the digest ffffffffffffffff"):
        start(case, other)
    named = edited(case, tmp_path / "b", lambda c: c.pop("paceline"), name="speculators")
    with pytest.raises(ConfigError, match=r"was trained for org/target"):
        start(case, named)
    (tmp_path / "target").symlink_to(case.folder)
    start(replace(case, folder=tmp_path / "target"), named)


def test_a_folder_that_names_no_target_is_taken_and_told(case: Case, tmp_path: Path) -> None:
    """Before the run starts: a draft of a relative has the same sizes, and nothing here can tell it apart."""
    unnamed = edited(case, tmp_path / "c", lambda c: c.pop("paceline"))
    start(case, unnamed)
    [(what, advice)] = Eagle3Section(start_from=unnamed).notes
    assert "does not say for which target it was trained" in what
    assert "model card" in advice
    for named in (case.export("sglang", tmp_path / "a"), case.export("speculators", tmp_path / "b")):
        assert Eagle3Section(start_from=named).notes == []
    assert Eagle3Section().notes == []


BROKEN: dict[str, Callable[[Tensors], object]] = {
    "midlayer.mlp.up_proj.weight is missing": lambda t: t.pop("midlayer.mlp.up_proj.weight"),
    "extra is unknown": lambda t: t.update(extra=torch.zeros(1)),
    "fc.weight has the shape": lambda t: t.update({"fc.weight": torch.zeros(32, 64)}),
    "norm.weight is not finite": lambda t: t["norm.weight"].fill_(float("nan")),
    "no d2t": lambda t: t.pop("d2t"),
    "leads outside": lambda t: t["d2t"].add_(torch.arange(48)),
    "name different tokens": lambda t: t["t2d"].logical_not_(),
    "embedding is not the target's": lambda t: t.update({"embed_tokens.weight": torch.ones(61, 32)}),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_unfit_tensors_are_refused(case: Case, reason: str, tmp_path: Path) -> None:
    """No weight is guessed, and none is dropped."""
    folder = edited(case, tmp_path / "draft", tensors=BROKEN[reason])
    with pytest.raises(ConfigError, match=reason):
        start(case, folder)


def test_a_whole_vocabulary_and_a_missing_head_are_the_targets(tmp_path: Path) -> None:
    """A folder without lm_head is served with the target's."""
    case = make_case(tmp_path / "model", vocab=61)
    folder = edited(case, tmp_path / "draft", tensors=lambda t: t.pop("lm_head.weight"))
    state = start(case, folder)
    assert torch.equal(state["lm_head.weight"], TargetHead.load(case.folder).lm_head)
    assert not state["d2t"].any()
