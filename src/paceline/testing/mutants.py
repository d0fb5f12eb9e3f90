"""Protocol bugs, planted on purpose: each must be found, or the proof proves nothing.

A mutant is a name, what it breaks, and a patch of the product that lasts for a `with` block. It is found by
a broken promise only: an AssertionError (of the oracle, or that the run does not end). A mutant that raises
anything else is a broken mutant.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from paceline.capture import producer as capture
from paceline.capture.backpressure import Backpressure
from paceline.capture.groups import Groups
from paceline.errors import UnknownResultError
from paceline.features.store import Written
from paceline.ledger import isolation as bisection
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import Fence, Page, State, StepAck
from paceline.ledger.session import Session
from paceline.loader.loader import PlannedStep, StepLoader
from paceline.loader.passes import Position
from paceline.testing.light_adapters import InMemoryLightFeatureStore
from paceline.testing.simulated_parts import SimulatedFolder
from paceline.testing.specification_of_steps import SpecificationLedger as Store
from paceline.training import isolation, recovery
from paceline.training import trainer as training
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.commits import Commits
from paceline.training.coordinator import Coordinator
from paceline.training.recovery import Start
from paceline.training.worker import Ranks

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
    return None if fence is None else replace(fence, epoch=ledger.rows.roles[fence.role].epoch)


def unfenced(real: Any) -> Any:
    def call(self: Store, fence: Fence | None, op: int | None, *args: Any, **kwargs: Any) -> Any:
        now = current(self, fence)
        return real(self, now, op if now == fence else None, *args, **kwargs)

    return call


def release_unfenced(real: Any) -> Any:
    return lambda self, fence, limit: real(self, current(self, fence), limit)


def same_epoch(_: Any) -> Any:
    def next_epoch(self: Store, role: str) -> Fence:
        from paceline.testing.specification import Role

        self.rows.roles[role] = Role(1)
        return Fence(role, 1)

    return next_epoch


def ops_forgotten(real: Any) -> Any:
    """Every call looks like a new one."""

    @contextmanager
    def mutation(self: Store, fence: Fence | None, op: int | None = None) -> Iterator[Any]:
        with real(self, fence, None) as operation:
            yield operation

    return mutation


def new_ops(_: Any) -> Any:
    """A repeated call is numbered as another one."""

    def change(self: Session, call: Any, *args: Any, **kwargs: Any) -> Any:
        for _ in range(3):
            self._last_op += 1
            try:
                return call(self.fence, self._last_op, *args, **kwargs)
            except UnknownResultError:
                continue
        self._last_op += 1
        return call(self.fence, self._last_op, *args, **kwargs)

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
    def plan(self: Store, fence: Any, op: Any, plan: Any, *ack: Any) -> Any:
        begun = real(self, fence, op, plan, *ack)
        if plan is not None:
            self.rows.plans.pop(plan.step, None)
        return begun

    return plan


def ack_left_out(real: Any) -> Any:
    return lambda self, fence, op, plan, ack=None: real(self, fence, op, plan, ack if plan is None else None)


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
    return lambda self, ref, worker: True


def any_workers_intent(_: Any) -> Any:
    def may_commit(self: Store, ref: Any, worker: str) -> bool:
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
    def report_lost(self: Store, fence: Any, op: Any, sample_ids: Any) -> None:
        with self._mutation(fence, op):
            self._lose([self.rows.samples[i] for i in sample_ids if i in self.rows.samples])

    return report_lost


def archives_everything(real: Any) -> Any:
    def compact(self: Store, *args: Any) -> Any:
        archived = real(self, *args)
        self.rows.archived_step = max(self.rows.checkpoints, default=0)
        return archived

    return compact


def archives_what_is_read(real: Any) -> Any:
    """Behind the oldest checkpoint's place in the log there is nothing that a resume reads."""

    def compact(self: Store, *args: Any) -> Any:
        ahead = {s: replace(c, first_place=1 << 40) for s, c in self.rows.checkpoints.items()}
        kept, self.rows.checkpoints = self.rows.checkpoints, ahead
        archived = real(self, *args)
        self.rows.checkpoints = kept
        return archived

    return compact


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


def ends_early(_: Any) -> Any:
    def end_stream(self: Store, fence: Any, op: Any, ended: bool) -> bool:
        with self._mutation(fence, op):
            self.rows.closed = ended and self.rows.next_ordinal >= self.rows.num_prompts
            return self.rows.closed

    return end_stream


# -- the producer's side -------------------------------------------------------------------


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
    def stage(self: Commits, *args: Any, **kwargs: Any) -> None:
        self._since_staged = []
        real(self, *args, **kwargs)

    return stage


def unbounded(real: Any) -> Any:
    return lambda self, keep, epoch=None: real(self, keep)


def not_claimed(_: Any) -> Any:
    return lambda self, record, epoch: record


def staged_late(real: Any) -> Any:
    """The bytes are taken when they are written."""
    return lambda self: lambda aside: real(self)(aside)


def unread_digest(real: Any) -> Any:
    def get(self: InMemoryLightFeatureStore, ref: Any) -> Any:
        from paceline.testing.light_adapters import _unpack

        if ref.sample_id in self.held and ref.feature_store_uri == self.uri:
            return _unpack(self.held[ref.sample_id][1])
        return real(self, ref)

    return get


def newest_folder_wins(real: Any) -> Any:
    def find(session: Any, folder: Any, *args: Any) -> Any:
        found = real(session, folder, *args)
        whole = folder.unrecorded(session.checkpoints())
        return whole[-1] if whole and (found is None or whole[-1][0].step > found[0].step) else found

    return find


def page_of_present(real: Any) -> Any:
    """A sample that is lost looks as if it had never been."""

    def read(self: Store, start: int, stop: int) -> Page:
        page: Page = real(self, start, stop)
        return replace(page, entries=tuple(e for e in page.entries if e.state != State.LOST))

    return read


MUTANTS: dict[str, Mutant] = {
    "commit without fence": Mutant(
        "a zombie producer commits; with the intents checked that could do no harm, so they are not either",
        ((Store, "commit", unfenced), (Store, "_may_commit", unchecked_intents)),
    ),
    "reserve without fence": Mutant("a zombie producer reserves", ((Store, "reserve", unfenced),)),
    "lease without fence": Mutant("a zombie producer leases", ((Store, "lease", unfenced),)),
    "fail without fence": Mutant("a zombie fails its successor's prompt", ((Store, "fail", unfenced),)),
    "plan and ack without fence": Mutant("a zombie consumer acks", ((Store, "plan", unfenced),)),
    "ack not taken with the plan": Mutant("trained, never freed", ((Store, "plan", ack_left_out),)),
    "ack kept over a checkpoint": Mutant(
        "the head covers what is not acked", ((ConsumerSession, "write_ack", nothing),)
    ),
    "head without fence": Mutant("a zombie's checkpoint is head", ((Store, "head", unfenced),)),
    "release without fence": Mutant("a zombie deleter frees", ((Store, "releasable", release_unfenced),)),
    "facts without fence": Mutant("a zombie asks for a checkpoint", ((Store, "set_facts", unfenced),)),
    "end without fence": Mutant("a zombie ends the stream", ((Store, "end_stream", unfenced),)),
    "epochs stand still": Mutant("nobody is ever fenced", ((Store, "_next_epoch", same_epoch),)),
    "op id forgotten": Mutant("a call happens twice", ((Store, "_mutation", ops_forgotten),)),
    "retry under a new op id": Mutant("a call happens twice", ((Session, "_change", new_ops),)),
    "collected at ack": Mutant("features go before the head", ((Store, "_is_covered", covered_by_ack),)),
    "acks inherited": Mutant("steps of dead weights count", ((Store, "_begin_consumer", not_undone),)),
    "plans not written": Mutant("a replay knows no plan", ((Store, "plan", plan_forgotten),)),
    "acks in any order": Mutant("steps are acked twice", ((Store, "_check_ack", any_step),)),
    "acks of any revision": Mutant("a revised step is acked as it was", ((Store, "_check_ack", any_rev),)),
    "leases inherited": Mutant(
        "a dead producer's prompts are stuck", ((Store, "_end_work_of", keeps("prompts")),)
    ),
    "intents inherited": Mutant(
        "a dead producer's bytes are promised for ever", ((Store, "_end_work_of", keeps("intents")),)
    ),
    "a start revokes another worker's work": Mutant(
        "what its neighbour is about to commit is refused", ((Store, "_end_work_of", of_all_workers),)
    ),
    "generations reused": Mutant("late frees hit new bytes", ((Store, "reserve", generations_reused),)),
    "intents not checked": Mutant(
        "revoked bytes are committed", ((Store, "_may_commit", unchecked_intents),)
    ),
    "intents of anybody": Mutant(
        "bytes of another worker are committed", ((Store, "_may_commit", any_workers_intent),)
    ),
    "budget checked outside reserve": Mutant(
        "workers promise more than there is, together",
        ((ProducerSession, "reserve", budget_beside_reserve),),
    ),
    "prefix read past a hole": Mutant(
        "plans depend on which worker was faster", ((Store, "_settled", past_a_hole),)
    ),
    "failed prompts come back": Mutant("other plans, other bits", ((Store, "lease", holes_left_open),)),
    "stream ended early": Mutant("the last samples are never trained", ((Store, "end_stream", ends_early),)),
    "lost samples not read": Mutant("a step is planned without them", ((Store, "read", page_of_present),)),
    "sweep keeps nothing": Mutant(
        "committed bytes are swept", ((ProducerSession, "ownership", owns_nothing),)
    ),
    "sweep of what others promised": Mutant(
        "a neighbour's bytes are swept", ((ProducerSession, "ownership", only_mine),)
    ),
    "revoked bytes forgotten": Mutant(
        "they lie there for ever", ((ProducerSession, "revoked", swept_unseen),)
    ),
    "checkpoint sweep without bound": Mutant(
        "a zombie removes the head", ((SimulatedFolder, "sweep", unbounded),)
    ),
    "release of any generation": Mutant(
        "a zombie frees what was captured since", ((ConsumerSession, "release", release_any_generation),)
    ),
    "recapture alone": Mutant("other batch, other bits", ((Groups, "group", only_wanted),)),
    "recapture with other seeds": Mutant(
        "other answer, other bits", ((capture, "sample_seed", seed_of_the_moment),)
    ),
    "commits in other places": Mutant("another log", ((ProducerSession, "commit", reversed_places),)),
    "losses not reported": Mutant("nobody captures again", ((Session, "report_lost", nothing),)),
    "durable samples lost": Mutant(
        "captured again for nothing", ((Store, "report_lost", durable_may_be_lost),)
    ),
    "digest not verified": Mutant("damage is trained", ((InMemoryLightFeatureStore, "get", unread_digest),)),
    "checkpoint never early": Mutant("both sides wait", ((Coordinator, "relieve_pressure", nothing),)),
    "checkpoint never asked for": Mutant(
        "both sides wait", ((Backpressure, "_ask_for_checkpoint", nothing),)
    ),
    "fall back keeps acks": Mutant("samples are skipped", ((Store, "fall_back", acks_survive),)),
    "newest folder wins": Mutant(
        "ledger and weights differ", ((recovery, "find_checkpoint", newest_folder_wins),)
    ),
    "adopted without a claim": Mutant(
        "a zombie sweeps what is being adopted",
        ((SimulatedFolder, "claim", not_claimed), (CheckpointFolder, "claim", not_claimed)),
    ),
    "claimed though replaced": Mutant(
        "a zombie renames what its successor is about to record",
        ((Session, "refuse_if_replaced", nothing),),
    ),
    "position not restored": Mutant("visits again", ((training, "recover", starts_over),)),
    "lineage left out": Mutant("heads tell no story", ((Commits, "stage", no_lineage),)),
    "weights taken while they train": Mutant("a head of later weights", ((Ranks, "snapshot", staged_late),)),
    "first visit is the last": Mutant("freed between passes", ((PlannedStep, "finished", all_finished),)),
    "quarantine forgotten": Mutant("poison comes back", ((Store, "quarantine", nothing),)),
    "deaths forgotten": Mutant("it kills for ever", ((Store, "acquire", deaths_forgotten),)),
    "one death convicts": Mutant(
        "the innocent are set aside",
        (
            (bisection, "DEATHS_TO_CONVICT", lambda _: 1),
            (isolation, "DEATHS_BEFORE_ISOLATION", lambda _: 1),
        ),
    ),
    "archived too early": Mutant("no way back", ((Store, "compact", archives_everything),)),
    "archived though it is read": Mutant(
        "a resume finds no samples", ((Store, "compact", archives_what_is_read),)
    ),
    "revision not planned": Mutant(
        "poison is trained",
        ((StepLoader, "revise", lambda real: lambda self, planned, quarantined: planned),),
    ),
}


def seeds_to_detect(name: str, seeds_max: int) -> int | None:
    """How many seeds the simulation needs to find the mutant; None if it survives them all."""
    from paceline.testing.simulation import crash_free, draw, simulate

    for seed in range(seeds_max):
        world = draw(seed)
        world.disk.close()
        crash_free(world.shape.weights_only, world.poison)  # what to expect is the healthy product's to say
        with MUTANTS[name].planted():
            try:
                simulate(seed)
            except AssertionError:
                return seed + 1
    return None
