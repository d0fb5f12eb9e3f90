"""The devices that CUDA_VISIBLE_DEVICES leaves, as the plan counts them."""

from __future__ import annotations

import pytest

from paceline.roles.machine import Gpu, _visible
from paceline.visible_devices import names_left

THREE = tuple(Gpu(name, 1 << 30) for name in "abc")


@pytest.mark.parametrize(
    ("named", "left"),
    [
        ("0,2", ["0", "2"]),
        (" 1 , 0", ["1", "0"]),
        ("GPU-8f1c,MIG-2b7e", ["GPU-8f1c", "MIG-2b7e"]),
        ("1,-1,2", ["1"]),
        ("-1", []),
        ("NoDevFiles", []),
        ("", []),
    ],
)
def test_the_list_ends_where_cuda_ends_it(named: str, left: list[str]) -> None:
    """-1 and what schedulers write for no device leave none."""
    assert names_left(named) == left


@pytest.mark.parametrize(
    ("named", "names"), [("2,0", "ca"), ("5", ""), ("-1", ""), ("NoDevFiles", ""), ("GPU-8f1c", "a")]
)
def test_a_plan_counts_what_is_left(named: str, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the list. Which GPU a UUID names is not asked, only how many there are."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert "".join(gpu.name for gpu in _visible(THREE)) == names
