"""Which sample of a step cannot be trained: found by trials that leave no trace in the weights.

An error of the step (a loss that is no number, a shape that does not fit) is tried at once. A death of
the process cannot be caught: a step in which several consumers died is tried before it is trained. If no
sample is guilty by itself the step is trained as planned, with the same weights as ever; if every one
of several is, the weights or the machine are, and training halts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from paceline.errors import TrainingError
from paceline.ledger.controller import DataFlowController
from paceline.ledger.trial import Trial
from paceline.training.learner import Sample

DEADLY = "the consumer's process dies of this sample"
SAMPLE_FAILURES = (TrainingError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


def failing_samples(
    controller: DataFlowController,
    attempt: Callable[[Sequence[Sample]], None],
    name: str,
    samples: Mapping[str, Sample],
) -> dict[str, str]:
    """The samples (by id) with which `attempt` fails, or has killed processes, and why.

    `name`: of the trial, for a successor. Raises TrainingError if each of several fails.
    """
    reasons: dict[str, str] = {}

    def is_harmless(sample_ids: Sequence[str]) -> bool:
        try:
            attempt([samples[i] for i in sample_ids])
        except SAMPLE_FAILURES as error:
            if len(sample_ids) == 1:
                reasons[sample_ids[0]] = getattr(error, "what", str(error)) or type(error).__name__
            return False
        return True

    fence = controller.fence("consumer")
    guilty = Trial(controller.store, name, list(samples), fence=fence).run(is_harmless)
    if len(guilty) == len(samples) > 1:
        raise TrainingError(
            f"The trial {name} fails with each of its {len(samples)} samples "
            f"({reasons.get(guilty[0], DEADLY)}).",
            why="So the weights or the machine are at fault, and no sample was put in quarantine.",
            next="lower training.learning_rate in a new run, or free memory and run the same command again.",
        )
    return {sample_id: reasons.get(sample_id, DEADLY) for sample_id in guilty}
