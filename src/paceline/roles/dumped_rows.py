"""Dumped rows for the self-check of an export: target states, and the trainer's guesses from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from paceline.config.run import RunConfig
from paceline.engines.engine import CaptureRequest
from paceline.engines.served.probe import why_no_reference
from paceline.engines.transformers import TransformersEngine
from paceline.errors import ConfigError, EngineError, is_want_of_memory
from paceline.exports.reader.replay import Chain, Replay
from paceline.methods.drafter import Drafter
from paceline.roles.held_out import held_out_prompts
from paceline.target.head import TargetHead
from paceline.types import Feature, States, Tokens

PROMPTS, ANSWER, PROMPT_MAX = 3, 24, 96  # prompts, and tokens of each answer and each prompt
GUESSES = 3  # in a chain


def dump(config: RunConfig, head: TargetHead, drafter: Drafter, date: str | None) -> tuple[list[Replay], str]:
    """(replays, what was dumped). Held-out prompts through the target; else seeded random states.

    Random states serve where the target does not fit into memory or the engine cannot run it. States lie at
    the draft's layers and at their neighbours, so that a reader whose layer ids are one off reads others.
    """
    layers = _neighbours(drafter.layers, head.num_hidden_layers)
    sequences = _captured_if_possible(config, head, layers, date)
    told = f"rows of {len(sequences)} held-out prompts and their answers by the target"
    if not sequences:
        sequences, told = _random(head, layers), "rows of random states"
    return [_replay(drafter, tokens, states) for tokens, states in sequences], told


def _neighbours(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    near = {layer + step for layer in layers for step in (-1, 0, 1)}
    return tuple(sorted(near & set(range(num_layers + 1))))


Sequences = list[tuple[torch.Tensor, Mapping[int, torch.Tensor]]]


def _captured_if_possible(
    config: RunConfig, head: TargetHead, layers: tuple[int, ...], date: str | None
) -> Sequences:
    """Empty if the target cannot be run here."""
    try:
        fits = not why_no_reference(config.target.model)
        return _captured(config, head, layers, date) if fits else []
    except Exception as error:
        if isinstance(error, (ConfigError, EngineError)) or is_want_of_memory(error):
            return []
        raise


def _captured(config: RunConfig, head: TargetHead, layers: tuple[int, ...], date: str | None) -> Sequences:
    engine = TransformersEngine(
        config.target.model,
        dtype=config.target.dtype,
        device=config.evaluation.device,
        date=date,
        template=config.target.template,
    )
    positions = head.config.get("max_position_embeddings")
    prompts = held_out_prompts(config, engine, head.vocab_size, positions).prompts
    short = sorted(prompts, key=len)[:PROMPTS]
    dtype = engine.facts.dtype
    wanted = [Feature("tokens", Tokens(), dtype="int32"), Feature("states", States(layers), dtype=dtype)]
    requests = [
        CaptureRequest(f"dump-{n}", ids[-PROMPT_MAX:], max_new_tokens=ANSWER) for n, ids in enumerate(short)
    ]
    hidden = head.hidden_size
    return [
        (
            sample.tensors["tokens"].long().cpu(),
            {k: sample.tensors["states"][:, i * hidden :][:, :hidden].cpu() for i, k in enumerate(layers)},
        )
        for sample in engine.capture(requests, wanted)
    ]


def _random(head: TargetHead, layers: tuple[int, ...]) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    found: Sequences = []
    for rows in (12, 31):
        tokens = torch.randint(head.vocab_size, (rows + 1,), generator=generator)
        states = {k: torch.randn(rows, head.hidden_size, generator=generator) for k in layers}
        found.append((tokens, states))
    return found


def _replay(drafter: Drafter, tokens: torch.Tensor, states: Mapping[int, torch.Tensor]) -> Replay:
    """The sequence with chains of the drafter after its beginning, its middle and its end."""
    rows = len(tokens) - 1
    aux = torch.cat([states[layer].float() for layer in drafter.layers], dim=-1)
    drafter.start(rows + GUESSES)
    chains: list[Chain] = []
    done = 0
    for cut in sorted({max(1, rows // 2), max(1, rows // 2 + 1), max(1, rows - 4), rows}):
        seen: list[torch.Tensor] = []

        def choose(logits: torch.Tensor, seen: list[torch.Tensor] = seen) -> tuple[int, None]:
            seen.append(logits.float().clone())
            return int(logits.argmax()), None

        guesses, _ = drafter.propose(aux[done:cut], tokens[done + 1 : cut + 1], GUESSES, choose)
        chains.append(Chain(cut, torch.stack(seen), tuple(guesses)))
        done = cut
    return Replay(tokens, states, tuple(chains))
