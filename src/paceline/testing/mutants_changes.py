"""The functions that the mutants of mutants.py put in the place of the product's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from paceline.capture.groups import Groups
from paceline.errors import UnknownResultError
from paceline.features.store import Written
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import Fence, Page, State, StepAck
from paceline.ledger.session import Session
from paceline.loader.passes import Position
from paceline.testing.light_adapters import InMemoryLightFeatureStore
from paceline.testing.specification_of_steps import SpecificationLedger as Store
from paceline.training.checkpoint_writer import CheckpointWriter
from paceline.training.recovery import Start

Change = Callable[[Any], Any]  # a function to the one that takes its place


@dataclass(frozen=True)
class Mutant:
    breaks: str
    changes: tuple[tuple[Any, str, Change], ...]

    @contextmanager
    def planted(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, change in self.changes:
                stack.enter_context(patch.object(owner, name, change(getattr(owner, name))))
            yield


# -- fences --------------------------------------------------------------------------------


def current(ledger: Store, fence: Fence | None) -> Fence | None:
    """The fence that the role's holder has by now."""
    if fence is None or fence.epoch == ledger.rows.roles[fence.role].epoch:
        return fence
    return Fence(fence.role, ledger.rows.roles[fence.role].epoch)


def unfenced(real: Any) -> Any:
    return lambda self, fence, *args, **kwargs: real(self, current(self, fence), *args, **kwargs)


def same_epoch(_: Any) -> Any:
    def next_epoch(self: Store, role: str) -> Fence:
        from paceline.testing.specification import Role

        self.rows.roles[role] = Role(1)
        return Fence(role, 1)

    return next_epoch


def ops_forgotten(real: Any) -> Any:
    """Every call looks like a new one."""

    @contextmanager
    def mutation(self: Store, fence: Fence | None) -> Iterator[Any]:
        with real(self, fence and replace(fence, op=None)) as operation:
            yield operation

    return mutation


def new_ops(_: Any) -> Any:
    """A repeated call is numbered as another one."""

    def change(self: Session, call: Any, *args: Any, **kwargs: Any) -> Any:
        for _ in range(3):
            self._last_op += 1
            try:
                return call(self.fence.call(self._last_op), *args, **kwargs)
            except UnknownResultError:
                continue
        self._last_op += 1
        return call(self.fence.call(self._last_op), *args, **kwargs)

    return change


def nothing(_: Any) -> Any:
    return lambda self, *args, **kwargs: None


# -- what a start inherits -----------------------------------------------------------------


def keeps(name: str) -> Change:
    """A producer that starts inherits what `name` says."""

    def change(real: Any) -> Any:
        def end_work_of(self: Store, worker: str) -> None:
            kept = copy.deepcopy(getattr(self.rows, name))
            real(self, worker)
            setattr(self.rows, name, kept)

        return end_work_of

    return change


def of_all_workers(real: Any) -> Any:
    """As if there were one producer only."""

    def end_work_of(self: Store, worker: str) -> None:
        for name in {i.worker for i in self.rows.intents.values()} | {worker}:
            real(self, name)

    return end_work_of


def deaths_forgotten(real: Any) -> Any:
    def acquire(self: Store, role: str, holder: str, *order: Any) -> Fence:
        fence: Fence = real(self, role, holder, *order)
        self.rows.deaths.clear()
        for prompt in self.rows.prompts.values():
            prompt.deaths = 0
        return fence

    return acquire


def not_undone(real: Any) -> Any:
    def begin_consumer(self: Store) -> None:
        step = self.rows.trained_step
        with patch.object(Store, "_undo_provisional_acks", lambda _: None):
            real(self)
        self.rows.trained_step = step

    return begin_consumer


# -- the ledger's rules --------------------------------------------------------------------


def covered_by_ack(_: Any) -> Any:
    return lambda self, sample: sample.acked > 0


def plan_forgotten(real: Any) -> Any:
    def plan(self: Store, fence: Any, plan: Any, *ack: Any) -> Any:
        begun = real(self, fence, plan, *ack)
        if plan is not None:
            self.rows.plans.pop(plan.step, None)
        return begun

    return plan


def ack_left_out(real: Any) -> Any:
    return lambda self, fence, plan, ack=None: real(self, fence, plan, ack if plan is None else None)


def any_step(real: Any) -> Any:
    def check_ack(self: Store, ack: StepAck) -> None:
        self.rows.trained_step = ack.step - 1
        real(self, ack)

    return check_ack


def any_rev(real: Any) -> Any:
    def check_ack(self: Store, ack: StepAck) -> None:
        plan = self.rows.plans.get(ack.step)
        real(self, replace(ack, rev=plan.rev) if plan else ack)

    return check_ack


def generations_reused(real: Any) -> Any:
    def reserve(self: Store, *args: Any) -> Any:
        taken = {g for g, intent in self.rows.intents.items() if not intent.revoked}
        self.rows.next_generation = max(taken, default=0) + 1
        return real(self, *args)

    return reserve


def unchecked_intents(_: Any) -> Any:
    return lambda self, ref: True


def any_workers_intent(_: Any) -> Any:
    def may_commit(self: Store, ref: Any) -> bool:
        return self.rows.intents.get(ref.generation) is not None or ref.sample_id in self.rows.samples

    return may_commit


def acks_survive(real: Any) -> Any:
    def fall_back(self: Store, *args: Any) -> Any:
        acks = {i: (s.acked, s.step) for i, s in self.rows.samples.items()}
        lost = real(self, *args)
        for sample_id, (acked, step) in acks.items():
            self.rows.samples[sample_id].acked, self.rows.samples[sample_id].step = acked, step
        return lost

    return fall_back


def durable_may_be_lost(_: Any) -> Any:
    def report_lost(self: Store, fence: Any, sample_ids: Any) -> None:
        with self._mutation(fence):
            self._lose([self.rows.samples[i] for i in sample_ids if i in self.rows.samples])

    return report_lost


def archives_everything(real: Any) -> Any:
    def retire(self: Store, *args: Any) -> Any:
        archived = real(self, *args)
        self.rows.archived_step = max(self.rows.checkpoints, default=0)
        return archived

    return retire


def archives_what_is_read(real: Any) -> Any:
    """Behind the oldest checkpoint's place in the log there is nothing that a resume reads."""

    def retire(self: Store, *args: Any) -> Any:
        ahead = {s: replace(c, first_place=1 << 40) for s, c in self.rows.checkpoints.items()}
        kept, self.rows.checkpoints = self.rows.checkpoints, ahead
        archived = real(self, *args)
        self.rows.checkpoints = {step: kept[step] for step in self.rows.checkpoints}
        return archived

    return retire


def past_a_hole(_: Any) -> Any:
    """Whatever was committed is read, though a prompt before it is still being captured."""

    def settled(self: Store) -> int:
        return max((sample.place + 1 for sample in self.rows.samples.values()), default=0)

    return settled


def holes_left_open(real: Any) -> Any:
    """What failed for good may be captured after all."""

    def lease(self: Store, *args: Any) -> Any:
        for prompt in self.rows.prompts.values():
            if prompt.state == "failed":
                prompt.state = "pending"
        return real(self, *args)

    return lease


def leased_twice(real: Any) -> Any:
    """What another worker holds looks like a prompt that nobody captures."""

    def lease(self: Store, fence: Any, *args: Any) -> Any:
        for prompt in self.rows.prompts.values():
            if prompt.state == "leased" and fence is not None and prompt.worker != fence.worker:
                prompt.state = "pending"
        return real(self, fence, *args)

    return lease


def unbounded_lease(real: Any) -> Any:
    return lambda self, fence, limit, group_size=None, below=None: real(self, fence, limit, group_size)


def ends_early(_: Any) -> Any:
    def end_stream(self: Store, fence: Any, ended: bool) -> bool:
        with self._mutation(fence):
            self.rows.closed = ended and self.rows.next_ordinal >= self.rows.num_prompts
            return self.rows.closed

    return end_stream


# -- the producer's side -------------------------------------------------------------------


def without_new_epoch(_: Any) -> Any:
    """Its leases return, and it may go on."""

    def take_from(self: ProducerSession, worker: str) -> None:
        assert isinstance(self.ledger, Store)
        self.ledger._end_work_of(worker)

    return take_from


def kept_unchecked(real: Any) -> Any:
    """Whoever was replaced writes its answer after its successor's."""
    return lambda self, answers, check=None: real(self, answers)


def budget_beside_reserve(real: Any) -> Any:
    """It was looked at before the wait, and is not looked at when bytes are promised."""
    return lambda self, wanted, budget=None: real(self, wanted, None)


def owns_nothing(real: Any) -> Any:
    """A producer believes that no sample is present, and that nobody promised any."""
    return lambda self: replace(real(self), present={}, promised={})


def only_mine(real: Any) -> Any:
    """A producer takes what others promised for bytes of nobody."""

    def ownership(self: ProducerSession) -> Any:
        return replace(real(self), promised={})

    return ownership


def swept_unseen(real: Any) -> Any:
    """What was revoked is forgotten, and its bytes are not freed."""

    def revoked(self: ProducerSession) -> list[Any]:
        gone = real(self)
        if gone:
            self.swept([generation for _, generation in gone])
        return []

    return revoked


def only_wanted(real: Any) -> Any:
    def group(self: Groups, leases: Any) -> Any:
        whole = real(self, leases)
        return replace(whole, members=whole.wanted)

    return group


def seed_of_the_moment(real: Any) -> Any:
    calls = iter(range(10**9))
    return lambda run_seed, ordinal: real(run_seed, ordinal + next(calls))


def reversed_places(real: Any) -> Any:
    """Another place than that of the prompt."""

    def commit(self: ProducerSession, refs: Any) -> Any:
        turned = [replace(ref, ordinal=other.ordinal) for ref, other in zip(refs, refs[::-1], strict=True)]
        return real(self, turned)

    return commit


# -- the consumer's side -------------------------------------------------------------------


def release_any_generation(real: Any) -> Any:
    def release(self: ConsumerSession, features: Any) -> int:
        class Careless:
            def free(self, written: Iterable[Written]) -> None:
                features.free([(sample_id, 0) for sample_id, _ in written])

        freed: int = real(self, Careless())
        return freed

    return release


def all_finished(_: Any) -> Any:
    return property(lambda self: self.refs)


def starts_over(real: Any) -> Any:
    def recover(*args: Any) -> Any:
        start = real(*args)
        return AtTheStart(start.head, start.checkpoint)

    return recover


class AtTheStart(Start):
    position = Position()


def no_lineage(real: Any) -> Any:
    def stage(self: CheckpointWriter, *args: Any, **kwargs: Any) -> None:
        self._since_begun = []
        real(self, *args, **kwargs)

    return stage


def unbounded(real: Any) -> Any:
    return lambda self, keep, epoch=None: real(self, keep)


def not_claimed(_: Any) -> Any:
    return lambda self, record, epoch: record


class _Late(Mapping[str, Any]):
    def __init__(self, files: Callable[[], Mapping[str, Any]]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Any:
        return self._files()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files())

    def __len__(self) -> int:
        return len(self._files())


def staged_late(real: Any) -> Any:
    """The bytes are taken when they are written."""
    return lambda self: _Late(lambda: real(self))


def unread_digest(real: Any) -> Any:
    def get(self: InMemoryLightFeatureStore, ref: Any) -> Any:
        from paceline.testing.light_adapters import _unpack

        if ref.sample_id in self.held and ref.feature_store_uri == self.uri:
            return _unpack(self.held[ref.sample_id][1])
        return real(self, ref)

    return get


def newest_folder_wins(real: Any) -> Any:
    def find(session: Any, folder: Any, *args: Any) -> Any:
        records = session.checkpoints()
        whole = folder.unrecorded(records)
        newest = whole[-1] if whole else None
        if newest is not None and (not records or newest[0].step > records[-1].step):
            return newest  # and the ledger is not told
        return real(session, folder, *args)

    return find


def page_of_present(real: Any) -> Any:
    """A sample that is lost looks as if it had never been."""

    def read(self: Store, start: int, stop: int) -> Page:
        page: Page = real(self, start, stop)
        return replace(page, entries=tuple(e for e in page.entries if e.state != State.LOST))

    return read
