"""How fast the roles of a run are: measured figures, or an estimate from a GPU's data sheet. No torch.

Figures of the run file come first, then those that `paceline bench` has left in the run's directory, then
the data sheet. Without any of them the time is unknown, and the plan says so.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from paceline.config.run import RunConfig
from paceline.engines.served.settings import ServedSection
from paceline.errors import ConfigError
from paceline.regular_files import read_regular
from paceline.roles.lengths import Lengths
from paceline.section import Section, nearest
from paceline.target.shape import TargetShape

BENCH = "bench.json"
BENCH_BYTES_MAX = 1 << 16
# Shares of a data sheet's figures that decoding and training are taken to reach.
BANDWIDTH_SHARE, DECODING_SHARE, TRAINING_SHARE = 0.6, 0.35, 0.3
# Seconds a layer that a pass takes however small it is: the library launches each kernel from Python.
LAYER_S = {"transformers": 5e-4}
SERVED_LAYER_S = 1e-4
MICRO_BATCH_S = 0.1  # the same of a micro-batch, forward and backward


@dataclass(frozen=True)
class DataSheet:
    """Dense bfloat16 products and memory, as its maker states them."""

    name: str
    tflops: float
    terabytes_per_s: float
    gigabytes: float


DATA_SHEETS = (
    DataSheet("B200", 2250, 8.0, 180),
    DataSheet("H200", 989, 4.8, 141),
    DataSheet("H100 PCIe", 756, 2.0, 80),
    DataSheet("H100", 989, 3.35, 80),
    DataSheet("A100-SXM4-40GB", 312, 1.555, 40),
    DataSheet("A100", 312, 2.0, 80),
    DataSheet("L40S", 362, 0.864, 48),
    DataSheet("L4", 121, 0.3, 24),
    DataSheet("A10", 125, 0.6, 24),
    DataSheet("RTX A6000", 155, 0.768, 48),
    DataSheet("RTX A5000", 111, 0.768, 24),
    DataSheet("RTX 5090", 209, 1.792, 32),
    DataSheet("RTX 4090", 165, 1.008, 24),
    DataSheet("RTX 3090", 71, 0.936, 24),
)


class Bench(Section):
    """What `paceline bench` writes: rates as in the run file's `costs`, and what they were measured of."""

    version: int = 1
    date: str
    machine: str
    target: str
    method: str
    dtype: str
    capture_tokens_per_s: float | None = None
    train_tokens_per_s: float | None = None
    store_mib_per_s: float | None = None


@dataclass(frozen=True)
class Rates:
    """None: unknown. `source`: where they come from, in words. See `CostsSection` for the units."""

    capture_tokens_per_s: float | None = None
    train_tokens_per_s: float | None = None
    store_mib_per_s: float | None = None
    source: str = ""


def data_sheet(name: str) -> DataSheet | None:
    """That of a GPU whose driver calls it so. An L40 is no L4, and an RTX A1000 no A100."""
    return next((s for s in DATA_SHEETS if re.search(rf"{s.name}(?!\d)", name, re.IGNORECASE)), None)


def named_data_sheet(name: str) -> DataSheet:
    """Raises ConfigError for a GPU that is not known."""
    if sheet := data_sheet(name):
        return sheet
    known = [sheet.name for sheet in DATA_SHEETS]
    raise ConfigError(
        f"No data sheet of a GPU {name!r} is known ({nearest(name, known)}).",
        why="The time is estimated from it.",
        next=f"name one of: {', '.join(known)}; or leave --gpu out, and set costs in the run file.",
    )


def rates_of(
    config: RunConfig, shape: TargetShape, lengths: Lengths, sheet: DataSheet | None, trained: int | None
) -> Rates:
    """The best figures there are. `trained`: the draft's parameters."""
    costs = config.costs
    found = [
        Rates(
            costs.capture_tokens_per_s,
            costs.train_tokens_per_s,
            costs.store_mib_per_s,
            f"costs of the run file{f' ({costs.measured})' if costs.measured else ''}",
        ),
        measured_rates(config.run.directory, config, shape),
    ]
    if sheet is not None:
        found.append(estimated_rates(config, shape, lengths, sheet, trained))
    names = ("capture_tokens_per_s", "train_tokens_per_s", "store_mib_per_s")
    chosen = {name: next((r for r in found if getattr(r, name) is not None), None) for name in names}
    sources = dict.fromkeys(rates.source for rates in chosen.values() if rates is not None)
    values = {name: getattr(rates, name) for name, rates in chosen.items() if rates is not None}
    return Rates(**values, source="; ".join(sources))


def measured_rates(directory: Path, config: RunConfig, shape: TargetShape) -> Rates:
    """Those of bench.json, if it is of this target's sizes and this method."""
    try:
        bench = Bench.model_validate(json.loads(read_regular(directory / BENCH, BENCH_BYTES_MAX)))
    except (OSError, ValueError, RecursionError):  # a file that is no measurement tells nothing
        return Rates()
    if (bench.target, bench.method) != (named(shape), config.method.name):
        return Rates()
    source = f"paceline bench on {bench.machine}, {bench.date}"
    rates = bench.capture_tokens_per_s, bench.train_tokens_per_s, bench.store_mib_per_s
    return Rates(*rates, source)


def named(shape: TargetShape) -> str:
    """A target by its sizes: a bench of another model of the same sizes is as good."""
    sizes = shape.sizes
    return (
        f"{shape.model_type}, {sizes.num_hidden_layers} layers of {sizes.hidden_size}, "
        f"{shape.parameters} parameters"
    )


def estimated_rates(
    config: RunConfig, shape: TargetShape, lengths: Lengths, sheet: DataSheet, trained: int | None
) -> Rates:
    """What the data sheet would allow at usual shares of it; within a factor of two or three."""
    flops, bandwidth = sheet.tflops * 1e12, sheet.terabytes_per_s * 1e12
    at_once, devices, layer_s = _decoding(config)
    # A batch of a mixture of experts reads most experts.
    active = shape.active_parameters / shape.parameters
    read = shape.weights_bytes * min(1.0, active + (at_once - 1) * active * (1 - active))
    a_token = 2.0 * shape.active_parameters / (flops * DECODING_SHARE * devices)
    a_pass = max(read / (bandwidth * BANDWIDTH_SHARE * devices), at_once * a_token)
    a_pass += layer_s * shape.sizes.num_hidden_layers
    if config.data.answers == "target":
        answer_s = lengths.answers * a_pass / at_once + lengths.prompt * a_token
        capture = lengths.answers / answer_s
    else:
        capture = 1.0 / (2 * a_token)
    train = None
    if trained is not None:
        rows = config.method.rows_per_target(lengths.answers)
        judged = 2.0 * shape.sizes.vocab_size * shape.sizes.hidden_size  # the target's own logits
        tokens = config.training.micro_batch_tokens
        samples = config.training.micro_batch_size if tokens is None else max(1.0, tokens / lengths.sample)
        targets = samples * lengths.answers
        a_batch = targets * (6.0 * trained * rows + judged) / (flops * TRAINING_SHARE) + MICRO_BATCH_S
        train = targets / a_batch
    return Rates(capture, train, None, f"the data sheet of {sheet.name}, not measured")


def _decoding(config: RunConfig) -> tuple[int, int, float]:
    """Sequences that are decoded at once, the devices that share a pass, and seconds a layer beside it."""
    engine, group = config.engine, config.capture.group_size
    if isinstance(engine, ServedSection):
        at_once = min(engine.requests_in_flight, group * config.capture.groups_in_flight)
        return at_once, max(1, len(getattr(engine, "devices", ()))), SERVED_LAYER_S
    return group, 1, LAYER_S.get(engine.name, SERVED_LAYER_S)
