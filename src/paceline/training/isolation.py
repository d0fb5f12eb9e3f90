"""Isolation finds the samples of a step that cannot be trained, by trials that do not change the weights.

An error of the step (NaN or infinite loss, a shape that does not fit) is isolated at once. A death of the
process cannot be caught, so a step in which several consumers died is tried before it is trained. A culprit
is quarantined, and the step is trained without it. If no sample fails by itself, the step is trained as
planned and the weights are unaffected. If every sample fails, or every sample of a rank, a harmless sample is
probed first: if weights, target or machine cannot train that either, no sample is quarantined and training
stops. Lack of memory is never a sample's fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paceline.errors import PacelineError, TrainingError, is_want_of_memory
from paceline.ledger.facts import BUILDS_BEGUN, PROBES_BEGUN
from paceline.ledger.isolation import DEATHS_BEFORE_ISOLATION, DEATHS_OF_A_CULPRIT
from paceline.ledger.isolation import Isolation as RecordedTrials
from paceline.loader.loader import StepLoader
from paceline.loader.planned import PlannedStep
from paceline.training.coordinator import Coordinator
from paceline.training.fetching import Fetching
from paceline.training.ranks import Ranks

KILLS_THE_CONSUMER = "the consumer's process dies of this sample"
FAILURES = (TrainingError, ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class Isolation:
    def __init__(
        self,
        coordinator: Coordinator,
        ranks: Ranks,
        loader: StepLoader,
        fetching: Fetching,
        report: Callable[..., None],
    ) -> None:
        self._coordinator = coordinator
        self._ranks = ranks
        self._loader = loader
        self._fetching = fetching
        self._report = report

    def train(self, planned: PlannedStep) -> tuple[PlannedStep, dict[str, Any]] | None:
        """Train a step that all ranks hold; returns the step without its culprits, and its figures.

        If every sample is quarantined, the step has no update. None if asked to stop.
        """
        revised: PlannedStep | None = planned
        if planned.deaths >= DEATHS_BEFORE_ISOLATION:
            revised = self._without_culprits(planned)
        while revised is not None and revised.refs:
            planned = revised
            try:
                return planned, self._ranks.step()
            except FAILURES as error:
                _raise_unless_a_sample_may_cause(error, f"Step {planned.step}")
                self._report("step_failed", step=planned.step, message=str(error))
                revised = self._without_culprits(planned)
                if revised is planned:
                    raise
        return None if revised is None else (revised, {})

    def build(self, sample_ids: Sequence[str]) -> bool:
        """Build the first weights from samples that all ranks hold; False if some were quarantined."""
        if self._coordinator.begin(BUILDS_BEGUN, DEATHS_BEFORE_ISOLATION):
            try:
                self._ranks.build()
            except FAILURES as error:
                _raise_unless_a_sample_may_cause(error, "The build of the first weights")
                culprits = self._culprits("build", sample_ids)
                if not culprits:
                    raise
            else:
                return True
        else:  # consumers died in it, or were killed
            culprits = self._culprits("build", sample_ids)
        self._coordinator.quarantine(sample_ids, culprits, step=0)
        self._coordinator.end(BUILDS_BEGUN)
        return False

    def _without_culprits(self, planned: PlannedStep) -> PlannedStep | None:
        """The step without its culprits, held by all ranks; None if asked to stop.

        `planned` itself if there is no culprit.
        """
        culprits = self._culprits(f"train.{planned.step}.{planned.rev}", planned.sample_ids)
        if not culprits:
            return planned
        self._coordinator.quarantine(planned.sample_ids, culprits, step=planned.step)
        return self._fetching.hold(self._loader.revise(planned, set(culprits)))

    def _culprits(self, name: str, sample_ids: Sequence[str]) -> dict[str, str]:
        """The samples that fail by themselves or kill the process, each with its reason.

        `name` identifies the isolation for a successor. Raises TrainingError if the weights, the target or
        the machine are at fault.
        """
        reasons: dict[str, str] = {}

        def is_harmless(tried: Sequence[str]) -> bool:
            try:
                self._ranks.attempt(tried)
            except FAILURES as error:
                _raise_unless_a_sample_may_cause(error, f"A trial of {len(tried)} samples")
                if len(tried) == 1:
                    reasons[tried[0]] = getattr(error, "what", str(error)) or type(error).__name__
                return False
            return True

        found = RecordedTrials(self._coordinator.session, name, sample_ids).run(is_harmless)
        culprits = {sample_id: reasons.get(sample_id, KILLS_THE_CONSUMER) for sample_id in found}
        if culprits and len(culprits) == len(sample_ids):  # no sample shows that training works here
            self._probe_harmless(name, culprits, everywhere=True)
        elif culprits and self._ranks.has_a_rank_with_only(culprits):  # none shows that it works on that rank
            self._probe_harmless(name, culprits, everywhere=False)
        return culprits

    def _probe_harmless(self, name: str, culprits: dict[str, str], *, everywhere: bool) -> None:
        """Raise TrainingError if weights, target or machine may be at fault, and not the samples.

        `everywhere`: every sample of the trial fails; else other ranks show that the weights can be trained.
        """
        count = len(culprits)
        what = f"The trial {name} fails with " + (
            "every sample that one rank holds"
            if not everywhere
            else (f"each of its {count} samples" if count > 1 else "its one sample")
        )
        reason = next(iter(culprits.values()))
        if not self._coordinator.begin(PROBES_BEGUN, DEATHS_OF_A_CULPRIT):
            self._coordinator.end(PROBES_BEGUN)
            raise _no_sample_at_fault(what, reason, "and a step on a harmless sample kills the process, too")
        try:
            trained_before = self._ranks.probe()
        except FAILURES as error:
            self._coordinator.end(PROBES_BEGUN)
            _raise_unless_a_sample_may_cause(error, "A step on a harmless sample")
            told = getattr(error, "what", str(error)) or type(error).__name__
            advice = getattr(error, "next", "")
            raise _no_sample_at_fault(what, reason, f"and so does a harmless one: {told}", advice) from error
        self._coordinator.end(PROBES_BEGUN)
        if everywhere and len(culprits) > 1 and not trained_before:
            raise _no_sample_at_fault(what, reason, "and no sample has been trained since this start")


def _raise_unless_a_sample_may_cause(error: Exception, what: str) -> None:
    """Raise an error whose cause is in the settings, the ledger or the machine."""
    if isinstance(error, PacelineError) and not isinstance(error, TrainingError):
        raise error
    if is_want_of_memory(error):
        raise TrainingError(
            f"{what} needs more memory than there is ({str(error) or type(error).__name__}).",
            why="No sample is to blame and none was quarantined; the weights are those of the step before.",
            next="free memory (the device's, if it is one), or set method.recompute: true, which changes no "
            "bit of the weights, and run the same command again; or start a new run with a smaller "
            "training.micro_batch_size.",
        ) from error


def _no_sample_at_fault(what: str, reason: str, proof: str, advice: str = "") -> TrainingError:
    return TrainingError(
        f"{what} ({reason.rstrip('.')}), {proof.rstrip('.')}.",
        why="So the weights, the target or the machine are at fault, and no sample was quarantined.",
        next=advice
        or "if the weights diverged, lower training.learning_rate in a new run; else look at the machine and "
        "run the same command again.",
    )
