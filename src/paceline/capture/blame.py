"""Which prompt of a capture group the engine cannot bear; the others go on without it.

An error is bisected at once. A death of the process cannot be caught, so prompts whose leases were
held by several dead producers are first tried in parts, under a durable trial (ledger/trial.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.errors import EngineError
from paceline.ledger.controller import DataFlowController
from paceline.ledger.trial import DEATHS_BEFORE_TRIAL, Trial
from paceline.types import PromptTask

# What an engine may raise over a prompt: its own error, and whatever model code makes of bad input.
ENGINE_FAILURES = (
    EngineError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

Answer = Callable[[Sequence[PromptTask]], object]


class Blame:
    def __init__(
        self,
        controller: DataFlowController,
        worker_id: str,
        probe: Callable[[], None],
        report: Callable[..., None],
    ) -> None:
        """`probe` raises if the engine itself is broken."""
        self._controller = controller
        self._probe = probe
        self._worker_id = worker_id
        self._report = report
        self._failed_whole: list[str] = []  # the members of the last group that failed only as a whole

    def set_aside_unreadable(self, wanted: Sequence[PromptTask], key: str) -> list[PromptTask]:
        """Fail for good what carries, under `key`, why it could not be encoded; the other prompts."""
        for task in wanted:
            if key in task.payload:
                self._fail([task.task_id], str(task.payload[key]), retryable=False)
        return [task for task in wanted if key not in task.payload]

    def try_deadly(
        self, wanted: Sequence[PromptTask], members: Sequence[PromptTask], answer: Answer
    ) -> set[str]:
        """If producers died again and again with these leases: the ids of the prompts that kill them."""
        if max(task.deaths for task in wanted) < DEATHS_BEFORE_TRIAL:
            return set()
        by_id = {task.task_id: task for task in members}

        def is_harmless(task_ids: Sequence[str]) -> bool:
            return _fails([by_id[i] for i in task_ids], answer) is None

        fence = self._controller.fence("producer")
        guilty = Trial(self._controller.store, "capture", list(by_id), fence=fence).run(is_harmless)
        if len(guilty) == len(members) > 1:
            self._probe_before_blaming(wanted)
        if guilty:
            self._fail(guilty, "the engine's process dies of this prompt", retryable=False)
        return set(guilty)

    def find(
        self,
        wanted: Sequence[PromptTask],
        members: Sequence[PromptTask],
        answer: Answer,
        error: BaseException,
    ) -> None:
        """End the leases of a group that failed: a failure for the guilty, none for the others.

        If all of several fail, the engine is probed first: one that is broken blames nobody, and raises.
        If none fails without the others (too little memory for the group), nobody is blamed either: the
        group is captured once more, as a whole, and raises EngineError if it fails like that again.
        If only members fail that are not wanted, the wanted count a failure: the group needs every member.
        """
        failures = dict(_culprits(list(members), answer, error))
        if not failures:
            self._blame_nobody(wanted, members, error)
            return
        if len(failures) == len(members) > 1:
            self._probe_before_blaming(wanted)
        guilty = [task.task_id for task in wanted if task.task_id in failures]
        for task_id in guilty:
            self._fail([task_id], failures[task_id], retryable=True)
        others = [task.task_id for task in wanted if task.task_id not in failures]
        if guilty:
            self._controller.return_prompt_tasks(self._worker_id, others)
        else:
            self._fail(others, str(error), retryable=True)

    def _probe_before_blaming(self, wanted: Sequence[PromptTask]) -> None:
        try:
            self._probe()
        except Exception:
            # Leases that are still held at the next start would count as a death of their prompts.
            self._controller.return_prompt_tasks(self._worker_id, [task.task_id for task in wanted])
            raise

    def _blame_nobody(
        self, wanted: Sequence[PromptTask], members: Sequence[PromptTask], error: BaseException
    ) -> None:
        self._controller.return_prompt_tasks(self._worker_id, [task.task_id for task in wanted])
        group, before = [task.task_id for task in members], self._failed_whole
        self._failed_whole = group
        message = str(error) or type(error).__name__
        self._report("group_failed", prompts=[], buried=0, message=f"as a whole, not in parts: {message}")
        if group == before:
            raise EngineError(
                f"The engine fails on {len(group)} prompts at once ({group[0]} to {group[-1]}), twice, and "
                f"on none of them alone: {message}",
                why="No prompt is to blame and none was set aside; most often it is too little memory for a "
                "group. A group must be captured whole, or its features would have other bits.",
                next="free memory (or take a larger machine) and run the same command again; or start a new "
                "run with a smaller capture.group_size.",
            ) from error

    def _fail(self, task_ids: Sequence[str], reason: str, *, retryable: bool) -> None:
        buried = self._controller.fail_prompt_tasks(self._worker_id, task_ids, reason, retryable)
        self._report("group_failed", prompts=list(task_ids), buried=len(buried), message=reason)


def _fails(members: Sequence[PromptTask], answer: Answer) -> str | None:
    try:
        answer(members)
    except ENGINE_FAILURES as error:
        return str(error) or type(error).__name__
    return None


def _culprits(members: list[PromptTask], answer: Answer, error: BaseException) -> list[tuple[str, str]]:
    """The members that fail by themselves, with what each raised; `members` together failed."""
    if len(members) == 1:
        return [(members[0].task_id, str(error) or type(error).__name__)]
    middle, found = len(members) // 2, []
    for half in (members[:middle], members[middle:]):
        try:
            answer(half)
        except ENGINE_FAILURES as reason:
            found += _culprits(half, answer, reason)
    return found
