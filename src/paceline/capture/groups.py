"""Capture groups: which prompts are captured together, and that they are rendered as they always were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.capture.encoding import EncodedPrompt, Encoding, rendering_of
from paceline.capture.source import PromptSource, group_of
from paceline.errors import ConfigError, LedgerError
from paceline.ledger.controller import DataFlowController
from paceline.ledger.facts import RENDERING
from paceline.ledger.records import TaskLease

KNOWN_AMONG = 1024  # of the run's first prompts one is looked for that was captured before


@dataclass(frozen=True)
class CaptureGroup:
    """Prompts that are captured together. `wanted`: those whose samples are needed, all of them members.

    `rendering`: digest of the token ids of the whole group, failed prompts included. `deaths`: the most
    producers that died with a lease of a wanted one.
    """

    wanted: tuple[EncodedPrompt, ...]
    members: tuple[EncodedPrompt, ...]
    rendering: str
    deaths: int = 0

    @property
    def wanted_ids(self) -> list[str]:
        return [prompt.task_id for prompt in self.wanted]

    def without(self, task_ids: Sequence[str]) -> CaptureGroup:
        gone = set(task_ids)
        wanted = tuple(prompt for prompt in self.wanted if prompt.task_id not in gone)
        members = tuple(prompt for prompt in self.members if prompt.task_id not in gone)
        return CaptureGroup(wanted, members, self.rendering, self.deaths)


class Groups:
    """Reads and encodes a run's prompts, group by group."""

    def __init__(
        self, controller: DataFlowController, prompts: PromptSource, encoding: Encoding, group_size: int
    ) -> None:
        self._controller = controller
        self._prompts = prompts
        self._encoding = encoding
        self._group_size = group_size

    def bounds(self, ordinal: int) -> range:
        """The ordinals of its group."""
        return group_of(ordinal, self._group_size, self._prompts.starts)

    def group(self, leases: Sequence[TaskLease]) -> CaptureGroup:
        """The one that these leases, all of one group, belong to: its prompts but those that failed for good.

        Raises ConfigError if they are rendered otherwise than when one of them was captured.
        """
        encoded = self._encoded(self.bounds(leases[0].ordinal))
        by_ordinal = {prompt.ordinal: prompt for prompt in encoded}
        for lease in leases:
            there = by_ordinal.get(lease.ordinal)
            if there is None or there.task_id != lease.task_id:
                raise _other_order(lease, there)
        failed = self._controller.store.failed_tasks()
        group = CaptureGroup(
            wanted=tuple(by_ordinal[lease.ordinal] for lease in leases),
            members=tuple(prompt for prompt in encoded if prompt.task_id not in failed),
            rendering=rendering_of(encoded),
            deaths=max(lease.deaths for lease in leases),
        )
        self._refuse_other_rendering(group)
        return group

    def sample_id(self, prompt: EncodedPrompt) -> str:
        """A sample's identity is its prompt's: `run:task`. The same after any number of restarts."""
        return f"{self._controller.run_id}:{prompt.task_id}"

    def make_known(self) -> None:
        """Tell the ledger of prompts that it does not know yet."""
        store, size = self._controller.store, self._prompts.size or 0
        if sum(store.task_counts().values()) < size:
            ids = [prompt.prompt_id for prompt in self._prompts.read(0, size)]
            store.add_tasks(ids, fence=self._controller.fence("producer"))

    def bind_rendering(self) -> None:
        """The first group's token ids are a fact of the run: a start that renders it otherwise is refused.

        Raises ConfigError.
        """
        store = self._controller.store
        now = rendering_of(self._encoded(self.bounds(0)))
        if not store.committed_count():
            store.set_facts({RENDERING: now}, fence=self._controller.fence("producer"))
        elif store.facts().get(RENDERING, now) != now:
            raise _other_rendering("the first group")

    def captured_before(self) -> EncodedPrompt | None:
        """A prompt of the run that was captured; None if none was."""
        store = self._controller.store
        if store.committed_count():
            for ordinal, prompt in enumerate(self._prompts.read(0, KNOWN_AMONG)):
                encoded = self._encoding.prompt(ordinal, prompt)
                if not encoded.broken and store.is_committed(self.sample_id(encoded)):
                    return encoded
        return None

    def _encoded(self, bounds: range) -> list[EncodedPrompt]:
        return self._encoding.group(bounds.start, self._prompts.read(bounds.start, len(bounds)))

    def _refuse_other_rendering(self, group: CaptureGroup) -> None:
        """A sample that is captured again was captured of the same token ids."""
        lost = set(self._controller.store.lost_ids())
        for prompt in group.wanted:
            sample_id = self.sample_id(prompt)
            known = self._controller.store.get_committed(sample_id) if sample_id in lost else None
            if known is not None and known.metadata.get("rendering", group.rendering) != group.rendering:
                raise _other_rendering(f"the group of {prompt.task_id}")


def _other_order(lease: TaskLease, there: EncodedPrompt | None) -> LedgerError:
    given = None if there is None else there.task_id
    return LedgerError(
        f"Prompt {lease.ordinal} of the ledger is {lease.task_id!r}; this producer has {given!r} there.",
        why="Groups are slices of the prompt order; another order gives other features.",
        next="pass the prompts the run was started with, in the same order.",
    )


def _other_rendering(which: str) -> ConfigError:
    return ConfigError(
        f"The prompts of {which} become other token ids than those this run captured.",
        why="The chat template (one that writes the date, perhaps), the tokenizer or the libraries that run "
        "them differ; a draft of two renderings would be trained on prompts that are not the same. Nothing "
        "was captured.",
        next="put back the target's template and tokenizer and the installed transformers and tokenizers, or "
        "set a new run.name and run.directory.",
    )
