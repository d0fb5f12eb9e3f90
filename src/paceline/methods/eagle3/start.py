"""A draft that starts from an EAGLE-3 or P-EAGLE folder: its weights, its vocabulary maps and its layers.

The folder's tensors are those of vLLM (`layers.0.`) or of SGLang (`midlayer.`). An embedding of its own must
be the target's, which the draft here always reads.
"""

from __future__ import annotations

import torch

from paceline.methods.eagle3.start_config import StartConfig
from paceline.methods.eagle3.vocab import vocab_maps
from paceline.methods.start.folder import StartFolder
from paceline.methods.start.tensors import exact, refuse_other_rows, stored_tensors
from paceline.target.head import TargetHead

PREFIXES = (("model.", ""), ("layers.0.", "midlayer."))
EMBEDDING, HEAD, MASK = "embed_tokens.weight", "lm_head.weight", "mask_hidden"


def start_tensors(given: StartConfig, head: TargetHead) -> dict[str, torch.Tensor]:
    """The draft's state dict from the folder. Raises ConfigError for unfit tensors."""
    start, size, vocab = given.start, given.sizes["draft_vocab_size"], given.sizes["vocab_size"]
    raw = {_short(name): tensor for name, tensor in stored_tensors(start).items()}
    refuse_other_rows(start, "embedding", raw.pop(EMBEDDING, None), head.embed_tokens)
    ids = _target_ids(start, raw.pop("d2t", None), size, vocab)
    d2t, t2d = vocab_maps(ids, vocab)
    told = raw.pop("t2d", None)
    if told is not None and size < vocab and not torch.equal(told.bool(), t2d):
        raise start.refused("its d2t and t2d name different tokens", "The vocabulary maps are kept.")
    if HEAD not in raw:
        raw[HEAD] = head.lm_head[ids]  # servers take the target's own
    if MASK in raw and raw[MASK].dim() == 3:  # the speculators package has one more dimension
        raw[MASK] = raw[MASK][0]
    return {**exact(start, raw), "d2t": d2t, "t2d": t2d}


def _short(name: str) -> str:
    for prefix, other in PREFIXES:
        name = other + name.removeprefix(prefix) if name.startswith(prefix) else name
    return name


def _target_ids(start: StartFolder, d2t: torch.Tensor | None, size: int, vocab: int) -> torch.Tensor:
    """The target's id of every draft token, int64 [size]."""
    why = "d2t holds target ids less draft ids, one for each draft token."
    if d2t is None:
        if size != vocab:
            raise start.refused(f"it has {size} of {vocab} tokens and no d2t", why)
        return torch.arange(vocab)
    if tuple(d2t.shape) != (size,) or d2t.is_floating_point():
        raise start.refused(f"its d2t is {d2t.dtype} of the shape {tuple(d2t.shape)}", why)
    ids = torch.arange(size) + d2t.long()
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or ids.unique().numel() != size:
        raise start.refused("its d2t leads outside the vocabulary, or twice to one token", why)
    return ids
