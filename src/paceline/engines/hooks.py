"""Forward hooks that keep the states between a model's decoder blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch


class Hooks:
    """Keeps the states of the latest forward after each of `ids` blocks, [B, n, H] by layer id."""

    def __init__(self, layers: torch.nn.ModuleList, ids: Collection[int]) -> None:
        self._layers = layers
        self._ids = sorted(set(ids))
        self.taken: dict[int, torch.Tensor] = {}

    def __enter__(self) -> Hooks:
        self._handles = [self._layers[k - 1].register_forward_hook(self._keep(k)) for k in self._ids if k]
        if 0 in self._ids:
            first = self._layers[0]
            self._handles.append(first.register_forward_pre_hook(self._keep_input, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, layer_id: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            self.taken[layer_id] = output[0] if isinstance(output, tuple) else output

        return hook

    def _keep_input(self, _module: torch.nn.Module, inputs: Any, named: Any) -> None:
        self.taken[0] = inputs[0] if inputs else named["hidden_states"]
