"""Isolation: when a capture group fails, find the prompts that cause it, so that the others go on.

After an error the producer bisects the group at once. It cannot catch the death of its own process, so
prompts that several producers held when they died are first tried in parts, under a durable record
(ledger/isolation.py).

A fault of the engine or the machine fails no prompt. Before a whole group fails, the engine must show that it
can still capture something: a prompt that was captured before or, where there is none yet, a later one (until
then the group's leases are held and nothing is recorded). If too many prompts fail in a row, the producer
stops with advice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from paceline.capture.encoding import INPUT_FAILURES, EncodedPrompt
from paceline.capture.groups import CaptureGroup
from paceline.capture.in_flight import Answer
from paceline.errors import ConfigError, EngineError, ServerUnavailableError, is_want_of_memory
from paceline.ledger import isolation
from paceline.ledger.isolation import DEATHS_BEFORE_ISOLATION
from paceline.ledger.producer_session import ProducerSession


class CaptureFailedError(Exception):
    """A group was not captured. `is_of_machine`: memory ran out, which is no prompt's fault. `culprits`: why
    prompts fail, by task id, where the error itself says which. `retryable`: another try may help them."""

    def __init__(
        self, error: BaseException, culprits: Mapping[str, str] | None = None, *, retryable: bool = True
    ) -> None:
        super().__init__(str(error) or type(error).__name__)
        self.error = error
        self.culprits = dict(culprits or {})
        self.retryable = retryable
        self.is_of_machine = is_want_of_memory(error)


class Isolation:
    def __init__(
        self,
        session: ProducerSession,
        *,
        answer: Answer,
        probe: Callable[[], None],
        captured_before: Callable[[], EncodedPrompt | None],
        report: Callable[..., None],
        in_a_row_max: int,
    ) -> None:
        """`answer` captures prompts or raises CaptureFailedError; `probe` raises if the engine is broken.

        `captured_before`: a prompt of this run that was captured before; None if there is none.
        """
        self._session = session
        self._ordinals: dict[str, int] = {}  # by task id, of all groups seen here
        self._answer = answer
        self._probe = probe
        self._captured_before = captured_before
        self._report = report
        self._in_a_row_max = in_a_row_max
        self._in_a_row: set[str] = set()
        # By task id: why the prompt fails, and whether another try may help.
        self._held: dict[str, tuple[str, bool]] = {}
        self._failed_whole: list[str] = []  # the members of the last group that failed only as a whole

    # -- what is known before the capture ----------------------------------------------------

    def without_known(self, group: CaptureGroup) -> CaptureGroup:
        """The group without its broken prompts and without those that kill the engine's process."""
        self._ordinals.update({prompt.task_id: prompt.ordinal for prompt in group.members})
        broken = {prompt.task_id: prompt.broken for prompt in group.members if prompt.broken}
        wanted = set(group.wanted_ids)
        self._fail({i: reason for i, reason in broken.items() if i in wanted}, retryable=False)
        group = group.without(list(broken))
        if not group.wanted or group.deaths < DEATHS_BEFORE_ISOLATION:
            return group
        return self._without_killers(group)

    def _without_killers(self, group: CaptureGroup) -> CaptureGroup:
        """The group without prompts that kill the process; the search may take several restarts."""
        known = self._captured_before()
        if known is not None:
            self._must_capture(known, group)  # if the engine dies of this one too, no prompt fails
        by_id = {prompt.task_id: prompt for prompt in group.members}

        def is_harmless(task_ids: Sequence[str]) -> bool:
            return self._failure([by_id[task_id] for task_id in task_ids]) is None

        name = f"capture.{self._session.worker}"
        culprits = isolation.Isolation(self._session, name, list(by_id)).run(is_harmless)
        if len(culprits) == len(by_id):
            self._engine_must_work(group)
            self._count_in_a_row(group, culprits, "the engine's process dies of it")
        wanted = set(group.wanted_ids)
        reasons = dict.fromkeys(culprits, "the engine's process dies of this prompt")
        self._record({i: reason for i, reason in reasons.items() if i in wanted}, retryable=False)
        return group.without(culprits)

    # -- after a failed capture --------------------------------------------------------------

    def find(self, group: CaptureGroup, failure: CaptureFailedError) -> None:
        """End the leases of a group that failed: its culprits fail, the other prompts are given back.

        Without a culprit among the wanted prompts no prompt fails: the whole group is captured once more,
        and this raises EngineError if it fails in the same way again.
        """
        wanted = set(group.wanted_ids)
        known = {} if failure.is_of_machine else failure.culprits
        failures = known or ({} if failure.is_of_machine else self._culprits(group.members, failure))
        culprits = {task_id: reason for task_id, reason in failures.items() if task_id in wanted}
        if not culprits:
            self._blame_none(group, failure)
            return
        if len(failures) == len(group.members):
            has_shown = self._engine_must_work(group)
            self._count_in_a_row(group, culprits, str(failure))
            if not has_shown:
                self._hold(culprits, retryable=failure.retryable)
                return
        self._record(culprits, retryable=failure.retryable)
        self._give_back([task_id for task_id in group.wanted_ids if task_id not in culprits])

    def succeeded(self) -> None:
        """A group was captured and committed, so the engine works: the held prompts fail now."""
        self._in_a_row.clear()
        self._failed_whole = []
        held, self._held = self._held, {}
        for retryable in (False, True):
            self._record(
                {i: why for i, (why, again) in held.items() if again is retryable}, retryable=retryable
            )

    @property
    def num_held(self) -> int:
        """How many prompts are held: they failed, but this is not recorded until something is captured."""
        return len(self._held)

    def finish(self) -> None:
        """Call when no prompt is left. Raises EngineError or ConfigError if none could be captured."""
        held = {self._ordinals[i]: _named(i, why) for i, (why, _) in self._held.items()}
        failed = {**self._session.ledger.failed(), **held}
        broken = [task_id for task_id, (_, may_try_again) in self._held.items() if not may_try_again]
        if not failed or self._session.snapshot().committed:
            self._refuse_if_engine_fails()
            self.succeeded()
            return
        self.give_back_held()
        first = "; ".join(reason for _, reason in sorted(failed.items())[:3])
        has_engine_failed = len(broken) < len(failed)
        raise (EngineError if has_engine_failed else ConfigError)(
            f"None of the {len(failed)} prompts can be captured. The first: {first}.",
            why="There is nothing to train on, and most likely it is not the prompts' fault.",
            next="correct what these reasons name (prompts, settings or target), then run the command again.",
        )

    def _refuse_if_engine_fails(self) -> None:
        """Another producer's engine may have captured what was committed: ask this one for a sample of it.

        Raises EngineError if it fails; then nothing that is held was a prompt's fault.
        """
        known = self._captured_before() if self._held else None
        failure = None if known is None else self._failure([known])
        if known is None or failure is None:
            return
        held = sorted(self._held)
        self.give_back_held()
        raise _engine_fails(held[0], known.task_id, failure) from failure.error

    def give_back_held(self) -> None:
        """Give the leases back, or the next start would count them as held by a producer that died."""
        held, self._held = self._held, {}
        self._give_back(list(held))

    # -- the search --------------------------------------------------------------------------

    def _culprits(self, members: Sequence[EncodedPrompt], failure: CaptureFailedError) -> dict[str, str]:
        """The members that fail alone, with what each raised; called with `members` that failed together."""
        if len(members) == 1:
            return {members[0].task_id: str(failure)}
        middle, found = len(members) // 2, {}
        for half in (members[:middle], members[middle:]):
            error = self._failure(half)
            if error is not None:
                found.update(self._culprits(half, error))
        return found

    def _failure(self, members: Sequence[EncodedPrompt]) -> CaptureFailedError | None:
        try:
            self._answer(members)
        except CaptureFailedError as failure:
            return failure
        return None

    def _engine_must_work(self, group: CaptureGroup) -> bool:
        """Whether the engine captured a known prompt; False if there is no known prompt to try.

        Raises the engine's error if it fails; no prompt fails then.
        """
        try:
            self._probe()
        except Exception:
            self._give_back(group.wanted_ids)
            raise
        known = self._captured_before()
        if known is None:
            return False
        self._must_capture(known, group)
        return True

    def _must_capture(self, known: EncodedPrompt, group: CaptureGroup) -> None:
        failure = self._failure([known])
        if failure is not None:
            self._give_back(group.wanted_ids)
            raise _engine_fails(group.wanted_ids[0], known.task_id, failure) from failure.error

    def _count_in_a_row(self, group: CaptureGroup, culprits: Iterable[str], reason: str) -> None:
        self._in_a_row.update(culprits)
        if len(self._in_a_row) > self._in_a_row_max:
            self._give_back(group.wanted_ids)
            raise EngineError(
                f"{len(self._in_a_row)} prompts in a row fail, the last {group.wanted_ids[-1]}: {reason}",
                why=f"More than {self._in_a_row_max} (capture.failures_in_a_row_max) are hardly the fault of "
                "the prompts; those of the last group were not marked as failed.",
                next="act on that message; if these prompts are really unusable, raise the limit.",
            )

    # -- what is recorded ----------------------------------------------------------------------

    def _blame_none(self, group: CaptureGroup, failure: CaptureFailedError) -> None:
        self._give_back(group.wanted_ids)
        members, before = [prompt.task_id for prompt in group.members], self._failed_whole
        self._failed_whole = members
        self._report("group_failed", prompts=[], failed=0, message=f"no prompt is to blame: {failure}")
        if members == before:
            raise EngineError(
                f"The engine failed twice on the group of {len(members)} prompts {members[0]} to "
                f"{members[-1]}, and none of these prompts is to blame: {failure}",
                why="No prompt was marked as failed; most often the memory is too small for a group. A group "
                "must be captured whole, or its features would have other bits.",
                next="free memory (or take a larger machine) and run the same command again; or start a new "
                "run with a smaller capture.group_size.",
            ) from failure.error

    def _fail(self, reasons: dict[str, str], *, retryable: bool) -> None:
        """Record failures, or hold them while nothing is captured yet: settings may still change then."""
        if self._session.snapshot().committed:
            self._record(reasons, retryable=retryable)
        else:
            self._hold(reasons, retryable=retryable)

    def _hold(self, reasons: dict[str, str], *, retryable: bool) -> None:
        self._held.update({task_id: (reason, retryable) for task_id, reason in reasons.items()})

    def _record(self, reasons: dict[str, str], *, retryable: bool) -> None:
        for task_id, reason in reasons.items():
            ordinals = [self._ordinals[task_id]]
            for_good = self._session.fail(ordinals, _named(task_id, reason), retryable=retryable)
            self._report("group_failed", prompts=[task_id], failed=len(for_good), message=reason)

    def _give_back(self, task_ids: Sequence[str]) -> None:
        self._session.give_back([self._ordinals[task_id] for task_id in task_ids])


def as_failure(error: BaseException) -> CaptureFailedError:
    """`error` as a failure of the group; re-raises an error that no input can cause."""
    if isinstance(error, ServerUnavailableError) or not isinstance(error, (*INPUT_FAILURES, MemoryError)):
        raise error
    return CaptureFailedError(error)


def _engine_fails(task_id: str, known: str, failure: CaptureFailedError) -> EngineError:
    return EngineError(
        f"The engine fails on {task_id}, and on {known} too, which was captured before: {failure}",
        why="So the engine or the machine is at fault, and no prompt was marked as failed.",
        next="act on the engine's message, then run the same command again.",
    )


def _named(task_id: str, reason: str) -> str:
    """The reason, after the prompt's id: the ledger knows prompts by ordinal alone."""
    return f"{task_id}: {reason}"
