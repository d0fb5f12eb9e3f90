"""Every producer of a run runs the same target: each captures one fixed prompt, and the numbers must agree.

The digest of the files says that the weights are the same; it cannot say that another machine, library or
kernel computes the same states with them. The first producer records some numbers of every state that the
run captures. A later one whose numbers differ by more than rounding is refused. If they differ at all, a
sample that another producer captures again may have other bits, and the run says so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from paceline.config.run import RunConfig
from paceline.engines.engine import CaptureRequest, TargetEngine
from paceline.engines.probe import Bounds
from paceline.errors import ConfigError
from paceline.ledger.facts import TARGET_PROBE, TARGET_VARIES
from paceline.ledger.ledger import Ledger
from paceline.ledger.session import write_facts
from paceline.roles.target_binding import settle
from paceline.telemetry import EventLog
from paceline.types import Feature, States

TEXT = "The chain runs over the wheel, and every rider follows the wind until one of them lets go."
NUMBERS_MAX = 64  # of each state that are recorded


def bind_probe(
    ledger: Ledger, config: RunConfig, engine: TargetEngine, events: EventLog, *, role: str
) -> None:
    """Record what the target computes of a fixed prompt, or compare it with what is on record.

    Raises ConfigError if it differs by more than rounding in the target's dtype gives.
    """
    now = numbers_of(engine, config.method.build().features(engine.facts))
    binds = ledger.snapshot().committed > 0
    recorded = settle(ledger, config, {TARGET_PROBE: now}, binds=binds, role=role)[TARGET_PROBE]
    if recorded == now:
        return
    apart = _apart(recorded, now)
    most = tolerance(engine.facts.dtype)
    if not apart <= most:
        raise ConfigError(
            f"The target's states of a fixed prompt differ by {apart:.1%} from those that this run's first "
            f"producer computed; rounding in {engine.facts.dtype} gives at most {most:.1%}.",
            why="The files are the same, and this producer computes something else with them. A draft of "
            "both would imitate neither. The run is untouched.",
            next="use the same libraries, kernels and kind of device as the run's other producers.",
        )
    if not engine.facts.repeats_bits:
        return  # the run makes no claim about bits
    write_facts(ledger, {TARGET_VARIES: True})
    message = (
        f"this producer's target differs by {apart:.2g} from the first producer's, which is rounding; a "
        "sample that another producer captures again may have other bits, and keeps its tokens"
    )
    events.write("note", message=message)


def numbers_of(engine: TargetEngine, features: Sequence[Feature]) -> dict[str, Any]:
    """Some numbers of every state of a fixed prompt, by the feature's name, and digests of all of them."""
    token_ids = engine.encode(TEXT)[: engine.facts.max_positions]
    request = CaptureRequest("probe", token_ids, ((1, len(token_ids)),))
    [sample] = engine.capture([request], features)
    bits, numbers = hashlib.blake2b(digest_size=16), dict[str, list[float]]()
    for feature in features:
        if isinstance(feature.source, States):
            tensor = sample.tensors[feature.name].detach().cpu().contiguous()
            bits.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
            flat = tensor.float().flatten()
            numbers[feature.name] = flat[:: max(1, len(flat) // NUMBERS_MAX)][:NUMBERS_MAX].tolist()
    tokens = hashlib.blake2b(str(token_ids).encode(), digest_size=16)
    return {"tokens": tokens.hexdigest(), "bits": bits.hexdigest(), "states": numbers}


def tolerance(dtype: str) -> float:
    """The most that a state may differ, relative to its norm: what the probe of an engine allows, too."""
    kind: torch.dtype = getattr(torch, dtype)
    return Bounds.of(kind, kind, experts=False).state


def _apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative difference of a state; infinite if they are not of the same tokens and layers."""
    states, others = one["states"], other["states"]
    if one["tokens"] != other["tokens"] or {k: len(v) for k, v in states.items()} != {
        k: len(v) for k, v in others.items()
    }:
        return math.inf
    found = [math.dist(states[name], others[name]) / (math.hypot(*states[name]) or 1.0) for name in states]
    return max(found, default=0.0) if all(map(math.isfinite, found)) else math.inf
