"""A role computes where the run file says."""

from __future__ import annotations

import pytest
import torch

from paceline.errors import ConfigError
from paceline.precision import resolve_device, torch_dtype


def test_auto_is_the_first_cuda_device_or_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a device that is named is that one, whatever else is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = ("auto", "cpu", "cuda:1")
    assert [str(resolve_device(name)) for name in names] == ["cuda:0", "cpu", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(resolve_device("auto")) == "cpu"


@pytest.mark.parametrize("present", [0, 1])
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, present: int) -> None:
    """Never another one in its stead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    with pytest.raises(ConfigError, match=f"no device cuda:1: this machine has {present}"):
        resolve_device("cuda:1")


def test_the_type_follows_from_the_device_it_is_computed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device without bfloat16 products computes in float32, whatever the processor has."""
    for capability, dtype in (((7, 5), torch.float32), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert torch_dtype("auto", torch.device("cuda:0")) is dtype
