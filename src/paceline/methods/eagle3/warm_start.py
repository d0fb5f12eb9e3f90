"""A draft's first weights in closed form, from a run's first samples.

Ridge regression predicts the direction of the target's next final state from the inputs of row i: the
auxiliary states of token i and the normalised embedding of token i+1. The map is then written into the
draft. Its state half becomes `fc`, the residual stream; its embedding half, cut to the rank of the value
heads, goes through one query head per key-value head that attends to its own row. Everything else starts
at zero or small, so the untrained draft *is* the regression: two seconds of regression replace hundreds of
optimizer steps from noise. The same samples, head and seed give the same bits on the same machine.

Legend: R rows, H hidden, N_kv key-value heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from paceline.methods.eagle3.model import Eagle3Draft
from paceline.methods.targets import counted_rows
from paceline.target.head import TargetHead

_RIDGE = 1000.0
# Squared scale of the shared query and key projection: self-attention scores of about 8 times this.
_FOCUS = 2.0
# A regressed direction is less certain than a unit length says; this scales the first logits down.
_CONFIDENCE = 0.6


def warm_start(
    draft: Eagle3Draft, head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]], seed: int
) -> None:
    """Overwrite the weights of `draft` in place. `samples` hold the tensors of EAGLE-3's features."""
    hidden = draft.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    layer, attention = draft.midlayer, draft.midlayer.self_attn
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
        regression = _regress(draft, head, samples)
        state_part, embedding_part = regression[:-hidden], regression[-hidden:]
        for linear in (attention.q_proj, attention.k_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.normal_(0.0, 0.02, generator=generator)
        for linear in (attention.v_proj, attention.o_proj, layer.mlp.down_proj):
            linear.weight.zero_()
        draft.fc.weight.copy_(state_part.T)
        draft.lm_head.weight.copy_(draft.target_output.rows)
        draft.norm.weight.copy_(head.norm_weight.float() * _CONFIDENCE)
        _write_embedding_part(draft, embedding_part, generator)


def _regress(
    draft: Eagle3Draft, head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]]
) -> torch.Tensor:
    """Ridge map [4H, H] (or as many auxiliary states as there are) from what `draft` reads to directions."""
    width = int(samples[0]["aux_hidden_states"].shape[1]) + head.hidden_size
    gram, moment = torch.zeros(width, width), torch.zeros(width, head.hidden_size)
    num_rows = 0
    for sample in samples:
        ids = sample["input_ids"].long()
        # Row i learns from row i+1 if that row counts. No row learns from row 0.
        counted = counted_rows(sample["loss_mask"])
        rows, wanted = counted[1:].nonzero().squeeze(1), sample["last_hidden_states"][int(counted[0]) :]
        embedding = _direction(head.embed_tokens[ids[rows + 1]].float())
        inputs = torch.cat((draft.normed(sample["aux_hidden_states"][rows].float()), embedding), dim=-1)
        gram.addmm_(inputs.T, inputs)
        moment.addmm_(inputs.T, _direction(wanted.float()))
        num_rows += int(rows.numel())
    # Every input is scaled to unit size, so that one ridge suits states and embeddings.
    scale = (gram.diagonal() / max(1, num_rows)).sqrt() + 1e-6
    scaled = gram / scale.unsqueeze(0) / scale.unsqueeze(1)
    scaled.diagonal().add_(_RIDGE)
    solution: torch.Tensor = torch.linalg.solve(scaled, moment / scale.unsqueeze(1))
    return solution / scale.unsqueeze(1)


def _write_embedding_part(
    draft: Eagle3Draft, embedding_part: torch.Tensor, generator: torch.Generator
) -> None:
    """Write the best approximation of `embedding_part` [H, H] of rank N_kv * d into the attention weights."""
    attention, hidden = draft.midlayer.self_attn, draft.config.hidden_size
    kv_heads, head_dim = attention.kv_heads, attention.head_dim
    rank, group = min(hidden, kv_heads * head_dim), attention.heads // attention.kv_heads
    left, singular, right = torch.linalg.svd(embedding_part)
    read = (left[:, :rank] * singular[:rank].sqrt()).T  # [rank, H]
    write = right[:rank] * singular[:rank].sqrt().unsqueeze(1)  # [rank, H]
    attention.v_proj.weight[:rank, :hidden] = read
    for kv_head in range(kv_heads):
        # Equal query and key projections of the embedding: a row scores highest with itself.
        shared = torch.linalg.qr(torch.randn(hidden, head_dim, generator=generator))[0].T * _FOCUS**0.5
        values = slice(kv_head * head_dim, min(rank, (kv_head + 1) * head_dim))
        first_query = kv_head * group * head_dim
        queries = slice(first_query, first_query + head_dim)
        outputs = slice(first_query, first_query + values.stop - values.start)
        for projection, rows in (
            (attention.k_proj, slice(kv_head * head_dim, (kv_head + 1) * head_dim)),
            (attention.q_proj, queries),
        ):
            projection.weight[rows, :hidden] = shared
            projection.weight[rows, hidden:] = 0.0
        attention.o_proj.weight[:, outputs] = write[values].T


def _direction(states: torch.Tensor) -> torch.Tensor:
    """`states` [R, H] scaled to a root mean square of 1."""
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)
