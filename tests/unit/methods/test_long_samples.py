"""Nothing that training keeps grows faster than a sample: a token of a long one takes no more bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paceline.methods.table import METHODS
from paceline.testing.synthetic import synthetic_head
from paceline.types import Rows, States, Tokens

PROMPT = 9
EAGLE3: dict[str, Any] = {"draft_vocab_size": 32, "ttt_steps": 2}
BLOCKS: dict[str, Any] = {"block_size": 4, "layers": 1, "target_states": 1, "anchors_max": 1 << 20}
METHODS_OF = [
    {"name": "eagle3", **EAGLE3},
    *({"name": name, **BLOCKS} for name in ("dflash", "domino", "dflash2")),
]


class Resident(TorchDispatchMode):
    """The most bytes of tensors that are there at a time, those that autograd keeps included."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._seen = {key: value for key, value in self._seen.items() if not value[0].expired()}
        self.most = max(self.most, sum(num_bytes for _, num_bytes in self._seen.values()))
        return found


def sample_of(method: Any, tokens: int) -> dict[str, torch.Tensor]:
    head, targets = synthetic_head(), (torch.arange(tokens + 1) >= PROMPT).to(torch.uint8)
    generator, sample = torch.Generator().manual_seed(tokens), dict[str, torch.Tensor]()
    for feature in method.features(head.facts):
        if isinstance(feature.source, States):
            rows = tokens if feature.rows == Rows.ALL else int(targets[1:].sum())
            width = len(feature.source.layers) * head.hidden_size
            sample[feature.name] = torch.randn(rows, width, generator=generator)
        elif isinstance(feature.source, Tokens):
            ids = torch.randint(head.vocab_size, (tokens + 1,), generator=generator)
            sample[feature.name] = ids.int()
        else:
            sample[feature.name] = targets
    return sample


@pytest.mark.parametrize("settings", METHODS_OF, ids=lambda settings: settings["name"])
def test_a_step_on_a_longer_sample_takes_the_same_bytes_a_token(settings: dict[str, Any]) -> None:
    """Batch, loss, gradients and the first weights: four times the length, hardly more than four times the
    bytes. With a quadratic buffer it would be up to sixteen times as many."""
    method = METHODS.find(settings["name"]).parse(settings).build()  # type: ignore[attr-defined]
    head, taken = synthetic_head(), list[tuple[int, int]]()
    for tokens in (256, 1024):
        sample = sample_of(method, tokens)
        with Resident() as building:
            draft = method.build(head, [sample], 0)
        with Resident() as training:
            draft(method.collate([sample], torch.device("cpu"), 1)).loss_sum.backward()
        taken.append((building.most, training.most))
    for short, long in zip(*taken, strict=True):
        assert long < 4.8 * short
