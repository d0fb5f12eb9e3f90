"""States as float8 (e4m3) with one scale a token and layer, for the way from the producer to the trainer.

Of each token, the H numbers of each layer become H bytes, and a scale in the states' own dtype: the least
power of two with which the largest number of the row is at most 448, the largest of e4m3. A number x comes
back at most max(|x| / 16, scale / 1024) away; a product with a power of two rounds nothing, so what came back
once comes back as the same bits again. A layer has its own scale because states grow with depth, and so that
captures for one method and for several (merged.py) give the same bits.

In the store the feature NAME is a tensor of that name, float8_e4m3fn, and NAME.scales. They say all that a
reader needs, so a reader has no setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from paceline.errors import EngineError, FeatureCorruptError
from paceline.types import Feature, States

SCALES = ".scales"
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448, which is 0.875 * 2**9
# The least exponent of a scale that the dtype holds, and so does its inverse.
_LEAST = {torch.bfloat16: -126, torch.float32: -126, torch.float16: -24}


def narrowed(
    sample_id: str, tensors: Mapping[str, torch.Tensor], features: Sequence[Feature]
) -> dict[str, torch.Tensor]:
    """A sample's tensors as they are stored, with its `features` that are narrowed in float8.

    Raises EngineError for states that are not finite, and for a row of zeros alone.
    """
    found = dict(tensors)
    for feature in features:
        if feature.narrowed:
            assert isinstance(feature.source, States)
            states = tensors[feature.name].unflatten(-1, (len(feature.source.layers), -1))  # [R, n, H]
            largest = states.abs().amax(-1)
            if not bool((torch.isfinite(largest) & (largest > 0)).all()):
                raise _unsound(sample_id, feature.name)
            exponents = _exponents(largest)
            rounded = (states.float() * _power_of_two(-exponents)[..., None]).to(FLOAT8)
            found[feature.name] = rounded.flatten(-2)
            found[feature.name + SCALES] = _power_of_two(exponents).to(states.dtype)
    return found


def widened(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A sample's tensors as they are trained on: each float8 one times its scales, in the dtype of these.

    Raises FeatureCorruptError for one whose scales are missing or do not fit.
    """
    found = dict(tensors)
    for name, numbers in tensors.items():
        if numbers.dtype == FLOAT8:
            scales = found.pop(name + SCALES, None)
            if scales is None or scales.dtype not in _LEAST or not _fit(numbers, scales):
                raise _without_scales(name)
            rows = numbers.to(scales.dtype).unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]
            # The largest numbers of the dtype are rounded up to more than it holds.
            most = torch.finfo(rows.dtype).max
            found[name] = rows.clamp_(-most, most).flatten(-2)
    return found


def _exponents(largest: torch.Tensor) -> torch.Tensor:
    """int32 [R, n]: k of the least 2**k with largest <= 448 * 2**k."""
    fraction, exponents = torch.frexp(largest.float())  # fraction in [0.5, 1)
    needed = exponents - 9 + (fraction > LARGEST / 2**9)
    return needed.clamp(min=_LEAST[largest.dtype]).to(torch.int32)


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2**k as float32, exactly, for -127 < k < 128; `ldexp` goes through `pow`, which may round."""
    return ((exponents + 127) << 23).view(torch.float32)


def _fit(numbers: torch.Tensor, scales: torch.Tensor) -> bool:
    if numbers.dim() != 2 or scales.dim() != 2 or len(numbers) != len(scales):
        return False
    return scales.shape[-1] > 0 and numbers.shape[-1] % scales.shape[-1] == 0


def _unsound(sample_id: str, name: str) -> EngineError:
    return EngineError(
        f"The target gave states that are not finite, or all zero, for {sample_id} ({name}).",
        why="Training on them would destroy the draft's weights; nothing of the group was stored.",
        next="try target.dtype: float32, or remove the prompt.",
    )


def _without_scales(name: str) -> FeatureCorruptError:
    return FeatureCorruptError(
        f"The sample's tensor {name!r} is in float8 and has no scales that fit.",
        why="Its numbers mean nothing without them, so the sample was not written by a producer of Paceline.",
        next="let the producer capture the sample again.",
    )
