"""A run starts from the folder of a block draft, whichever its layout, or refuses what it cannot continue."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports_case import ROPE, Case, case_of, target_folder
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from paceline.errors import ConfigError
from paceline.methods.dflash.start_config import QWEN3, read_block_start
from paceline.methods.method import DraftMethod
from paceline.methods.table import METHODS
from paceline.target.head import TargetHead
from paceline.types import States

SIZES = {"block_size": 5, "layers": 2, "target_states": 3, "mask_token_id": 11}
KNOBS: dict[str, dict[str, Any]] = {
    "dflash": {"causal": True},
    "dspark": {"markov_rank": 6, "sample_from_anchor": False},
    "domino": {"gru_hidden_dim": 12, "emb_dim": 5},
    "dflash2": {"selector_rank": 6, "selector_top_k": 5, "conv_group_size": 8, "conv_kernel_size": 3},
}
FORMAT = {"dflash": "vllm", "dspark": "sglang", "domino": "sglang", "dflash2": "vllm"}
Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def method_of(name: str, **settings: Any) -> DraftMethod:
    method: DraftMethod = METHODS.find(name).parse(settings).build()
    return method


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = target_folder(tmp_path_factory.mktemp("target") / "model", ROPE)
    return {name: case_of(method_of(name, **SIZES, **knobs), folder) for name, knobs in KNOBS.items()}


def edited(
    case: Case,
    folder: Path,
    config: Callable[[Config], object] = lambda _: None,
    tensors: Callable[[Tensors], object] = lambda _: None,
) -> Path:
    """An exported folder with another config.json or other tensors."""
    case.export(FORMAT[case.draft.method], folder)
    content = json.loads((folder / "config.json").read_text())
    config(content)
    (folder / "config.json").write_text(json.dumps(content))
    weights = load_file(folder / "model.safetensors")
    tensors(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def packaged(config: Config) -> None:
    """The layout of the speculators package: decoder sizes nested, layers counted in blocks, nothing in
    `dflash_config`."""
    told = dict(config)
    config.clear()
    kind = {"domino": "dflash"}.get(told["paceline"]["method"], told["paceline"]["method"])
    names = {"dflash": "DFlash", "dspark": "DSpark", "dflash2": "DFlash2"}
    top = ("block_size", "mask_token_id", "sample_from_anchor", "draft_vocab_size", "paceline")
    heads = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
    more = ("projector_type", "gru_hidden_dim", "emb_dim", "pure_draft_prefix_len", "shift_label")
    last = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
    decoder = ("intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "hidden_size")
    shown = ("head_dim", "num_key_value_heads", "rope_parameters", "rms_norm_eps", "max_position_embeddings")
    nested = {key: told[key] for key in (*decoder, *shown)}
    config.update({key: told[key] for key in (*top, *heads, *more, *last) if key in told})
    config.update(
        architectures=[f"{names[kind]}Speculator"],
        speculators_model_type=kind,
        aux_hidden_state_layer_ids=[k + 1 for k in told["target_layer_ids"]],
        target_hidden_size=None,
        transformer_layer_config={"model_type": "qwen3", **nested},
    )


def start(case: Case, folder: Path, **settings: Any) -> Tensors:
    method = method_of(case.draft.method, start_from=folder, **settings)
    head = TargetHead.load(case.folder)
    method.check_target(head)
    method.features(head.facts)
    return dict(method.build(head, [], seed=0).state_dict())


@pytest.mark.parametrize("layout", ["flat", "packaged"])
@pytest.mark.parametrize("name", KNOBS)
def test_weights_and_shape_are_the_folders(
    cases: dict[str, Case], name: str, layout: str, tmp_path: Path
) -> None:
    """Without a word in the settings: block, layers, mask token, head and fused states. No setting of the
    first weights is used."""
    case = cases[name]
    is_causal = layout == "flat"  # the package's layout has no word for causal blocks
    if name == "dflash" and not is_causal:
        case = case_of(method_of(name, **SIZES), cases[name].folder)
    folder = edited(case, tmp_path / "draft", packaged if layout == "packaged" else lambda _: None)
    state = start(case, folder)
    assert state.keys() == case.draft.tensors.keys()
    assert all(torch.equal(tensor, case.draft.tensors[key]) for key, tensor in state.items())
    method, head = method_of(name, start_from=folder), TargetHead.load(case.folder)
    assert method.describe(method.restore(head, state)) == case.draft.sizes
    assert method.learning_rate_scales() == {}
    assert method.chain_length(3) == (5 if case.draft.sizes["sample_from_anchor"] else 4)


def test_sizes_that_the_package_leaves_out_are_those_of_its_class(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    """It writes only what differs from Qwen 3's defaults in transformers."""

    def bare(config: Config) -> None:
        packaged(config)
        for name in QWEN3:
            del config["transformer_layer_config"][name]

    library = Qwen3Config().to_dict()
    sizes = read_block_start(edited(cases["domino"], tmp_path / "draft", bare), "domino").sizes
    assert {name: sizes[name] for name in QWEN3} == {name: library[name] for name in QWEN3}


def test_the_folders_layers_decide_the_features(cases: dict[str, Case], tmp_path: Path) -> None:
    """Before anything is captured."""
    folder = edited(
        cases["dflash"],
        tmp_path / "draft",
        lambda c: [part.update(target_layer_ids=[0, 3, 6]) for part in (c, c["dflash_config"])],
    )
    method, head = method_of("dflash", start_from=folder), TargetHead.load(cases["dflash"].folder)
    [aux, _] = [f.source.layers for f in method.features(head.facts) if isinstance(f.source, States)]
    assert aux == (1, 4, 7)


def test_a_setting_beside_it_must_be_the_folders(cases: dict[str, Case], tmp_path: Path) -> None:
    """One that says the same, or nothing, changes nothing."""
    folder = edited(cases["dflash"], tmp_path / "draft")
    start(cases["dflash"], folder, block_size=5, layers=2, loss="tv")
    with pytest.raises(ConfigError, match=r"method\.block_size is 16, and the folder's is 5"):
        start(cases["dflash"], folder, block_size=16)
    start(cases["dflash"], folder, aux_layers=cases["dflash"].draft.sizes["aux_layer_ids"])
    with pytest.raises(ConfigError, match=r"method\.aux_layers is \(1, 6\), and the folder's is"):
        start(cases["dflash"], folder, aux_layers=(1, 6))


def test_a_draft_without_a_confidence_head_gets_none(cases: dict[str, Case], tmp_path: Path) -> None:
    """The setting's default would add one."""
    target = cases["dspark"].folder
    case = case_of(method_of("dspark", **SIZES, markov_rank=6, confidence_weight=0.0), target)
    state = start(case, edited(case, tmp_path / "draft"))
    assert state.keys() == case.draft.tensors.keys()
    assert not [key for key in state if "confidence" in key]


def both(**fields: Any) -> Callable[[Config], object]:
    """Changes the top of the config and `dflash_config` alike."""
    return lambda config: [part.update(fields) for part in (config, config["dflash_config"])]


REFUSED: list[tuple[str, str, Callable[[Config], object]]] = [
    ("dflash", "block_size is 9 at the top and 5", lambda c: c.update(block_size=9)),
    ("dflash", "'block_size' is missing", both(block_size=None)),
    ("dflash", "'mask_token_id' is missing", both(mask_token_id=None)),
    ("dflash", "'target_layer_ids' is missing", both(target_layer_ids=None)),
    ("dflash", "mean different layers", lambda c: c.update(eagle_aux_hidden_state_layer_ids=[1, 3, 5])),
    ("dflash", "its target has 36 layers", lambda c: c.update(num_target_layers=36)),
    ("dflash", "guesses 30 of 61 tokens", lambda c: c.update(draft_vocab_size=30)),
    ("dflash", "its vocabulary is 62", lambda c: c.update(vocab_size=62, draft_vocab_size=62)),
    ("dflash", "its target's hidden size is 64", lambda c: c.update(target_hidden_size=64)),
    ("dflash", "slides a window", lambda c: c.update(layer_types=["sliding_attention"] * 2)),
    ("dflash", "is_neox_style", lambda c: c.update(is_neox_style=False)),
    ("dflash", "first place guesses", both(sample_from_anchor=True)),
    ("dflash", "its architectures are", lambda c: c.update(architectures=["LlamaForCausalLMEagle3"])),
    ("dflash", "projector_type is 'domino', and method.name is dflash", both(projector_type="domino")),
    ("dflash", "which of its layers", lambda c: [c.update(use_sliding_window=True), c.pop("layer_types")]),
    ("dflash", "dflash_query_causal", lambda c: c["dflash_config"].update(dflash_query_causal=True)),
    ("dflash", "biases", lambda c: c.update(attention_bias=True)),
    ("dflash", "kind 'dynamic'", lambda c: c.update(rope_parameters={"rope_type": "dynamic", "factor": 2.0})),
    ("dflash", "of the digest ffff", lambda c: c["paceline"]["target"].update(model="f" * 16)),
    ("dflash", "of the method domino, not dflash", lambda c: c["paceline"].update(method="domino")),
    ("dspark", "'gated'", both(markov_head_type="gated")),
    ("dspark", "does not read the token before", both(confidence_head_with_markov=False)),
    ("domino", "shift_label", both(shift_label=True)),
    ("domino", "'projector_type' is missing", both(projector_type=None)),
    ("dflash2", "output_multiplier", both(output_multiplier=2.0)),
    ("dflash2", "conv_kernel_size", both(conv_kernel_size=9)),
]


@pytest.mark.parametrize(("name", "reason", "change"), REFUSED, ids=[f"{n}: {r}" for n, r, _ in REFUSED])
def test_what_is_not_implemented_or_not_this_targets_is_refused(
    cases: dict[str, Case], name: str, reason: str, change: Callable[[Config], object], tmp_path: Path
) -> None:
    """With the reason, before anything is trained."""
    with pytest.raises(ConfigError, match=reason):
        start(cases[name], edited(cases[name], tmp_path / "draft", change))


@pytest.mark.parametrize("layout", ["flat", "packaged"])
def test_spellings_that_public_folders_have_are_taken(
    cases: dict[str, Case], layout: str, tmp_path: Path
) -> None:
    """The method's name as its projector, the class's name of training, and a package without a class."""

    def spelt(config: Config) -> None:
        if layout == "packaged":
            packaged(config)
            del config["architectures"]
        else:
            both(projector_type="dspark")(config)
            config["architectures"] = ["DSparkDraftModel"]
        del config["paceline"]

    case = cases["dspark"]
    state = start(case, edited(case, tmp_path / "draft", spelt))
    assert all(torch.equal(tensor, case.draft.tensors[key]) for key, tensor in state.items())


def test_a_packaged_dspark_draft_must_say_where_it_guesses(cases: dict[str, Case], tmp_path: Path) -> None:
    """vLLM and the package read a missing field differently."""

    def unsaid(config: Config) -> None:
        packaged(config)
        del config["sample_from_anchor"]

    with pytest.raises(ConfigError, match="'sample_from_anchor' is missing"):
        start(cases["dspark"], edited(cases["dspark"], tmp_path / "draft", unsaid))


BROKEN: dict[str, Callable[[Tensors], object]] = {
    "layers.1.mlp.up_proj.weight is missing": lambda t: t.pop("layers.1.mlp.up_proj.weight"),
    "extra is unknown": lambda t: t.update(extra=torch.zeros(1)),
    "fc.weight has the shape": lambda t: t.update({"fc.weight": torch.zeros(32, 64)}),
    "norm.weight is not finite": lambda t: t["norm.weight"].fill_(float("nan")),
    "embedding is not the target's": lambda t: t.update({"embed_tokens.weight": torch.ones(61, 32)}),
    "lm_head is not the target's": lambda t: t.update({"lm_head.weight": torch.full((61, 32), float("nan"))}),
    "vocabulary maps leave tokens out": lambda t: t.update(d2t=torch.ones(61, dtype=torch.int64)),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_unfit_tensors_are_refused(cases: dict[str, Case], reason: str, tmp_path: Path) -> None:
    """No weight is guessed, and none is dropped."""
    with pytest.raises(ConfigError, match=reason):
        start(cases["dflash"], edited(cases["dflash"], tmp_path / "draft", tensors=BROKEN[reason]))


def test_the_targets_own_rows_and_whole_maps_are_taken_for_what_they_are(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    """Some public folders carry them, under the prefix `model.` too."""
    case = cases["dflash"]
    head = TargetHead.load(case.folder)

    def carried(tensors: Tensors) -> None:
        own = {f"model.{name}": tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(own)
        tensors.update({"model.embed_tokens.weight": head.embed_tokens.bfloat16()})
        tensors.update({"lm_head.weight": head.lm_head.clone()})
        tensors.update(d2t=torch.zeros(61, dtype=torch.int64), t2d=torch.ones(61, dtype=torch.bool))

    state = start(case, edited(case, tmp_path / "draft", tensors=carried))
    assert all(torch.equal(tensor, case.draft.tensors[key]) for key, tensor in state.items())
