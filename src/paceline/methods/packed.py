"""What packed batches share: groups of anchors for the output layer, figures by depth, the move to a device.

Legend: S guesses of an anchor, A anchors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Neighbouring anchors, and the part of the target rows that their guesses are compared with."""

    anchors: slice
    targets: slice


def on_device(batch: T, device: torch.device) -> T:
    """The dataclass `batch` with its tensors on `device`; copies to a CUDA device overlap with its work."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}  # type: ignore[arg-type]
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    if device.type == "cuda":
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    moved: dict[str, Any] = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
    return replace(batch, **moved)  # type: ignore[type-var]


def by_depth(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """`values` [S] as metrics `name`_0, `name`_1, ..."""
    return {f"{name}_{depth}": value for depth, value in enumerate(values.unbind())}


def mean_metrics(metrics: Mapping[str, float], depths: int) -> dict[str, float]:
    """Readable figures from the sums `loss`, `count`, `hits` and `judged` by depth, and `chain`.

    `chain` sums the leading hits of the `judged_0` judged anchors: 1 more than their mean estimates the
    acceptance length.
    """
    means = {"acceptance_length_estimate": 1.0 + metrics["chain"] / max(1.0, metrics["judged_0"])}
    for depth in range(depths):
        means[f"loss_{depth}"] = metrics[f"loss_{depth}"] / max(1.0, metrics[f"count_{depth}"])
        means[f"accuracy_{depth}"] = metrics[f"hits_{depth}"] / max(1.0, metrics[f"judged_{depth}"])
    return means
