"""A key-value cache of fixed capacity, and copies between caches of one model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """A cache layer that writes in place; the stock layer copies the whole cache at every token."""

    def __init__(self, num_rows: int, capacity: int, *, by_column: bool = False) -> None:
        """`by_column`: let each component of the keys lie side by side for all positions, as attention.py
        reads them on a CPU; shapes are the same."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_rows, self._capacity, self._length = num_rows, capacity, 0
        self._by_column = by_column

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self._num_rows, key_states.shape[1], self._capacity, key_states.shape[3])
        # Zeros, because a masked position is still multiplied with its value, and 0 * garbage may be NaN.
        self._value_room = value_states.new_zeros(shape)
        across = (*shape[:2], shape[3], shape[2])
        self._key_room = (
            key_states.new_zeros(across).transpose(-1, -2) if self._by_column else key_states.new_zeros(shape)
        )
        self.is_initialized = True

    def adopt(self, members: slice, start: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Copy in the keys and values of the rows `members`, computed apart, from position `start` on."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._length = start + key_states.shape[-2]
        self._key_room[members, :, start : self._length] = key_states
        self._value_room[members, :, start : self._length] = value_states
        self.keys, self.values = self._key_room[:, :, : self._length], self._value_room[:, :, : self._length]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ARG002 (the base class's signature)
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[-2]
        self._key_room[:, :, self._length : end] = key_states
        self._value_room[:, :, self._length : end] = value_states
        self._length = end
        self.keys, self.values = self._key_room[:, :, :end], self._value_room[:, :, :end]
        return self.keys, self.values


def copy_cache(source: DynamicCache, target: DynamicCache, members: slice, start: int) -> None:
    """Copy all cached positions of `source` to rows `members` of `target`, from position `start` on.

    A source of one row is copied to every member.
    """
    for piece, whole in zip(source.layers, target.layers, strict=True):
        assert isinstance(whole, PreallocatedLayer)
        assert isinstance(piece, PreallocatedLayer)
        assert piece.keys is not None
        assert piece.values is not None
        whole.adopt(members, start, piece.keys, piece.values)
