"""One micro-batch of blocks: packed samples, and every index that the loss needs.

All indices are built here on the CPU, where lengths and masks are known, so that the loss never makes the
host wait for a device.

A row is a token that the target processed: every token of a sample but the last. An *anchor* is an answer's
token after which the draft learns to go on: token p and token p + 1 are both targets. Its block is fed
token p and mask tokens; its guess at depth j = 1..D is token p + j, whose distribution is the target's in
row p + j - 1. It sees the features of the rows before p: the target has not processed token p when a
decoder drafts after it.

Legend: R rows of all samples, A anchors of all samples, B places of a block, D guesses of a block, M rows
whose distributions are captured, U of them that guesses of a group are compared with, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from paceline.methods.dflash.attention import Layout, Tile, tiles_of
from paceline.methods.packed import Group, on_device
from paceline.methods.targets import counted_rows
from paceline.methods.visits import ANCHORS, generator_of


@dataclass(frozen=True)
class Blocks:
    """Blocks of `size` places that guess `depths` tokens; see `Layout` for `causal` and `compiled`. At most
    `anchors_max` of a sample; about `group_guesses` guesses go through the output layer at a time."""

    size: int
    depths: int
    causal: bool = False
    anchors_max: int = 1 << 30
    group_guesses: int = 1 << 30
    compiled: bool = True


@dataclass(frozen=True)
class DFlashBatch:
    """Packed samples; all tensors on one device, all slices and counts known on the host."""

    aux_hidden_states: torch.Tensor  # target dtype [R, n * H]
    last_hidden_states: torch.Tensor  # target dtype [M, H], pre-norm
    positions: torch.Tensor  # int64 [R]: of the row in its sample
    samples: torch.Tensor  # int64 [R]: the number of the row's sample
    places: torch.Tensor  # int64 [A]: of the anchor's token in its sample
    owners: torch.Tensor  # int64 [A]: the number of the anchor's sample
    tokens: torch.Tensor  # int64 [A]: the anchors' token ids
    previous: torch.Tensor  # int64 [D, A]: the token before each guessed one
    rows: torch.Tensor  # int64 [U]: of the M rows, group by group, those that its guesses are compared with
    picked: torch.Tensor  # int64 [D, A]: of the group's part of `rows`; 0 where nothing is counted
    counted: torch.Tensor  # float32 [D, A]: 1 for a guess that counts, else 0
    tiles: tuple[Tile, ...]
    groups: tuple[Group, ...]
    blocks: Blocks

    @property
    def num_tokens(self) -> int:
        return self.places.shape[0]

    @property
    def layout(self) -> Layout:
        parts = self.positions, self.samples, self.places, self.owners
        return Layout(self.blocks.size, self.blocks.causal, *parts, self.tiles, self.blocks.compiled)

    def to(self, device: torch.device) -> DFlashBatch:
        """The batch on `device`; copies to a CUDA device overlap with its work."""
        return on_device(self, device)


def anchors_of(sample: Mapping[str, torch.Tensor], most: int, visit: int | None = None) -> torch.Tensor:
    """The places of a sample's anchors, int64 [a], ascending; at most `most`, others at every `visit`."""
    target = sample["loss_mask"].bool()
    # Token 0 has no row before it, so its block would see nothing.
    places = (target[1:-1] & target[2:]).nonzero().squeeze(1) + 1
    if places.numel() <= most:
        return places
    generator = generator_of(sample["input_ids"].long(), visit, ANCHORS)
    order = torch.randperm(places.numel(), generator=generator)
    return places[order[:most].sort().values]


def collate(
    samples: Sequence[Mapping[str, torch.Tensor]], blocks: Blocks, visit: int | None = None
) -> DFlashBatch:
    """Pack samples (input_ids, loss_mask, aux_ and last_hidden_states) into one batch on the CPU."""
    lengths = [int(sample["input_ids"].numel()) - 1 for sample in samples]
    anchors = [anchors_of(sample, blocks.anchors_max, visit) for sample in samples]
    counted = torch.cat([counted_rows(sample["loss_mask"]) for sample in samples])
    numbers, widths = torch.arange(len(samples)), torch.tensor([a.numel() for a in anchors])
    ends = torch.tensor(lengths).cumsum(0)
    owners, places = numbers.repeat_interleave(widths), torch.cat(anchors)
    starts, final = (ends - torch.tensor(lengths))[owners], ends[owners] - 1

    depths = torch.arange(blocks.depths)[:, None]  # depth j less 1
    ahead = starts + places + depths  # [D, A]: the row whose next token is guessed, if it is in the sample
    inside = torch.minimum(ahead, final)
    is_counted = (ahead <= final) & counted[inside]
    tokens = torch.cat([sample["input_ids"][:-1] for sample in samples]).long()
    rows, picked, groups = _compared((counted.cumsum(0) - 1)[inside], is_counted, blocks)
    return DFlashBatch(
        aux_hidden_states=torch.cat([sample["aux_hidden_states"] for sample in samples]),
        last_hidden_states=torch.cat([sample["last_hidden_states"] for sample in samples]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        samples=numbers.repeat_interleave(torch.tensor(lengths)),
        places=places,
        owners=owners,
        tokens=tokens[starts + places],
        previous=tokens[inside],
        rows=rows,
        picked=picked,
        counted=is_counted.float(),
        tiles=tiles_of(anchors, lengths),
        groups=groups,
        blocks=blocks,
    )


def _compared(
    wanted: torch.Tensor, is_counted: torch.Tensor, blocks: Blocks
) -> tuple[torch.Tensor, torch.Tensor, tuple[Group, ...]]:
    """(rows, picked, groups) of a batch, from the target row `wanted` int64 [D, A] of each guess.

    A group holds the distributions of the rows that it needs, however far apart its anchors lie.
    """
    parts: list[torch.Tensor] = []
    groups, picked, first = [], torch.zeros_like(wanted), 0
    size = max(1, blocks.group_guesses // blocks.depths)
    for start in range(0, wanted.shape[1], size):
        anchors = slice(start, min(start + size, wanted.shape[1]))
        own, places = wanted[:, anchors][is_counted[:, anchors]].unique(return_inverse=True)
        picked[:, anchors][is_counted[:, anchors]] = places
        groups.append(Group(anchors, slice(first, first + own.numel())))
        parts.append(own)
        first += own.numel()
    return torch.cat(parts) if parts else wanted.new_zeros(0), picked, tuple(groups)
