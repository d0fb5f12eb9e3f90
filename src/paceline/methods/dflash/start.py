"""A draft that starts from the folder of a block draft: its weights, under the names of the checkpoint.

Embedding and lm_head of a block draft are the target's; a folder that carries them must carry the same.
"""

from __future__ import annotations

import torch

from paceline.methods.dflash.start_config import BlockStart
from paceline.methods.start.tensors import exact, refuse_other_rows, stored_tensors
from paceline.target.head import TargetHead

PREFIX = "model."


def start_tensors(given: BlockStart, head: TargetHead) -> dict[str, torch.Tensor]:
    """The draft's state dict from the folder. Raises ConfigError for unfit tensors."""
    start = given.start
    raw = {name.removeprefix(PREFIX): tensor for name, tensor in stored_tensors(start).items()}
    refuse_other_rows(start, "embedding", raw.pop("embed_tokens.weight", None), head.embed_tokens)
    refuse_other_rows(start, "lm_head", raw.pop("lm_head.weight", None), head.lm_head)
    offsets, taken = raw.pop("d2t", None), raw.pop("t2d", None)
    if (offsets is not None and bool(offsets.any())) or (taken is not None and not bool(taken.all())):
        raise start.refused("its vocabulary maps leave tokens out", "A block draft here guesses all tokens.")
    return exact(start, raw)
