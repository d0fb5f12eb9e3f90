"""The tensors of the draft that a run starts from, and whether they are for this target."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from paceline.methods.rope import rope_scaling_of
from paceline.methods.start.folder import StartFolder
from paceline.parts import first_rows, joined
from paceline.target.folder import TensorFiles
from paceline.target.head import TargetHead
from paceline.target.rope import rope_kind
from paceline.target.version import model_version

ROWS_ERROR_MAX = 0.01  # relative; rows in another dtype are still the target's
WHY_NOT_ANOTHERS = "Its features, tokens and logits are another model's."
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


def sizes_for(start: StartFolder, sizes: Mapping[str, Any], head: TargetHead) -> dict[str, Any]:
    """`sizes` (folder.py) with positions and rotary embedding. Raises ConfigError for another target's."""
    _refuse_other_sizes(start, sizes, head)
    with start.reading():
        rope = {key: start.decoder[key] for key in ROPE if key in start.decoder}
        nested = rope.get("rope_parameters") or {}
        theta = float(nested.get("rope_theta") or rope.get("rope_theta") or 10000.0)
        rope["max_position_embeddings"] = sizes["max_position_embeddings"]
        scaling, kind = rope_scaling_of(rope), rope_kind(rope)
    if scaling is None and kind != "default":
        raise start.refused(f"its rotary embedding is of the kind {kind!r}", "Its frequencies vary.")
    positions = max(sizes["max_position_embeddings"], head.config.get("max_position_embeddings") or 0)
    return {**sizes, "max_position_embeddings": positions, "rope_theta": theta, "rope_scaling": scaling}


def _refuse_other_sizes(start: StartFolder, sizes: Mapping[str, Any], head: TargetHead) -> None:
    found = {
        "hidden size": (sizes["hidden_size"], head.hidden_size),
        "target's hidden size": (
            start.config.get("target_hidden_size") or sizes["hidden_size"],
            head.hidden_size,
        ),
        "vocabulary": (sizes["vocab_size"], head.vocab_size),
    }
    for what, (theirs, ours) in found.items():
        if theirs != ours:
            raise start.refused(f"its {what} is {theirs}, the target's is {ours}", WHY_NOT_ANOTHERS)


def refuse_other_target(start: StartFolder, head: TargetHead) -> None:
    """Raise ConfigError if the folder names another target, by its digest or else by its name."""
    if head.folder is None:
        return
    if start.target_version:
        if start.target_version != (ours := model_version(head.folder)):
            digests = f"the target of the digest {start.target_version}, and this one has {ours}"
            raise start.refused(f"it was trained for {digests}", WHY_NOT_ANOTHERS)
    elif start.target_name and _last(start.target_name) not in _names(head):
        named = f"{start.target_name}, and the target's folder is {head.folder}"
        why = f"{WHY_NOT_ANOTHERS} A link of that name mends a false alarm."
        raise start.refused(f"it was trained for {named}", why)


def _names(head: TargetHead) -> set[str]:
    assert head.folder is not None
    return {_last(str(head.folder)), _last(str(head.folder.resolve())), *_cached(str(head.folder.resolve()))}


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _cached(path: str) -> list[str]:
    """The model's name in the path of the hub's cache."""
    return [part.rpartition("--")[2].lower() for part in path.split("/") if part.startswith("models--")]


def stored_tensors(start: StartFolder) -> dict[str, torch.Tensor]:
    """Every tensor of the folder, as stored. Raises ConfigError if the files cannot be read."""
    if not start.is_checkpoint:
        files = TensorFiles(start.path)
        return files.read(sorted(files.shard_of))
    why = "A checkpoint's manifest holds the digest of its draft."
    parts = []
    for name, sha256 in start.drafts:
        try:
            data = (start.path / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise start.refused(f"its {name} does not match its manifest", why)
            parts.append((dict(load(data)), first_rows(data)))
        except (OSError, SafetensorError) as error:
            raise start.refused(f"its {name} cannot be read ({error})", why) from error
    return joined(parts)


def exact(start: StartFolder, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in float32. Raises ConfigError for one that is not finite."""
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise start.refused(f"{broken[0]} is not finite", "Nothing can be trained from there.")
    return weights


def refuse_other_rows(start: StartFolder, what: str, rows: torch.Tensor | None, ours: torch.Tensor) -> None:
    """Raise ConfigError unless `rows` [V, H], if the folder carries them, are the target's."""
    if rows is None:
        return
    why = f"The draft here reads the target's {what}, so its first outputs would be others than the folder's."
    if rows.shape != ours.shape:
        raise start.refused(f"its {what} has the shape {tuple(rows.shape)}", why)
    mine = ours.float()
    if not float((rows.float() - mine).norm()) <= ROWS_ERROR_MAX * float(mine.norm()):
        raise start.refused(f"its {what} is not the target's", why)


def refuse_unfit(
    start: StartFolder, tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
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
        raise start.refused("; ".join(wrong), "Every weight of the draft comes from the folder.")
