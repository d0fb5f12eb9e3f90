"""vLLM's connector for hidden states, without the CUDA streams and pinned memory that it asks for.

It leaves the sampler of the package as it is, which writes gibberish; `repaired_connector` mends that.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)


class AlreadyCopied:
    """Stands for the CUDA event of a copy: on processors the copy is done when the call returns."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        return True


class CpuHiddenStatesConnector(ExampleHiddenStatesConnector):
    def _submit_async_write(self, pending: Any) -> None:
        """Copy the states out of the cache now; a thread writes them, under the lock that is held already."""
        if not self._is_tp_rank_zero:
            return
        num_tokens, size = pending.token_ids.shape[0], self._block_size
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (blocks[:, None] * size + torch.arange(size)).flatten()[:num_tokens]
        states = extract_from_kv_cache(self._kv_cache, slots, num_tokens).contiguous()
        tensors = {"hidden_states": states, "token_ids": pending.token_ids.clone()}
        Path(pending.filename).parent.mkdir(parents=True, exist_ok=True)
        lock = self._lock_fds.pop(pending.req_id, None)
        copied = AlreadyCopied()
        written = self._executor.submit(self._write_tensors, tensors, copied, pending.filename, lock)
        self._req_copy_events[pending.req_id] = copied
        self._req_futures[pending.req_id] = written
        written.add_done_callback(partial(self._on_write_done, pending.req_id))
