"""Decides when a run's draft is measured beside training, and what the curve so far says. No torch.

A measurement is due at the first checkpoint of every `evaluation.every_steps` steps. One runs at a time; if
it is late, the newest checkpoint is measured next and those between are left out. One that fails or is killed
costs nothing, and the next checkpoint is measured instead.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

from paceline.config.run import RunConfig
from paceline.evaluation.curve import Curve, Point, read_curve
from paceline.ledger.facts import FLAT_AFTER
from paceline.ledger.records import CheckpointRecord
from paceline.roles.child import RoleFailedError

EVALUATOR = "evaluator"
BESIDE = "beside"  # its argument: training goes on meanwhile
FLAT_EVALUATIONS, FLAT_GAIN = 3, 0.01  # what is called flat if the run file does not say


class EvaluationSchedule:
    def __init__(
        self,
        config: RunConfig,
        facts: Callable[[], Mapping[str, Any]],
        tell: Callable[[str], None],
        *,
        can_measure: bool = True,
    ) -> None:
        """`facts`: of the run's ledger, now. `tell` gets messages for the user."""
        self._config, self._facts, self._tell = config, facts, tell
        self._every = config.evaluation.every_steps if can_measure else 0
        self._tried = ""  # name of the checkpoint that the newest measurement began with
        self._told_failure = ""
        self._curve = self._read()

    def is_due(self, head: CheckpointRecord | None) -> bool:
        """Whether the head is to be measured, if no measurement is going on."""
        if not self._every or head is None or head.step < self._every or head.name == self._tried:
            return False
        same_stretch = [p for p in self._curve.points if p.step // self._every == head.step // self._every]
        replayed = [p for p in same_stretch if p.step == head.step and p.checkpoint != head.name]
        return not same_stretch or bool(replayed)

    def begun(self, head: CheckpointRecord) -> None:
        self._tried = head.name

    def ended(self, code: int, error: RoleFailedError | None) -> str:
        """A measurement has ended. Returns why training is to stop early; "" if it is not."""
        if code:
            self._tell_failure(code, error)
            return ""
        before, self._curve = self._curve, self._read()
        for point in self._curve.points:
            if point not in before.points:
                self._tell_point(point)
        if reason := self.stop_reason():
            return reason
        if why := self._stands_still(FLAT_EVALUATIONS, FLAT_GAIN):
            self._tell(f"{why}: more training on this data may not help")
        return ""

    def stop_reason(self) -> str:
        """Why the curve so far ends training, by training.stop_when_flat; "" if it does not."""
        rule = self._config.training.stop_when_flat
        return "" if rule is None else self._stands_still(rule.evaluations, rule.gain)

    def _stands_still(self, evaluations: int, gain: float) -> str:
        """What was measured before a run that had stopped early went on does not count."""
        return self._curve.stands_still(evaluations, gain, after=int(self._facts().get(FLAT_AFTER) or 0))

    def _read(self) -> Curve:
        return read_curve(self._config.run.directory, self._facts())

    def _tell_point(self, point: Point) -> None:
        late = ""
        if point.left_out:
            late = f"; it was late, and left out the steps {', '.join(map(str, point.left_out))}"
        self._tell(f"step {point.step}: acceptance length {point.told} on held-out prompts{late}")

    def _tell_failure(self, code: int, error: RoleFailedError | None) -> None:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"code {code}"
        what = error.what if error is not None else f"it ended by {name}"
        if what != self._told_failure:
            self._told_failure = what
            self._tell(
                f"a measurement beside training failed ({what}); the next checkpoint is measured instead"
            )


def marks_left_out(curve: Curve, every: int, step: int) -> tuple[int, ...]:
    """The steps that were due between the last point before `step` and `step`, and were not measured."""
    if not every:
        return ()
    before = max((point.step for point in curve.points if point.step < step), default=0)
    return tuple(range((before // every + 1) * every, step // every * every, every))
