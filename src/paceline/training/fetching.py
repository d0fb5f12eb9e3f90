"""Fetching makes every rank hold its samples of a step before any rank trains it.

A sample that a rank cannot read is captured again; if it stays unreadable, it is quarantined. If the
consumer looks in another feature store than the producer's, or a rank can read none of its samples, no sample
is quarantined: the consumer stops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from paceline.errors import FeatureForgottenError, FeatureStoreElsewhereError, StoreError
from paceline.loader.lengths import QuarantinedError, StoppedError
from paceline.loader.loader import StepLoader
from paceline.loader.planned import PlannedStep
from paceline.training.coordinator import Coordinator
from paceline.training.ranks import Ranks
from paceline.training.worker import FIRST_WEIGHTS
from paceline.types import SampleRef

RECAPTURES_MAX = 5  # of one sample in one step; then it is quarantined
FORGOTTEN_MAX = 30  # captures of one sample that a cache has lost; then the place is at fault
ELSEWHERE_MAX = 2  # refs of one sample that name another store; a store may be lost during the wait


class Fetching:
    def __init__(self, coordinator: Coordinator, ranks: Ranks, loader: StepLoader) -> None:
        self._coordinator = coordinator
        self._ranks = ranks
        self._loader = loader

    def hold(self, planned: PlannedStep) -> PlannedStep | None:
        """The step as all ranks hold it, without samples that stay unreadable; None if asked to stop.

        Raises StoreError, with the weights unchanged, if its features are gone for now.
        """
        while True:
            try:
                return planned.with_refs(
                    self._hold(planned.step, planned.rev, planned.refs, planned.progress)
                )
            except QuarantinedError as gone:
                planned = self._loader.revise(planned, {gone.sample_id})
            except StoppedError:
                self._loader.leave(planned)
                return None
            except StoreError:
                self._loader.leave(planned)
                raise

    def hold_first(self, count: int) -> list[str] | None:
        """Make all ranks hold the run's first `count` samples; returns their ids, None if asked to stop."""
        while (refs := self._loader.first_refs(count)) is not None:
            try:
                return list(self._hold(FIRST_WEIGHTS, 0, refs))
            except QuarantinedError:
                continue
            except StoppedError:
                break
        return None

    def _hold(
        self, step: int, rev: int, refs: Sequence[SampleRef], progress: float | None = None
    ) -> dict[str, SampleRef]:
        """The current refs by sample id; `refs` may name a sample twice."""
        current = {ref.sample_id: ref for ref in refs}
        forgotten, elsewhere, damaged = Counter[str](), Counter[str](), Counter[str]()
        while unreadable := self._ranks.fetch(step, rev, [current[ref.sample_id] for ref in refs], progress):
            for sample_id, why in unreadable.items():
                if isinstance(why, FeatureStoreElsewhereError):
                    elsewhere[sample_id] += 1
                    if elsewhere[sample_id] > ELSEWHERE_MAX:
                        raise _looks_elsewhere(current[sample_id], why)
                elif isinstance(why, FeatureForgottenError):  # it says nothing of the sample
                    forgotten[sample_id] += 1
                    if forgotten[sample_id] > FORGOTTEN_MAX:
                        raise _keeps_nothing(sample_id, why)
                else:
                    damaged[sample_id] += 1
                    if damaged[sample_id] > RECAPTURES_MAX:
                        self._refuse_a_blind_rank(step, rev, unreadable)
                        self._quarantine_unreadable(sample_id, why)
                current[sample_id] = self._loader.captured_again(current[sample_id], why.what)
        return current

    def _refuse_a_blind_rank(self, step: int, rev: int, unreadable: Mapping[str, StoreError]) -> None:
        """Raise StoreError if a rank reads nothing: its mount, memory or network is at fault, and no sample.

        A rank that has a single sample of the step is tried with the samples of the next one.
        """
        blind = self._ranks.with_only(unreadable)
        if len(unreadable) == 1 and blind:
            others = [ref for ref in self._loader.following() if ref.sample_id not in unreadable]
            blind &= self._ranks.with_only(self._ranks.fetch(step, rev, others)) if others else set()
        if not blind:
            return
        sample_id, why = next(iter(unreadable.items()))
        raise StoreError(
            f"Rank {min(blind)} of the training can read no sample, and those of step {step} were captured "
            f"again {RECAPTURES_MAX} times. {sample_id}: {why.what}",
            why="Not so many samples can be at fault: none was quarantined, and no weights were changed.",
            next="look at that host: the mount of features.directory, its memory (dmesg), its network. Then "
            "run the same command again.",
        )

    def _quarantine_unreadable(self, sample_id: str, why: StoreError) -> None:
        reason = f"captured again {RECAPTURES_MAX} times and never readable: {why.what}"
        self._coordinator.quarantine([sample_id], {sample_id: reason}, step=None)
        raise QuarantinedError(sample_id)


def _looks_elsewhere(ref: SampleRef, why: StoreError) -> StoreError:
    return StoreError(
        f"The producer keeps the features in a store that this consumer does not find. {why.what}",
        why=f"{ref.sample_id} was captured again and still lies there. No sample is to blame and none was "
        "quarantined.",
        next="give both roles the same features.directory on one machine (containers: one shared /dev/shm), "
        "and run the same command again.",
    )


def _keeps_nothing(sample_id: str, why: StoreError) -> StoreError:
    return StoreError(
        f"The features of {sample_id!r} were lost {FORGOTTEN_MAX + 1} times before they were read. "
        f"{why.what}",
        why="The place that keeps them, or the way to it, is at fault: no sample was quarantined, and no "
        "weights were changed.",
        next="look for producers that end again and again (`paceline status`), for a Mooncake master that is "
        "restarted, and whether this host reaches the hosts of all producers. Then run the same command "
        "again.",
    )
