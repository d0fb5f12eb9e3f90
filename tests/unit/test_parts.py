"""Parts of a checkpoint's file: names and rows; and torch.distributed.checkpoint reads them, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as read_distributed

from paceline.parts import first_rows, joined, part_name, parts_of, whole_name
from paceline.testing.divided import in_parts
from paceline.training.tensor_files import read

DRAFT = "draft.safetensors"
WHOLE = {
    "norm": torch.arange(7.0),
    "matrix": torch.arange(35.0).reshape(7, 5).bfloat16(),
    "short": torch.tensor([[1.0, 2.0]]),
    "steps": torch.tensor(3.0),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 9])
def test_parts_give_the_whole_tensors_again(ranks: int) -> None:
    found = read(DRAFT, in_parts(DRAFT, WHOLE, ranks))
    assert found.keys() == WHOLE.keys()
    for name, tensor in WHOLE.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_checkpoint_reads_them(tmp_path: Path) -> None:
    """So a checkpoint can be read, and divided anew, without Paceline."""
    for name, data in in_parts(DRAFT, WHOLE, 3).items():
        (tmp_path / name).write_bytes(data)
    found = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    read_distributed(found, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in WHOLE.items():
        assert torch.equal(found[name], tensor), name


def test_names_of_parts_are_found_in_order_and_none_may_be_missing() -> None:
    names = [part_name(DRAFT, rank, 11) for rank in range(11)]
    assert names[1] == "draft-00002-of-00011.safetensors"
    assert {whole_name(name) for name in names} == {DRAFT}
    others = ["rng-1.safetensors", "manifest.json", part_name("optimizer.safetensors", 0, 11)]
    assert parts_of(DRAFT, [*others, *reversed(names)]) == names
    assert parts_of(DRAFT, [*others, DRAFT]) == [DRAFT]
    assert [whole_name(name) for name in others[:2]] == others[:2]
    for missing in (0, 5, 10):
        with pytest.raises(KeyError, match=r"draft\.safetensors, of which there is draft-0000"):
            parts_of(DRAFT, [name for name in names if name != names[missing]])
    with pytest.raises(KeyError, match="nothing"):
        parts_of(DRAFT, others)
    with pytest.raises(KeyError, match="of which there is"):
        parts_of(DRAFT, [part_name(DRAFT, 0, 2), part_name(DRAFT, 1, 3)])


def test_rows_that_do_not_follow_each_other_are_refused() -> None:
    first, second = ((dict(load(data)), first_rows(data)) for data in in_parts(DRAFT, WHOLE, 2).values())
    with pytest.raises(ValueError, match="goes on at row 4 of a part, not at 0"):
        joined([second, first])


def test_a_whole_file_has_no_first_rows() -> None:
    assert first_rows(save({"a": torch.zeros(2)})) == {}
