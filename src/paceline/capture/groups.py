"""Capture groups: which prompts are captured together, and a check that their token ids never change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from paceline.capture.encoding import EncodedPrompt, Encoding, rendering_of
from paceline.capture.first_answers import FirstAnswers, other_rendering
from paceline.data.source import PromptSource, digest_of, group_of
from paceline.errors import ConfigError, LedgerError
from paceline.features.store import Written
from paceline.ledger.facts import RENDERING, producers_in
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import Lease, SourceBlock, State

KNOWN_AMONG = 1024  # how many of the run's first prompts are searched for one that was captured


@dataclass(frozen=True)
class CaptureGroup:
    """Prompts that are captured together. `wanted`: the members whose samples are needed.

    `rendering`: digest of the token ids of the whole group, failed prompts included. `deaths`: how many
    producers died while they held a lease of a wanted prompt; the largest count of any of them. `lost`: by
    ordinal, the wanted prompts whose samples were captured before, with the id and generation of those bytes.
    """

    wanted: tuple[EncodedPrompt, ...]
    members: tuple[EncodedPrompt, ...]
    rendering: str
    deaths: int = 0
    lost: Mapping[int, Written] = field(default_factory=dict)

    @property
    def wanted_ids(self) -> list[str]:
        return [prompt.task_id for prompt in self.wanted]

    def without(self, task_ids: Sequence[str]) -> CaptureGroup:
        gone = set(task_ids)
        wanted = tuple(prompt for prompt in self.wanted if prompt.task_id not in gone)
        members = tuple(prompt for prompt in self.members if prompt.task_id not in gone)
        return replace(self, wanted=wanted, members=members)


class Groups:
    """Reads and encodes a run's prompts, group by group."""

    def __init__(
        self,
        session: ProducerSession,
        prompts: PromptSource,
        encoding: Encoding,
        group_size: int,
        answers: FirstAnswers | None = None,
    ) -> None:
        """`answers`: given for an engine that does not repeat its bits; a group need not be whole then."""
        self._session = session
        self._answers = answers
        self._prompts = prompts
        self._encoding = encoding
        self._group_size = group_size
        self._registered: int | None = None  # the size of the source that was registered last

    def bounds(self, ordinal: int) -> range:
        """The ordinals of the group that holds `ordinal`."""
        return group_of(ordinal, self._group_size, self._prompts.starts)

    def group(self, leases: Sequence[Lease]) -> CaptureGroup:
        """The group that these leases belong to, without prompts that failed for good.

        All leases are of one group. Raises ConfigError, and gives the leases back, if a prompt that was
        captured before now has other token ids, or is too long for a run that must not leave one out.
        """
        try:
            return self._group(leases)
        except ConfigError:
            self._session.give_back([lease.ordinal for lease in leases])
            raise

    def _group(self, leases: Sequence[Lease]) -> CaptureGroup:
        bounds = self.bounds(leases[0].ordinal)
        encoded = self._encoded(bounds)
        by_ordinal = {prompt.ordinal: prompt for prompt in encoded}
        for lease in leases:
            if lease.ordinal not in by_ordinal:
                raise _too_few(lease.ordinal)
        failed = self._session.failed(bounds.start, bounds.stop)
        wanted = tuple(by_ordinal[lease.ordinal] for lease in leases)
        rendering, deaths = rendering_of(encoded), max(lease.deaths for lease in leases)
        lost = self._lost(wanted, rendering)
        if self._answers is not None:
            wanted = tuple(self._with_answer(prompt, prompt.ordinal in lost) for prompt in wanted)
            return CaptureGroup(wanted, wanted, rendering, deaths, lost)
        members = tuple(prompt for prompt in encoded if prompt.ordinal not in failed)
        return CaptureGroup(wanted, members, rendering, deaths, lost)

    def make_known(self) -> bool:
        """Register prompts that the ledger does not know yet; whether there were any.

        A source with an end is registered whole, by its blocks' digests; one without, a group at a time.
        Raises ConfigError if the ledger knows other prompts.
        """
        size = self._prompts.size
        if size is not None and size == self._registered:
            return False  # to register it again would be a change, which ends every wait for one
        known = self._session.snapshot().prompts.known
        if size is not None:
            ends = [block.first + block.count for block in self._session.source_blocks()]
            fresh = self._session.extend(self._prompts.blocks(ends)) > 0
            self._registered = size
            return fresh
        more = self._prompts.read(known, self._group_size)
        if not more:
            return False
        return self._session.extend([SourceBlock(known, len(more), digest_of(more))]) > 0

    def bind_rendering(self) -> None:
        """Make the digest of the first group's token ids a fact of the run.

        Until a sample is committed a start may record another one, unless another producer is at work, which
        may have recorded it. Raises ConfigError if the digest on record is another one.
        """
        now = rendering_of(self._encoded(self.bounds(0)))
        recorded = self._session.settle_facts({RENDERING: now})[RENDERING]
        if recorded == now:
            return
        state = self._session.snapshot()
        if state.committed or producers_in(state.facts).keys() - {self._session.worker}:
            raise other_rendering("the first group")
        self._session.set_facts({RENDERING: now})

    def captured_before(self) -> EncodedPrompt | None:
        """A prompt of the run that was captured; None if none was."""
        now = self._session.snapshot()
        there = {entry.ref.ordinal for entry in self._session.read(0, KNOWN_AMONG).entries}
        failed = self._session.failed(0, KNOWN_AMONG)
        if now.committed:
            for ordinal, prompt in enumerate(self._prompts.read(0, KNOWN_AMONG)):
                was_captured = ordinal in there or (ordinal < now.archived_place and ordinal not in failed)
                encoded = self._encoding.prompt(ordinal, prompt) if was_captured else None
                if encoded is not None and not encoded.broken:
                    return encoded
        return None

    def _encoded(self, bounds: range) -> list[EncodedPrompt]:
        return self._encoding.group(bounds.start, self._prompts.read(bounds.start, len(bounds)))

    def _lost(self, wanted: Sequence[EncodedPrompt], rendering: str) -> dict[int, Written]:
        """The prompts captured before. Raises ConfigError if their token ids were others."""
        known = self._session.find([sample_id(self._session.run_id, prompt) for prompt in wanted])
        lost = {}
        for prompt in wanted:
            record = known.get(sample_id(self._session.run_id, prompt))
            if record is None or record.state != State.LOST:
                continue
            if record.ref.metadata.get("rendering", rendering) != rendering:
                raise other_rendering(f"the group of {prompt.task_id}")
            lost[prompt.ordinal] = record.sample_id, record.ref.generation
        return lost

    def _with_answer(self, prompt: EncodedPrompt, is_lost: bool) -> EncodedPrompt:
        """The prompt with the answer that was first written for it; a lost one that has none is broken."""
        assert self._answers is not None
        kept = self._answers.of(prompt, is_lost=is_lost)
        if kept is None and is_lost:
            gone = "its answer is missing from the kept answers, and the engine would write a different one"
            return replace(prompt, token_ids=(), broken=gone)
        return kept or prompt


def sample_id(run_id: str, prompt: EncodedPrompt) -> str:
    """A sample's identity is its prompt's: `run:task`. The same after any number of restarts."""
    return f"{run_id}:{prompt.task_id}"


def _too_few(ordinal: int) -> LedgerError:
    return LedgerError(
        f"The ledger knows prompt {ordinal}, but this producer's prompts end before it.",
        why="Groups are slices of the prompt order; another order gives other features.",
        next="pass the prompts that the run was started with, in the same order.",
    )
