"""One capture for several methods: the features that any of them names, and each method's own made of them.

A state is captured once per layer and dtype, with the widest rows that a method asks for, and kept as it is.
What a method then gets has the bits that a capture of its own would have given it, rounded to float8 where
the method has its features stored so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from paceline.features.float8 import narrowed, widened
from paceline.types import Feature, Rows, States, Targets, Tokens


def merged(wanted: Iterable[Sequence[Feature]]) -> tuple[Feature, ...]:
    """Every source of the given methods' features once, in an order that follows from the sources alone."""
    found: dict[str, Feature] = {}
    for feature in (feature for features in wanted for feature in features):
        for name, source in _parts(feature):
            rows = Rows.ALL if name in found and found[name].rows == Rows.ALL else feature.rows
            found[name] = Feature(name, source, rows, dtype=feature.dtype)
    return tuple(found[name] for name in sorted(found))


def feature_named(name: str, rows: str) -> Feature:
    """The merged feature of this name. Raises ValueError or LookupError if there is none of it."""
    kind, *layer, dtype = name.split()
    sources: dict[str, Tokens | Targets] = {"tokens": Tokens(), "targets": Targets()}
    source = States((int(layer[0]),)) if layer else sources[kind]
    return Feature(name, source, Rows(rows), dtype=dtype)


def covers(kept: Sequence[Feature], needed: Sequence[Feature]) -> bool:
    """Whether samples of the merged features `kept` hold all that the merged `needed` ask for."""
    rows = {feature.name: feature.rows for feature in kept}
    return all(rows.get(feature.name) in (Rows.ALL, feature.rows) for feature in needed)


def of_method(
    sample: Mapping[str, torch.Tensor], kept: Sequence[Feature], features: Sequence[Feature]
) -> dict[str, torch.Tensor]:
    """The tensors of a method's `features` from a sample of the merged features `kept`."""
    rows = {feature.name: feature.rows for feature in kept}
    targets = next(sample[feature.name] for feature in kept if isinstance(feature.source, Targets))
    predicted = targets[1:].bool()
    tensors = {}
    for feature in features:
        names = [name for name, _ in _parts(feature)]
        parts = [
            sample[name][predicted] if rows[name] == Rows.ALL and feature.rows != Rows.ALL else sample[name]
            for name in names
        ]
        tensors[feature.name] = torch.cat(parts, dim=-1)
    return widened(narrowed("a kept sample", tensors, features))


def num_targets(sample: Mapping[str, torch.Tensor], kept: Sequence[Feature]) -> int:
    """How many tokens of a sample a draft learns to predict; the first token is none of them."""
    targets = next(sample[feature.name] for feature in kept if isinstance(feature.source, Targets))
    return int(targets[1:].bool().sum())


def _parts(feature: Feature) -> list[tuple[str, Tokens | Targets | States]]:
    """The merged features of which this one is made: their names and sources."""
    if isinstance(feature.source, States):
        return [(f"state {k} {feature.dtype}", States((k,))) for k in feature.source.layers]
    kind = "tokens" if isinstance(feature.source, Tokens) else "targets"
    return [(f"{kind} {feature.dtype}", feature.source)]
