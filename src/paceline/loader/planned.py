"""PlannedStep: the samples of one optimizer step, and how they follow from its plan on record."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from paceline.errors import LedgerError
from paceline.ledger.records import Entry, StepPlan, TrainedSample, TrainedStep
from paceline.loader.passes import Position, Visit
from paceline.types import SampleRef

Visits = tuple[Visit[Entry], ...]


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step: the refs of its samples, in plan order.

    `taken`: the visits that it took from the order; `visits`: those of them that it trains. `deaths` counts
    consumers that died in it. `first_place`: where a consumer that resumes after it begins to read the log.
    `progress`: see `LoaderSettings.progress`, after the step.
    """

    step: int
    rev: int
    deaths: int
    visits: Visits
    taken: Visits
    first_place: int = 0
    progress: float | None = None

    @property
    def refs(self) -> tuple[SampleRef, ...]:
        return tuple(visit.item.ref for visit in self.visits)

    @property
    def sample_ids(self) -> list[str]:
        """Each id once, although with several passes a sample may come twice in a step."""
        return list(dict.fromkeys(visit.item.sample_id for visit in self.visits))

    @property
    def finished(self) -> list[SampleRef]:
        """The samples that have their last visit in this step."""
        return [visit.item.ref for visit in self.visits if visit.is_last]

    @property
    def after(self) -> Position:
        """The run's position after the step."""
        return self.taken[-1].after

    @property
    def trained(self) -> TrainedStep:
        """The step as a checkpoint's lineage records it."""
        samples = [
            TrainedSample(v.item.place, v.item.sample_id, v.item.ref.ordinal, v.is_last) for v in self.visits
        ]
        return TrainedStep(self.step, self.rev, tuple(samples))

    def with_refs(self, refs: Mapping[str, SampleRef]) -> PlannedStep:
        """The same step with the newest ref of each sample."""
        visits = tuple(replace(v, item=replace(v.item, ref=refs[v.item.sample_id])) for v in self.visits)
        return replace(self, visits=visits)


def plan_of(step: int, visits: Sequence[Visit[Entry]]) -> StepPlan:
    return StepPlan(step, tuple(visit.item.sample_id for visit in visits))


def goes_on(plan: StepPlan, taken: Sequence[Visit[Entry]], quarantined: Collection[str]) -> bool:
    """Whether the plan on record names these visits, except quarantined ones, and others after them."""
    names = iter(plan.sample_ids)
    wanted = next(names, None)
    for visit in taken:
        if visit.item.sample_id == wanted:
            wanted = next(names, None)
        elif visit.item.sample_id not in quarantined:
            return False
    return wanted is not None


def as_planned(
    plan: StepPlan, taken: list[Visit[Entry]], quarantined: Collection[str]
) -> tuple[list[Visit[Entry]], list[Visit[Entry]]]:
    """The visits that a plan on record names, and the visits after its end.

    The plan may lack visits (of quarantined samples), and it may end early: it was the stream's tail when
    it was recorded.
    """
    chosen: list[Visit[Entry]] = []
    end = 0
    for place, visit in enumerate(taken, start=1):
        if visit.item.sample_id in plan.sample_ids[len(chosen) : len(chosen) + 1]:
            chosen.append(visit)
        elif visit.item.sample_id not in quarantined:
            break
        end = place
    if end == 0 or len(chosen) < len(plan.sample_ids):
        raise differs(plan, [visit.item.sample_id for visit in taken])
    return chosen, taken[end:]


def differs(plan: StepPlan, now: Sequence[str]) -> LedgerError:
    return LedgerError(
        f"Step {plan.step} was planned as {list(plan.sample_ids)} but the log now gives {list(now)}.",
        why="Training other samples than planned would break the guarantee of equal weights.",
        next="run `paceline fsck RUN` and report this with its output; nothing was trained.",
    )
