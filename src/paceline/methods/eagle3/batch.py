"""One micro-batch of EAGLE-3: packed samples, and every index that the loss needs.

All indices are built here on the CPU, where lengths and masks are known. On a device, an index that depends
on data would make the host wait in every unrolled step.

A row is a token that the target processed: every token of a sample but the last. Row i holds the feature of
token i and the embedding of token i+1, and predicts token i+2. It is an *anchor* if the draft learns to
predict token i+2, for which the target's distribution (row i+1) was captured. Step k of an anchor is fed
token i+1+k and predicts token i+2+k; its target is row i+1+k.

Legend: R rows of all samples, A anchors of all samples, S unrolled steps, M rows whose distributions are
captured, H hidden, J judged anchors (those in the acceptance estimate), U rows that they are judged by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from paceline.methods.eagle3.attention import Layout, Tile, tiles_of
from paceline.methods.packed import Group, on_device
from paceline.methods.targets import counted_rows

# The acceptance estimate needs the target's argmax over its whole vocabulary, which costs several times the
# draft's own logits. So only one anchor in this many is judged; neighbours, because their rows overlap.
JUDGED_SHARE = 16


@dataclass(frozen=True)
class Unrolling:
    """How the method unrolls: `steps` S, the weight `step_decay` ** k of step k, how many anchors go
    through lm_head at a time, `judged_share`: one anchor in this many is judged for the estimate, and how
    far a row sees (`window`)."""

    steps: int
    step_decay: float
    group_anchors: int = 1 << 30
    judged_share: int = JUDGED_SHARE
    window: int | None = None


@dataclass(frozen=True)
class Eagle3Batch:
    """Packed samples; all tensors on one device, all slices and counts known on the host."""

    following: torch.Tensor  # int64 [R]: the token after each row's own
    aux_hidden_states: torch.Tensor  # target dtype [R, 3H]
    last_hidden_states: torch.Tensor  # target dtype [M, H], pre-norm
    positions: torch.Tensor  # int64 [R]: of the row in its sample
    anchors: torch.Tensor  # int64 [A]: rows, ascending
    places: torch.Tensor  # int64 [A]: of the anchor's row in its sample
    fed: torch.Tensor  # int64 [S, A]: token ids
    picked: torch.Tensor  # int64 [S, A]: of the M rows; 0 where nothing is counted
    scale: torch.Tensor  # float32 [S, A]: weight of each prediction; 0 where it is not counted
    judged: torch.Tensor  # int64 [J]: of the A anchors
    judged_rows: torch.Tensor  # int64 [U]: of the M rows
    judged_picks: torch.Tensor  # int64 [S, J]: of the U rows
    tiles: tuple[Tile, ...]
    groups: tuple[Group, ...]
    window: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.anchors.shape[0]

    @property
    def layout(self) -> Layout:
        return Layout(self.positions, self.places, self.tiles, self.window)

    def to(self, device: torch.device) -> Eagle3Batch:
        """The batch on `device`; copies to a CUDA device overlap with its work."""
        return on_device(self, device)


def collate(samples: Sequence[Mapping[str, torch.Tensor]], unrolling: Unrolling) -> Eagle3Batch:
    """Pack samples (input_ids, loss_mask, aux_ and last_hidden_states) into one batch on the CPU."""
    lengths = [int(sample["input_ids"].numel()) - 1 for sample in samples]
    counted_of = [counted_rows(sample["loss_mask"]) for sample in samples]
    # Row i is an anchor if row i+1, whose target distribution it predicts, counts.
    anchors_of = [rows[1:].nonzero().squeeze(1) for rows in counted_of]
    widths = torch.tensor([rows.numel() for rows in anchors_of])
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    places, counted = torch.cat(anchors_of), torch.cat(counted_of)
    anchors = places + starts.repeat_interleave(widths)
    final = (ends - 1).repeat_interleave(widths)
    following = torch.cat([sample["input_ids"][1:] for sample in samples]).long()

    ahead = anchors + torch.arange(unrolling.steps)[:, None]  # [S, A]: the row whose next token is fed
    predicted = torch.minimum(ahead + 1, final)
    is_counted = (ahead < final) & counted[predicted]
    picked = (counted.cumsum(0) - 1)[predicted] * is_counted
    decay = unrolling.step_decay ** torch.arange(unrolling.steps, dtype=torch.float64)
    judged = _judged(anchors_of, counted_of, unrolling.judged_share)
    judged_rows, judged_picks = torch.unique(picked[:, judged], return_inverse=True)
    return Eagle3Batch(
        following=following,
        aux_hidden_states=torch.cat([sample["aux_hidden_states"] for sample in samples]),
        last_hidden_states=torch.cat([sample["last_hidden_states"] for sample in samples]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        anchors=anchors,
        places=places,
        fed=following[torch.minimum(ahead, final)],
        picked=picked,
        scale=is_counted * decay.float()[:, None],
        judged=judged,
        judged_rows=judged_rows,
        judged_picks=judged_picks,
        tiles=tiles_of(anchors_of, lengths, unrolling.window),
        groups=_groups(picked, is_counted, unrolling.group_anchors),
        window=unrolling.window,
    )


def _judged(
    anchors_of: Sequence[torch.Tensor], counted_of: Sequence[torch.Tensor], share: int
) -> torch.Tensor:
    """The judged anchors, int64 [J]: a stretch of each sample that does not depend on the packing.

    The anchor before an answer's first token is never judged: the prefill gives that token, not the draft.
    """
    parts, start = [], 0
    for places, counted in zip(anchors_of, counted_of, strict=True):
        asked = counted[places].nonzero().squeeze(1)
        count = -(-asked.numel() // share)
        # The place varies with the sample, so that early tokens are not judged more often than late ones.
        first = int(places.sum()) * 7919 % (asked.numel() - count + 1)
        parts.append(start + asked[first : first + count])
        start += places.numel()
    return torch.cat(parts)


def _groups(picked: torch.Tensor, is_counted: torch.Tensor, size: int) -> tuple[Group, ...]:
    groups = []
    for start in range(0, picked.shape[1], size):
        anchors = slice(start, min(start + size, picked.shape[1]))
        rows = picked[:, anchors][is_counted[:, anchors]]
        groups.append(Group(anchors, slice(int(rows.min()), int(rows.max()) + 1)))
    return tuple(groups)
