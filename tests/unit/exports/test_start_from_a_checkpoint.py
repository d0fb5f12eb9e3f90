"""A run starts from a checkpoint of another run of the same method and target."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from exports_case import ROPE, target_folder

from paceline.errors import ConfigError
from paceline.methods.method import DraftMethod
from paceline.methods.table import METHODS
from paceline.target.head import TargetHead
from paceline.target.version import files_version
from paceline.testing.divided import in_parts
from paceline.testing.tiny_target import captured_sample, tiny_target
from paceline.training.checkpoint import Checkpoint, CheckpointFolder
from paceline.training.settings import TrainerSettings, TrainingSection
from paceline.training.torch_learner import TorchLearner

METHODS_TRIED = {
    "eagle3": {"draft_vocab_size": 40, "sliding_window": 20, "norm_output": True, "init": "random"},
    "p-eagle": {"draft_vocab_size": 40, "mask_token_id": 7, "init": "random"},
    "dflash": {"block_size": 5, "layers": 2, "target_states": 3, "causal": True, "init": "random"},
    "dspark": {"block_size": 5, "layers": 1, "target_states": 3, "markov_rank": 6, "init": "random"},
    "domino": {"block_size": 5, "layers": 1, "target_states": 3, "gru_hidden_dim": 12, "emb_dim": 5},
    "dflash2": {"block_size": 5, "layers": 1, "target_states": 3, "selector_rank": 6, "selector_top_k": 5},
}


def method_of(name: str, **settings: object) -> DraftMethod:
    method: DraftMethod = METHODS.find(name).parse(settings).build()
    return method


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> TargetHead:
    return TargetHead.load(target_folder(tmp_path_factory.mktemp("target") / "model", ROPE))


def trained(head: TargetHead, name: str, folder: Path) -> tuple[Path, TorchLearner]:
    """A run's checkpoint, and the learner that wrote it."""
    settings = TrainerSettings(1, 1, training=TrainingSection(device="cpu"))
    learner = TorchLearner(method_of(name, **METHODS_TRIED[name]), head, settings)
    sample = captured_sample(tiny_target(), 20, 4, seed=1)
    learner.build([sample])
    learner.step(1, [sample])
    record = CheckpointFolder(folder, "run0").write(Checkpoint(1, 0, learner.files(), learner.describe()))
    return folder / record.name, learner


def test_a_run_goes_on_from_the_parts_that_several_ranks_wrote(head: TargetHead, tmp_path: Path) -> None:
    """To the same bits; a part that is not the manifest's is refused."""
    folder, learner = trained(head, "eagle3", tmp_path / "whole")
    assert learner.draft is not None
    wanted = learner.draft.state_dict()
    checkpoint = Checkpoint(1, 0, in_parts("draft.safetensors", wanted, 3), learner.describe())
    record = CheckpointFolder(tmp_path / "parts", "run0").write(checkpoint)
    folder = tmp_path / "parts" / record.name
    draft = method_of("eagle3", start_from=folder).build(head, [], seed=0)
    found = draft.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    last = folder / "draft-00003-of-00003.safetensors"
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    with pytest.raises(ConfigError, match=r"draft-00003-of-00003\.safetensors does not match its manifest"):
        method_of("eagle3", start_from=folder).build(head, [], seed=0)


@pytest.mark.parametrize("name", METHODS_TRIED)
def test_a_run_goes_on_from_the_very_bits(head: TargetHead, name: str, tmp_path: Path) -> None:
    """Weights, shape and vocabulary maps; what a checkpoint says of its target is compared."""
    folder, learner = trained(head, name, tmp_path)
    method = method_of(name, start_from=folder)
    method.check_target(head)
    draft = method.build(head, [], seed=0)
    assert learner.draft is not None
    before = learner.draft.state_dict()
    assert draft.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in draft.state_dict().items())
    assert method.describe(draft) == learner.describe()["draft_config"]
    assert METHODS.find(name).parse({"start_from": folder}).notes == []


def test_a_checkpoint_of_another_target_or_method_is_refused(head: TargetHead, tmp_path: Path) -> None:
    """The digest of the target is in the manifest."""
    folder, _ = trained(head, "dflash", tmp_path / "run")
    other = TargetHead.load(target_folder(tmp_path / "other", {**ROPE, "rope_theta": 70000.0}))
    with pytest.raises(ConfigError, match="of the digest"):
        method_of("dflash", start_from=folder).check_target(other)
    with pytest.raises(ConfigError, match="of the method dflash, not domino"):
        method_of("domino", start_from=folder)


def test_a_damaged_draft_is_refused(head: TargetHead, tmp_path: Path) -> None:
    """One flipped bit, by the manifest's digest."""
    folder, _ = trained(head, "eagle3", tmp_path / "run")
    data = bytearray((folder / "draft.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "draft.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match="does not match its manifest"):
        method_of("eagle3", start_from=folder).build(head, [], seed=0)
    (folder / "draft.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        method_of("eagle3", start_from=folder).build(head, [], seed=0)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="'values' is missing in its manifest"):
        method_of("eagle3", start_from=folder)


def test_a_run_is_bound_to_the_checkpoints_content(head: TargetHead, tmp_path: Path) -> None:
    """A copy elsewhere is the same; another step is not. The optimizer's state does not matter."""
    folder, learner = trained(head, "dflash", tmp_path / "run")
    copy = Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("optimizer*")))
    assert files_version(copy) == files_version(folder)
    learner.step(2, [captured_sample(tiny_target(), 20, 4, seed=2)])
    later = Checkpoint(2, 0, learner.files(), learner.describe())
    record = CheckpointFolder(tmp_path / "run", "run0").write(later)
    assert files_version(tmp_path / "run" / record.name) != files_version(folder)
