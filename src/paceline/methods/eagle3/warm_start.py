"""A draft's first weights in closed form, from a run's first samples.

Ridge regression predicts the direction of the target's next final state from the inputs of row i: the
auxiliary states of token i and the normalised embedding of token i+1. The part of the states becomes `fc`,
the residual stream. What it lacks comes through attention, whose weights induction.py writes. Everything else
starts at zero or small, so the untrained draft *is* the regression: seconds of regression replace hundreds of
optimizer steps from noise. The same samples, head and seed give the same bits on the same machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from paceline.methods.eagle3.induction import write_attention
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.methods.eagle3.regression import Regression
from paceline.methods.targets import direction, wanted_directions
from paceline.target.head import TargetHead

_RIDGE = 1000.0
# A regressed direction is less certain than a unit length says; this scales the first logits down.
_CONFIDENCE = 0.6


@torch.no_grad()
def warm_start(
    draft: Eagle3Draft, head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]], seed: int
) -> None:
    """Overwrite the weights of `draft` in place. `samples` hold the tensors of EAGLE-3's features."""
    generator = torch.Generator().manual_seed(seed)
    layer, attention = draft.midlayer, draft.midlayer.self_attn
    for parameter in draft.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
    for linear in (attention.q_proj, attention.k_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
        linear.weight.normal_(0.0, 0.02, generator=generator)
    layer.mlp.down_proj.weight.zero_()
    draft.fc.weight.copy_(_of_states(draft, head, samples).T)
    draft.lm_head.weight.copy_(draft.target_output.rows)
    draft.norm.weight.copy_(head.norm_weight.float() * _CONFIDENCE)
    write_attention(draft, samples, generator)


def _of_states(
    draft: Eagle3Draft, head: TargetHead, samples: Sequence[Mapping[str, torch.Tensor]]
) -> torch.Tensor:
    """[nH, H]: of the map from all that `draft` reads to the wanted directions, the part of the n states."""
    width = int(samples[0]["aux_hidden_states"].shape[1])
    regression = Regression(width + head.hidden_size, head.hidden_size)
    for sample in samples:
        rows, wanted = wanted_directions(sample)
        embedding = direction(head.embed_tokens[sample["input_ids"].long()[rows + 1]].float())
        states = draft.normed(sample["aux_hidden_states"][rows].float())
        regression.add(torch.cat((states, embedding), dim=-1), wanted)
    return regression.solved(_RIDGE)[:width]
