"""A draft that starts from a public EAGLE-3 folder: its weights, its vocabulary maps and its layers.

The folder's tensors are those of vLLM (`layers.0.`) or of SGLang (`midlayer.`). An embedding of its own must
be the target's, which the draft here always reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paceline.methods.eagle3.start_config import StartConfig, refused
from paceline.methods.eagle3.vocab import vocab_maps
from paceline.methods.rope import rope_scaling_of
from paceline.target.folder import TensorFiles
from paceline.target.head import TargetHead
from paceline.target.rope import rope_kind
from paceline.target.version import model_version

PREFIXES = (("model.", ""), ("layers.0.", "midlayer."))
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
EMBEDDING_ERROR_MAX = 0.01  # relative; an embedding in another dtype is still the target's


def sizes_from(start: StartConfig, head: TargetHead) -> dict[str, Any]:
    """The arguments of `Eagle3Config` but the layer ids. Raises ConfigError for sizes of another target."""
    _refuse_other_sizes(start, head)
    nested = start.rope.get("rope_parameters") or {}
    theta = nested.get("rope_theta") or start.rope.get("rope_theta") or 10000.0
    rope = {**start.rope, "max_position_embeddings": start.sizes["max_position_embeddings"]}
    scaling, kind = rope_scaling_of(rope), rope_kind(rope)
    if scaling is None and kind != "default":
        raise refused(start.folder, f"its rotary embedding is of the kind {kind!r}", "Its frequencies vary.")
    positions = max(start.sizes["max_position_embeddings"], head.config.get("max_position_embeddings") or 0)
    return {
        **start.sizes,
        "max_position_embeddings": positions,
        "rope_theta": float(theta),
        "rope_scaling": scaling,
    }


WHY_NOT_ANOTHERS = "Its features, tokens and logits are another model's."


def _refuse_other_sizes(start: StartConfig, head: TargetHead) -> None:
    found = {
        "hidden size": (start.sizes["hidden_size"], head.hidden_size),
        "target's hidden size": (start.target_hidden_size, head.hidden_size),
        "vocabulary": (start.sizes["vocab_size"], head.vocab_size),
    }
    for what, (theirs, ours) in found.items():
        if theirs != ours:
            raise refused(start.folder, f"its {what} is {theirs}, the target's is {ours}", WHY_NOT_ANOTHERS)


def refuse_other_target(start: StartConfig, head: TargetHead) -> None:
    """Raise ConfigError if the folder names another target, by its digest or else by its name."""
    why = WHY_NOT_ANOTHERS
    if head.folder is None:
        return
    if start.target_version:
        if start.target_version != (ours := model_version(head.folder)):
            digests = f"the target of the digest {start.target_version}, and this one has {ours}"
            raise refused(start.folder, f"it was trained for {digests}", why)
    elif start.target_name and _last(start.target_name) not in _names(head):
        named = f"{start.target_name}, and the target's folder is {head.folder}"
        raise refused(
            start.folder, f"it was trained for {named}", f"{why} A link of that name mends a false alarm."
        )


def _names(head: TargetHead) -> set[str]:
    assert head.folder is not None
    return {_last(str(head.folder)), _last(str(head.folder.resolve())), *_cached(str(head.folder.resolve()))}


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _cached(path: str) -> list[str]:
    """The model's name in the path of the hub's cache."""
    return [part.rpartition("--")[2].lower() for part in path.split("/") if part.startswith("models--")]


def start_tensors(start: StartConfig, head: TargetHead) -> dict[str, torch.Tensor]:
    """The draft's state dict from the folder. Raises ConfigError for missing, surplus or unfit tensors."""
    files = TensorFiles(start.folder)
    raw = {_short(name): tensor for name, tensor in files.read(sorted(files.shard_of)).items()}
    _refuse_other_embedding(start, head, raw.pop(EMBEDDING, None))
    size, vocab = start.sizes["draft_vocab_size"], start.sizes["vocab_size"]
    ids = _target_ids(start, raw.pop("d2t", None), size, vocab)
    d2t, t2d = vocab_maps(ids, vocab)
    given = raw.pop("t2d", None)
    if given is not None and size < vocab and not torch.equal(given.bool(), t2d):
        raise refused(start.folder, "its d2t and t2d name different tokens", "The vocabulary maps are kept.")
    if HEAD not in raw:
        raw[HEAD] = head.lm_head[ids]  # servers take the target's own
    exact = {name: tensor.float() for name, tensor in raw.items()}
    broken = [name for name, tensor in exact.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise refused(start.folder, f"{broken[0]} is not finite", "Nothing can be trained from there.")
    return {**exact, "d2t": d2t, "t2d": t2d}


def refuse_unfit(
    start: StartConfig, tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> None:
    """Raise ConfigError unless names and shapes are those of the draft's state dict `wanted`."""
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in wanted]
    wrong += [
        f"{name} has the shape {tuple(tensors[name].shape)}, not {tuple(like.shape)}"
        for name, like in wanted.items()
        if name in tensors and tensors[name].shape != like.shape
    ]
    if wrong:
        raise refused(start.folder, "; ".join(wrong), "Every weight of the draft comes from the folder.")


def _short(name: str) -> str:
    for prefix, other in PREFIXES:
        name = other + name.removeprefix(prefix) if name.startswith(prefix) else name
    return name


def _target_ids(start: StartConfig, d2t: torch.Tensor | None, size: int, vocab: int) -> torch.Tensor:
    """The target's id of every draft token, int64 [size]."""
    why = "d2t holds target ids less draft ids, one for each draft token."
    if d2t is None:
        if size != vocab:
            raise refused(start.folder, f"it has {size} of {vocab} tokens and no d2t", why)
        return torch.arange(vocab)
    if tuple(d2t.shape) != (size,) or d2t.is_floating_point():
        raise refused(start.folder, f"its d2t is {d2t.dtype} of the shape {tuple(d2t.shape)}", why)
    ids = torch.arange(size) + d2t.long()
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or ids.unique().numel() != size:
        raise refused(start.folder, "its d2t leads outside the vocabulary, or twice to one token", why)
    return ids


def _refuse_other_embedding(start: StartConfig, head: TargetHead, embedding: torch.Tensor | None) -> None:
    if embedding is None:
        return
    why = "The draft here reads the target's embedding, so it would read other tokens than before."
    if embedding.shape != head.embed_tokens.shape:
        raise refused(start.folder, f"its embedding has the shape {tuple(embedding.shape)}", why)
    ours = head.embed_tokens.float()
    if float((embedding.float() - ours).norm()) > EMBEDDING_ERROR_MAX * float(ours.norm()):
        raise refused(start.folder, "its embedding is not the target's", why)
