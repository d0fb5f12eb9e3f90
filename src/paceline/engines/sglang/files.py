"""The files of states that the plug-in of the server leaves (sink.py says how), read without trust.

A file is named by the id that the producer chose for its request. Its manifest appears last and holds its
size and digest. What is read must be whole, of the run's shape, and of the very tokens of the answer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from paceline.engines.served.http import TryAgainError
from paceline.engines.served.own_files import (
    foreign,
    open_own,
    opened,
    read_own,
    remove_own,
    sweep,
    wait_until,
)
from paceline.engines.sglang.sink import STATES, TOKENS, VERSION
from paceline.errors import CaptureMismatchError, EngineError

MANIFEST_BYTES_MAX = 4096
HEADER_BYTES_MAX = 1 << 16
ABSENT = "the plug-in of the server wrote no file"


class SinkFiles:
    def __init__(
        self,
        folder: Path,
        layers: Sequence[int],
        hidden_size: int,
        dtype: torch.dtype,
        *,
        prefix: str,
        wait_s: float,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`layers`: the blocks after which a row's states are, the last block included.

        `prefix`: of the run's requests. `wait_s`: how long a file may come after its answer.
        """
        self.folder = folder
        self._layers, self._hidden_size, self._dtype = list(layers), hidden_size, dtype
        self._prefix, self._wait_s = prefix, wait_s
        self._should_stop = should_stop

    def clear(self, request_id: str) -> None:
        """Remove what an earlier request of that id has left."""
        with opened(self.folder) as folder:
            remove_own(folder, *_names(request_id))

    def take(self, request_id: str, token_ids: Sequence[int]) -> torch.Tensor:
        """Read and remove the states [T, layers, H] of the answered tokens; `token_ids`: T + 1.

        Raises TryAgainError if there is no whole file, CaptureMismatchError for states of other layers or
        tokens, EngineError for what the plug-in says.
        """
        manifest_name, name = _names(request_id)
        with opened(self.folder) as folder:
            try:
                manifest = self._manifest(folder, manifest_name)
                data = read_own(folder, name, self._bytes_max(len(token_ids)))
            finally:
                remove_own(folder, manifest_name, name)
        whole = len(data) == manifest.get("bytes")
        if not whole or hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
            raise TryAgainError(f"{name} is not whole")
        return self._states(name, data, manifest, token_ids)

    def sweep(self, older_than_s: float) -> int:
        """Remove the run's files that no producer waits for any more; their number."""
        whole = sweep(self.folder, self._prefix, (".json", ".safetensors"), older_than_s)
        return whole + sweep(self.folder, f".{self._prefix}", (".new",), older_than_s)

    def _manifest(self, folder: int, name: str) -> Mapping[str, Any]:
        def is_there() -> bool:
            with suppress(FileNotFoundError):
                os.close(open_own(folder, name))
                return True
            return False

        absent = f"{ABSENT} into {self.folder} within {self._wait_s:g} s"
        wait_until(is_there, self._wait_s, self._should_stop, absent)
        try:
            manifest = json.loads(read_own(folder, name, MANIFEST_BYTES_MAX))
        except (ValueError, RecursionError) as error:
            raise TryAgainError(f"{name} is not whole") from error
        if not isinstance(manifest, Mapping) or manifest.get("version") != VERSION:
            raise foreign(f"{name} is of another version of the plug-in")
        if told := manifest.get("error"):
            raise EngineError(
                f"The plug-in of the server wrote no states: {str(told)[:500]}.",
                why="Nothing of this request was captured.",
                next="start the server as `paceline engine sglang RUN.yaml` prints (no cache of prefixes).",
            )
        return manifest

    def _bytes_max(self, num_tokens: int) -> int:
        row = (len(self._layers) + 1) * self._hidden_size * self._dtype.itemsize + 8
        return num_tokens * row + HEADER_BYTES_MAX

    def _states(
        self, name: str, data: bytes, manifest: Mapping[str, Any], token_ids: Sequence[int]
    ) -> torch.Tensor:
        try:
            tensors = load(data)
            states, tokens = tensors[STATES], tensors[TOKENS]
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise TryAgainError(f"{name} is not whole ({str(error)[:200]})") from error
        if tokens.tolist() != list(token_ids):
            raise TryAgainError(f"{name} holds other tokens than the answer")
        *aux, _ = self._layers
        if manifest.get("blocks") != aux:
            raise self._mismatch(f"after blocks {manifest.get('blocks')} and the last")
        shape = (len(token_ids) - 1, len(self._layers) * self._hidden_size)
        if tuple(states.shape) != shape or states.dtype != self._dtype:
            raise self._mismatch(f"{list(states.shape)} of {states.dtype} for {len(token_ids) - 1} tokens")
        return states.view(-1, len(self._layers), self._hidden_size)

    def _mismatch(self, found: str) -> CaptureMismatchError:
        return CaptureMismatchError(
            f"The server's states are {found}; the run needs those after blocks {self._layers}, of "
            f"{self._hidden_size} numbers each, of {self._dtype}.",
            why="A draft trained on others would guess worse, and nothing would say why.",
            next="start the server as `paceline engine sglang RUN.yaml` prints. If it was, the target's "
            "family numbers its blocks otherwise, or has a final norm that the plug-in does not see: use "
            "another engine for it.",
        )


def _names(request_id: str) -> tuple[str, str]:
    return f"{request_id}.json", f"{request_id}.safetensors"
