"""The records that cross a process boundary: metadata only, never a tensor.

Large tensors move through the feature store; the control plane sees only their `FeatureSpec` (shape and
dtype) and key. `assert_no_tensors` enforces that rule, and every ledger calls it before it writes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import NoneType
from typing import Any

import msgspec

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PromptTask:
    """One prompt to be answered by the target and captured."""

    task_id: str
    run_id: str
    source_id: str = "prompts"
    payload: Mapping[str, Any] = field(default_factory=dict)
    ordinal: int = 0
    max_length: int = 2048
    attempt: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    deaths: int = 0


class Rows(StrEnum):
    """Which rows of a state are kept; row i belongs to the i-th token that the target processed."""

    ALL = "all"
    PREDICTED = "predicted"  # row i if token i+1 is one that the draft learns to predict


@dataclass(frozen=True)
class Tokens:
    """Every token of a sample, [T+1]: T that the target processed, and the last, which it did not."""


@dataclass(frozen=True)
class Targets:
    """[T+1]: 1 where the token is one that the draft learns to predict, 0 elsewhere."""


@dataclass(frozen=True)
class States:
    """Hidden states of these layers, side by side: [R, len(layers) * hidden_size], for R kept rows.

    Layer id k is the state after k decoder blocks (vLLM's numbering): 0 is the first block's input, and
    the last id is the last block's output before the final norm.
    """

    layers: tuple[int, ...]


@dataclass(frozen=True)
class Feature:
    """One named tensor that a method trains on: where it comes from, which rows of it, and its dtype.

    `narrowed`: it is stored in float8, with a scale of each token and layer (features/float8.py); the trainer
    gets it back in `dtype`.
    """

    name: str
    source: Tokens | Targets | States
    rows: Rows = Rows.ALL
    dtype: str = field(kw_only=True)
    narrowed: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.rows != Rows.ALL and not isinstance(self.source, States):
            raise ValueError(f"feature {self.name!r}: only states can be cut to some of their rows")
        if self.narrowed and not isinstance(self.source, States):
            raise ValueError(f"feature {self.name!r}: only states can be narrowed")


def name_of(source: type[Tokens] | type[Targets], features: Sequence[Feature]) -> str:
    """The name of the feature that holds every sample's tokens, or which of them are targets."""
    for feature in features:
        if isinstance(feature.source, source):
            return feature.name
    raise ValueError(f"no feature is {source.__name__}; every method needs its samples' tokens and targets")


def layers_of(features: Sequence[Feature]) -> set[int]:
    """The layers whose states the features ask for."""
    return {k for feature in features if isinstance(feature.source, States) for k in feature.source.layers}


@dataclass(frozen=True)
class FeatureSpec:
    """Shape and dtype of one named tensor in the feature store."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    required: bool = True
    device_hint: str | None = None
    target_repr: str | None = None
    target_meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleRef:
    """A pointer to the features of exactly one training sample.

    `draft_weight_version` is provenance only: the target is frozen, so a ref never goes stale.
    `metadata["digest"]` is the digest of the sealed bytes; a reader verifies it (G5). `generation`
    is the byte intent they were written under: bytes of another generation are not this sample's.
    `ordinal` is the prompt's place in the run's prompt order.
    """

    sample_id: str
    run_id: str
    source_task_id: str | None
    feature_store_uri: str
    feature_keys: Mapping[str, str]
    feature_specs: Mapping[str, FeatureSpec]
    strategy: str
    num_tokens: int = 0
    estimated_bytes: int = 0
    target_model_version: str = "unknown"
    tokenizer_version: str = "unknown"
    draft_weight_version: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    generation: int = 0
    ordinal: int | None = None


_SCALARS = (str, bytes, bool, int, float, type(None))


def assert_no_tensors(record: Any, *, path: str = "record") -> None:
    """Raise TypeError if `record`, searched to its leaves, carries a tensor or an array.

    It recognises tensors by their package and by duck typing, without an import of torch or numpy.
    """
    if isinstance(record, _SCALARS):
        return
    if _is_tensor(record):
        kind = f"{type(record).__module__}.{type(record).__qualname__}"
        raise TypeError(
            f"{path} is a tensor ({kind}). The control plane carries metadata only; "
            "put tensors into the feature store and pass the SampleRef it returns."
        )
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        for item in dataclasses.fields(record):
            assert_no_tensors(getattr(record, item.name), path=f"{path}.{item.name}")
    elif isinstance(record, Mapping):
        for key, value in record.items():
            assert_no_tensors(key, path=f"{path} key {key!r}")
            assert_no_tensors(value, path=f"{path}[{key!r}]")
    elif isinstance(record, (list, tuple, set, frozenset)):
        for index, value in enumerate(record):
            if not isinstance(value, _SCALARS):
                assert_no_tensors(value, path=f"{path}[{index}]")


def _is_tensor(value: Any) -> bool:
    package = (type(value).__module__ or "").partition(".")[0]
    if package in ("torch", "numpy", "jax", "jaxlib"):
        return True
    return all(hasattr(value, name) for name in ("dtype", "shape", "device"))


def ref_to_json(ref: SampleRef) -> str:
    """The ref as one line of JSON. Raises TypeError for a tensor or anything else that JSON cannot carry,
    ValueError for NaN and infinities, which many readers refuse."""
    try:
        text = _ENCODER.encode(ref).decode()
    except TypeError:
        # JSON cannot carry tensors, so only a ref that failed to encode is searched for one.
        assert_no_tensors(ref)
        raise
    _refuse_what_would_change(ref.metadata, "metadata")
    for spec in ref.feature_specs.values():
        if spec.target_meta:
            _refuse_what_would_change(spec.target_meta, f"feature_specs[{spec.name!r}].target_meta")
    return text


_UNCHANGED = (str, int, bool, NoneType)


def _refuse_what_would_change(value: Any, path: str) -> None:
    """Raise for values that the encoder would write as something else: NaN as null, bytes, sets."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}, which JSON cannot carry.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(item) not in _UNCHANGED:
                _refuse_what_would_change(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if type(item) not in _UNCHANGED:
                _refuse_what_would_change(item, f"{path}[{index}]")
    elif not isinstance(value, (str, int, float, NoneType)):
        raise TypeError(f"{path} is a {type(value).__name__}, which JSON cannot carry.")


def _as_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


_ENCODER = msgspec.json.Encoder(order="sorted", enc_hook=_as_dict)
_DECODER = msgspec.json.Decoder(SampleRef)


def ref_from_json(text: str | bytes) -> SampleRef:
    """The inverse of `ref_to_json`. Raises ValueError for text that is not a ref, or is a newer version's."""
    try:
        ref = _DECODER.decode(text)
    except msgspec.DecodeError as error:
        raise ValueError(f"not a sample ref: {error}") from error
    if ref.schema_version > SCHEMA_VERSION:
        raise ValueError(
            f"the ref of {ref.sample_id} has version {ref.schema_version}, "
            f"this Paceline knows {SCHEMA_VERSION}"
        )
    return ref
