"""A block draft's first weights in closed form, from a run's first samples.

From noise a block draft needs thousands of steps before it guesses anything, because all that it knows of the
text passes through attention. Here the first layer attends by construction: in every group of query heads one
looks at the nearest row of the context and one at the block's anchor, and a ridge regression turns what they
read into the direction of the target's next final state. Everything else begins at zero or small. All of it
is trained. The same samples, head and seed give the same bits on the same machine.

How a head finds its key: keys read two numbers, `near` and `mask`. An anchor's embedding has -1 and 0, the
mask token's 0 and 1, and `fc` gives every row of the context a constant part with `near` positive. Queries
are the same for all places. Rotation does the rest: a ramp of frequencies makes the nearest row win.

Legend: R rows, n states, H hidden, V vocabulary, N_kv key-value heads, d head_dim, r = rank of the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from paceline.methods.dflash.attention import Attend, KeyValue, attention_over
from paceline.methods.dflash.batch import Blocks, DFlashBatch, collate
from paceline.methods.dflash.model import DFlashDraft, Layer
from paceline.methods.targets import direction
from paceline.target.head import TargetHead

_RIDGE = 0.03  # relative to each input's own square
# A regressed direction is less certain than a unit length says; this scales the first logits down.
_CONFIDENCE = 0.6
_FADE = 1.0  # places deeper by this weigh a factor e less in the regression
_SHARPNESS = 6.0  # of the queries: their norm's weight
_RAMP = (0.001, 0.2)  # radians a row: the frequencies by which a query tells near from far
_PHASE = 0.7
_CONTENT = 0.3  # the share of a key that tells context from block, at frequencies that hardly turn
_CONSTANT = 0.3  # the size of a row's constant part, relative to what is read of it
_SIZE = 0.02  # of an element of `fc`
_SAMPLES_AT_A_TIME = 8


@torch.no_grad()
def warm_start(draft: DFlashDraft, head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Overwrite weights of `draft` in place. `samples` hold the tensors of the method's features."""
    batches = [
        collate(samples[start : start + _SAMPLES_AT_A_TIME], _blocks_of(draft))
        for start in range(0, len(samples), _SAMPLES_AT_A_TIME)
    ]
    batches = [batch for batch in batches if batch.num_tokens]
    if not batches:
        return
    for layer in draft.layers:
        assert isinstance(layer, Layer)
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    draft.norm.weight.copy_(head.norm_weight.float() * _CONFIDENCE)
    near, mask = _readers(draft, batches)
    _write_reading(draft, batches, near, mask)
    _write_focus(draft, near, mask)
    _write_outputs(draft, batches)


def _blocks_of(draft: DFlashDraft) -> Blocks:
    config, section = draft.config, draft.section
    return Blocks(config.block_size, config.depths, config.causal, section.anchors_max)


def _readers(draft: DFlashDraft, batches: Sequence[DFlashBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    """(near, mask) [H]: of an anchor's embedding they read about -1 and 0, of the mask token's 0 and 1."""
    anchors = direction(draft.embed(torch.cat([batch.tokens for batch in batches])))
    own = direction(draft.embed(torch.tensor([draft.config.mask_token_id])))
    inputs = torch.cat((anchors, own * anchors.shape[0] ** 0.5))
    wanted = torch.zeros(inputs.shape[0], 2)
    wanted[:-1, 0], wanted[-1, 1] = -1.0, anchors.shape[0] ** 0.5
    near, mask = _ridge(inputs, wanted).unbind(1)
    return near, mask


def _write_reading(
    draft: DFlashDraft, batches: Sequence[DFlashBatch], near: torch.Tensor, mask: torch.Tensor
) -> None:
    """`fc` and the first layer's values: what of a row and of an anchor tells most about the next token."""
    config, attention = draft.config, _first(draft).self_attn
    width, hidden = draft.fc.weight.shape[1], config.hidden_size
    rank = min(hidden - 2, config.num_key_value_heads * config.head_dim)
    inputs, wanted = [], []
    for batch in batches:
        states = batch.aux_hidden_states[_starts(batch) + batch.places - 1].float()
        inputs.append(torch.cat((states, direction(draft.embed(batch.tokens))), dim=-1))
        wanted.append(direction(batch.last_hidden_states[batch.rows[batch.picked[0]]].float()))
    ones = torch.ones(sum(part.shape[0] for part in wanted), 1)
    solved = _ridge(torch.cat(inputs), torch.cat((torch.cat(wanted), ones), dim=1))
    of_rows, of_anchor, always = solved[:width, :-1], solved[width:, :-1], solved[:width, -1]
    taken = torch.linalg.qr(torch.stack((mask, near), dim=1))[0]  # what the keys read
    beside = torch.eye(hidden) - taken @ taken.T
    read = torch.linalg.svd(beside @ of_anchor)[0][:, :rank]  # [H, r]: directions of an embedding
    told, sizes, _ = torch.linalg.svd(of_rows, full_matrices=False)
    told = told[:, :rank] * sizes[:rank]  # [n * H, r]
    attention.v_proj.weight.zero_()
    attention.v_proj.weight[:rank] = read.T
    size = torch.cat(inputs)[:, :width] @ told
    draft.fc.weight.copy_((told @ read.T).T)
    # Of the rest, what `near` reads and `mask` does not.
    constant = taken[:, 1] * (taken[:, 1] @ near).sign() * size.square().sum(-1).mean().sqrt() * _CONSTANT
    draft.fc.weight.add_(torch.outer(constant, always))
    # The norm after it makes every size the same; this one suits Adam's equal steps.
    draft.fc.weight.mul_(_SIZE / draft.fc.weight.square().mean().sqrt())


def _write_focus(draft: DFlashDraft, near: torch.Tensor, mask: torch.Tensor) -> None:
    """Queries and keys of the first layer; see above."""
    config, attention = draft.config, _first(draft).self_attn
    half, group = config.head_dim // 2, attention.heads // attention.kv_heads
    turns = draft.rope.frequencies()
    ramp = (turns >= _RAMP[0]) & (turns <= _RAMP[1])
    ramp = ramp if bool(ramp.any()) else turns <= turns.median()
    still = turns < turns[ramp].min()
    still = still if bool(still.any()) else turns == turns.min()
    key, far, own = (torch.zeros(2, half) for _ in range(3))
    key[0, still], key[0, ramp] = (_CONTENT / still.sum()).sqrt(), ((1 - _CONTENT) / ramp.sum()).sqrt()
    far[0, ramp], far[1, ramp] = torch.tensor(_PHASE).cos(), torch.tensor(_PHASE).sin()
    own[0, still] = -1.0
    of_mask = torch.zeros(2, half)
    of_mask[1, still] = (1.0 / still.sum()).sqrt()
    # A place holds either the mask token or the anchor; both read as positive here.
    either = mask - near
    keys = torch.outer(key.flatten(), near) + torch.outer(of_mask.flatten(), mask)
    # One more in a group looks at the anchor from the first places, and at mask tokens from the last.
    middle = (turns[ramp] * (config.depths + 1) / 2 + _PHASE).cos().mean() * (1 - _CONTENT) ** 0.5
    turning = of_mask * middle - far / ramp.sum().sqrt()
    kinds = [far, own, turning]
    for number in range(attention.heads):
        kind = kinds[(number if group == 1 else number % group) % (2 if group < 3 else 3)]
        rows = slice(number * config.head_dim, (number + 1) * config.head_dim)
        attention.q_proj.weight[rows] = torch.outer(kind.flatten(), either)
    attention.k_proj.weight.copy_(keys.repeat(attention.kv_heads, 1))
    attention.q_norm.weight.fill_(_SHARPNESS)


def _write_outputs(draft: DFlashDraft, batches: Sequence[DFlashBatch]) -> None:
    """`o_proj` of the first layer, by what its attention really reads."""
    config, first = draft.config, _first(draft)
    width = first.self_attn.o_proj.weight.shape[1]
    gram, moment = torch.zeros(width, width), torch.zeros(width, config.hidden_size)
    for batch in batches:
        kept: list[torch.Tensor] = []
        attend = attention_over(batch.layout)

        def keeping(
            query: torch.Tensor,
            context: KeyValue,
            own: KeyValue,
            attend: Attend = attend,
            kept: list[torch.Tensor] = kept,
        ) -> torch.Tensor:
            mixed = attend(query, context, own)
            kept.append(mixed[0].transpose(0, 1).flatten(1))
            return mixed

        context = draft.context(batch.aux_hidden_states, batch.positions)
        draft.places(batch.tokens, batch.places, context, keeping)
        slots = (
            kept[0].view(-1, config.block_size, width)[:, config.block_size - config.depths :].transpose(0, 1)
        )
        weights = batch.counted * (-torch.arange(config.depths) / _FADE).exp()[:, None]
        wanted = direction(batch.last_hidden_states[batch.rows[batch.picked]].float())
        base = draft.embed(torch.tensor(config.mask_token_id))
        scaled = slots * weights[..., None]
        gram += scaled.flatten(0, 1).T @ slots.flatten(0, 1)
        moment += scaled.flatten(0, 1).T @ (wanted - base).flatten(0, 1)
    first.self_attn.o_proj.weight.copy_(_solved(gram, moment).T)


def _ridge(inputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """[inputs, wanted] of rows [R, inputs] and [R, wanted]."""
    return _solved(inputs.T @ inputs, inputs.T @ wanted)


def _solved(gram: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Every input is scaled to unit size, so that one ridge suits all."""
    scale = gram.diagonal().clamp_min(1e-12).sqrt()
    scaled = gram / scale[:, None] / scale
    scaled.diagonal().add_(_RIDGE)
    solution: torch.Tensor = torch.linalg.solve(scaled, moment / scale[:, None])
    return solution / scale[:, None]


def _starts(batch: DFlashBatch) -> torch.Tensor:
    """int64 [A]: the first row of each anchor's sample."""
    lengths = torch.bincount(batch.samples, minlength=int(batch.owners.max()) + 1)
    return (lengths.cumsum(0) - lengths)[batch.owners]


def _first(draft: DFlashDraft) -> Layer:
    layer = draft.layers[0]
    assert isinstance(layer, Layer)
    return layer
