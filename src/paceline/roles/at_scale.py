"""How much a run over many hosts can do, and what binds it: capture, training, network, ledger or window.

Every part could do so many samples a second by itself; the run does as many as the slowest. A simulation that
plays the waiting, too, agrees within a few percent (benchmarks/at_scale.py, docs/at-scale.md). No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paceline.capture.backpressure import Watermarks
from paceline.config.run import RunConfig
from paceline.roles.footprint import SampleSizes
from paceline.roles.hosts import HostSection, HostsSection
from paceline.roles.lengths import Lengths
from paceline.roles.rates import Rates

GRADIENT_BYTES = 4  # a parameter, summed in float32
GBIT = 1e9 / 8


@dataclass(frozen=True)
class LedgerCost:
    """Seconds in which a ledger does nothing else: for a call that changes it, and for each of its samples.

    A sample takes part in the calls of its group (lease, reserve, commit) and of each step that trains it
    (plan, acknowledgement).
    """

    group_s: float
    step_s: float
    sample_s: float

    def of_a_sample(self, group: float, batch: float, passes: int) -> float:
        return self.sample_s + self.group_s / group + passes * self.step_s / batch


# Fitted to the rows of benchmarks/results that a test names, of two batch sizes each.
LEDGERS = {
    "sqlite": LedgerCost(group_s=0.55e-3, step_s=0.55e-3, sample_s=55e-6),
    "redis": LedgerCost(group_s=0.35e-3, step_s=0.35e-3, sample_s=73e-6),
}


@dataclass(frozen=True)
class Work:
    """What the run's samples ask of all hosts. `tokens`: that are captured for one, `targets` that it trains;
    `bytes_about`: of its features, `bytes_max`: what is reserved for them."""

    samples: int
    tokens: float
    targets: float
    bytes_about: float
    bytes_max: float
    group: int
    batch: float
    passes: int
    gradient_bytes: float

    @classmethod
    def of(
        cls,
        config: RunConfig,
        samples: int,
        lengths: Lengths,
        sizes: SampleSizes,
        batch: float,
        trained: int | None,
    ) -> Work:
        return cls(
            samples=samples,
            tokens=lengths.answers if config.data.answers == "target" else lengths.sample,
            targets=lengths.answers,
            bytes_about=sizes.bytes_about,
            bytes_max=sizes.bytes_max,
            group=config.capture.group_size,
            batch=batch,
            passes=config.training.passes,
            gradient_bytes=GRADIENT_BYTES * (trained or 0),
        )


@dataclass(frozen=True)
class Crew:
    """The hosts of one kind, with the tokens a second of one producer and of one rank."""

    host: HostSection
    rates: Rates

    def captured(self, work: Work) -> float:
        """Samples a second of all of them."""
        return self.host.count * self.host.producers * (self.rates.capture_tokens_per_s or 0) / work.tokens

    @property
    def trained(self) -> float:
        """Tokens a second of one rank."""
        return self.rates.train_tokens_per_s or 0 if self.host.trainers else 0


@dataclass(frozen=True)
class Limit:
    """So many samples a second, if nothing but `what` limited the run. `name`: of the kind of hosts."""

    what: str
    samples_per_s: float
    name: str = ""


def marks_of(config: RunConfig, sizes: SampleSizes) -> Watermarks:
    """Those of the run's producers."""
    return Watermarks(
        budget_bytes=config.features.budget_mib << 20,
        group_bytes=config.capture.group_size * sizes.bytes_max,
        budget_samples=config.features.budget_samples,
        group_samples=config.capture.group_size,
        window_samples=sizes.collected.samples,
        window_bytes=sizes.collected.num_bytes,
    )


def budget_for(producers: int, marks: Watermarks) -> int:
    """Bytes of the budget with which so many producers capture at the same time."""
    window = marks.window_bytes
    if window is None:
        window = marks.window_samples * (marks.group_bytes // max(1, marks.group_samples))
    return _room(producers, window, marks.group_bytes, marks.low)


def samples_for(producers: int, marks: Watermarks) -> int:
    """The same in samples."""
    return _room(producers, marks.window_samples, marks.group_samples, marks.low)


def _room(producers: int, window: int, group: int, low: float) -> int:
    resumed = window + producers * group
    return max(int(resumed / low) + 1, resumed + group)


def step_seconds(work: Work, crews: list[Crew]) -> float:
    """Of one optimizer step: the ranks have equal shares, the slowest decides; then gradients are summed.

    They go around a ring, twice, over the slowest network between the ranks' hosts. Within a host they cost
    nothing here.
    """
    training = [crew for crew in crews if crew.host.trainers]
    ranks = sum(crew.host.count * crew.host.trainers for crew in training)
    hosts = sum(crew.host.count for crew in training)
    slowest = min(crew.trained for crew in training)
    network = min(crew.host.network_gbit_per_s for crew in training) * GBIT
    summed = 2 * (hosts - 1) / hosts * work.gradient_bytes / network
    return work.batch * work.targets / (ranks * slowest) + summed


def limits(
    work: Work, hosts: HostsSection, crews: list[Crew], marks: Watermarks, store: str
) -> Iterator[Limit]:
    """What each part could do by itself. `store`: of the ledger."""
    captured = sum(crew.captured(work) for crew in crews)
    yield Limit("capture", captured)
    if marks.groups_ahead < hosts.producers:
        yield Limit("window", captured * marks.groups_ahead / hosts.producers)
    yield Limit("training", work.batch / step_seconds(work, crews) / work.passes)
    if hosts.num_hosts > 1:
        yield from _networks(work, crews, captured)
        if hosts.storage_gbit_per_s is not None:
            moved = work.bytes_about * (1 + work.passes)
            yield Limit("storage", hosts.storage_gbit_per_s * GBIT / moved)
    if hosts.ledger_samples_per_s is not None:
        yield Limit("ledger", hosts.ledger_samples_per_s)
    elif store in LEDGERS:
        yield Limit("ledger", 1 / LEDGERS[store].of_a_sample(work.group, work.batch, work.passes))


def _networks(work: Work, crews: list[Crew], captured: float) -> Iterator[Limit]:
    """A sample is written by the host that captured it, and read by one that trains, once for each pass."""
    ranks = sum(crew.host.count * crew.host.trainers for crew in crews)
    for crew in crews:
        a_second = crew.host.count * crew.host.network_gbit_per_s * GBIT
        written = crew.captured(work) / captured * work.bytes_about
        read = crew.host.count * crew.host.trainers / ranks * work.passes * work.bytes_about
        yield Limit("network", a_second / max(written, read), crew.host.name)
