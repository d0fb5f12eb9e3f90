"""Protocol bugs, planted on purpose: each must be found, or the proof proves nothing.

A mutant is a name, what it breaks, and a patch of the product that lasts for a `with` block.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from paceline.capture import producer as capture
from paceline.capture.backpressure import Backpressure
from paceline.capture.groups import Groups
from paceline.features.store import Written
from paceline.ledger import trial
from paceline.ledger.controller import DataFlowController
from paceline.ledger.records import Fence, StepAck
from paceline.ledger.stores.memory import InMemoryMetadataStore as Store
from paceline.loader.loader import PlannedStep, StepLoader
from paceline.loader.passes import Position
from paceline.testing.light_adapters import InMemoryLightFeatureStore
from paceline.testing.simulated_parts import SimulatedFolder
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


def unfenced(real: Any) -> Any:
    return lambda self, *args, fence=None, **kwargs: real(self, *args, **kwargs)


def nothing(_: Any) -> Any:
    return lambda self, *args, **kwargs: None


def acquire(role: str, keep: str) -> Change:
    """A new holder of the role inherits what `keep` names."""

    def change(real: Any) -> Any:
        def acquire_role(self: Store, name: str, holder: str) -> Fence:
            import copy

            kept = copy.deepcopy(getattr(self, keep))
            fence: Fence = real(self, name, holder)
            if name == role:
                setattr(self, keep, kept)
            return fence

        return acquire_role

    return change


def same_epoch(real: Any) -> Any:
    def acquire_role(self: Store, role: str, holder: str) -> Fence:
        fence: Fence = real(self, role, holder)
        self._roles[role] = 1
        return replace(fence, epoch=1)

    return acquire_role


def covered_by_ack(_: Any) -> Any:
    return lambda self, sample_id: sample_id in self._acks


def plan_forgotten(real: Any) -> Any:
    def begin_step(self: Store, plan: Any, **kwargs: Any) -> Any:
        begun = real(self, plan, **kwargs)
        self._plans.pop(plan.step, None)
        return begun

    return begin_step


def reserve_again(real: Any) -> Any:
    def reserve(self: Store, *args: Any, **kwargs: Any) -> Any:
        self._next_generation = 1
        return real(self, *args, **kwargs)

    return reserve


def kept_nothing(real: Any) -> Any:
    """A producer believes that no sample is present."""
    return lambda self: {}


def unasked_skip(real: Any) -> Any:
    """A producer takes what lies there for its own without asking the ledger."""
    return lambda self, through: self._fences["producer"]


def unbounded(real: Any) -> Any:
    return lambda self, keep, epoch=None: real(self, keep)


def release_any_generation(real: Any) -> Any:
    def release(self: DataFlowController, features: Any) -> int:
        class Careless:
            def free(self, written: Iterable[Written]) -> None:
                features.free([(sample_id, 0) for sample_id, _ in written])

        freed: int = real(self, Careless())
        return freed

    return release


def only_wanted(real: Any) -> Any:
    def group(self: Groups, leases: Any) -> Any:
        whole = real(self, leases)
        return replace(whole, members=whole.wanted)

    return group


def acks_survive(real: Any) -> Any:
    def fall_back(self: Store, step: int, **kwargs: Any) -> Any:
        acks = dict(self._acks)
        lost = real(self, step, **kwargs)
        self._acks = acks
        return lost

    return fall_back


def adopted_without_acks(real: Any) -> Any:
    def adopt(self: Store, checkpoint: Any, lineage: Any, **kwargs: Any) -> None:
        acks = {i: replace(a) for i, a in self._acks.items()}
        real(self, checkpoint, lineage, **kwargs)
        self._acks = acks

    return adopt


def new_op_ids(_: Any) -> Any:
    def settled(self: DataFlowController, call: Any) -> Any:
        from paceline.errors import UnknownResultError

        for _ in range(3):
            try:
                return call(uuid.uuid4().hex)
            except UnknownResultError:
                continue
        return call(uuid.uuid4().hex)

    return settled


def all_finished(_: Any) -> Any:
    return property(lambda self: self.refs)


def starts_over(real: Any) -> Any:
    def recover(*args: Any) -> Any:
        start = real(*args)
        return AtTheStart(start.fence, start.head, start.checkpoint)

    return recover


class AtTheStart(Start):
    position = Position()


def no_lineage(real: Any) -> Any:
    def stage(self: Commits, *args: Any) -> None:
        self._since_staged = []
        real(self, *args)

    return stage


def not_claimed(_: Any) -> Any:
    return lambda self, record, epoch: record


def staged_late(real: Any) -> Any:
    """The bytes are taken when they are written."""
    return lambda self: lambda aside: real(self)(aside)


def unchecked_intents(_: Any) -> Any:
    return lambda self, ref: True


def unread_digest(real: Any) -> Any:
    def get(self: InMemoryLightFeatureStore, ref: Any) -> Any:
        from paceline.testing.light_adapters import _unpack

        if ref.sample_id in self.held and ref.feature_store_uri == self.uri:
            return _unpack(self.held[ref.sample_id][1])
        return real(self, ref)

    return get


def reversed_group(real: Any) -> Any:
    return lambda self, worker_id, refs: real(self, worker_id, list(reversed(refs)))


def seed_of_the_moment(real: Any) -> Any:
    calls = iter(range(10**9))
    return lambda run_seed, ordinal: real(run_seed, ordinal + next(calls))


def folds_everything(real: Any) -> Any:
    def compact(self: Store, **kwargs: Any) -> Any:
        folded = real(self, **kwargs)
        self._folded_step = max(self._checkpoints, default=0)
        return folded

    return compact


def durable_may_be_lost(_: Any) -> Any:
    def report_lost(self: Store, sample_ids: Any, *, fence: Any = None) -> None:
        with self._mutation(fence):
            self._lose([i for i in sample_ids if i in self._samples])

    return report_lost


def deaths_forgotten(real: Any) -> Any:
    def acquire_role(self: Store, role: str, holder: str) -> Fence:
        fence: Fence = real(self, role, holder)
        self._deaths.clear()
        for task in self._tasks.values():
            task.deaths = 0
        return fence

    return acquire_role


def never_lost(real: Any) -> Any:
    def report_lost(self: Store, sample_ids: Any, *, fence: Any = None) -> None:
        real(self, [], fence=fence)

    return report_lost


def newest_folder_wins(real: Any) -> Any:
    def recover(store: Any, folder: Any, *args: Any) -> Any:
        found = real(store, folder, *args)
        whole = folder.unrecorded(store.checkpoints())
        return whole[-1] if whole and (found is None or whole[-1][0].step > found[0].step) else found

    return recover


def not_undone(real: Any) -> Any:
    def acquire_role(self: Store, role: str, holder: str) -> Fence:
        acks, step = dict(self._acks), self._trained_step
        fence: Fence = real(self, role, holder)
        if role == "consumer":
            self._acks, self._trained_step = acks, step
        return fence

    return acquire_role


def any_rev(real: Any) -> Any:
    def take_ack(self: Store, ack: StepAck) -> None:
        plan = self._plans.get(ack.step)
        real(self, replace(ack, rev=plan.rev) if plan else ack)

    return take_ack


def any_step(real: Any) -> Any:
    def take_ack(self: Store, ack: StepAck) -> None:
        self._trained_step = ack.step - 1
        real(self, ack)

    return take_ack


def ack_unfenced(real: Any) -> Any:
    def begin_step(self: Store, plan: Any, *, ack: StepAck | None = None, **kwargs: Any) -> Any:
        if ack is not None:
            self._take_ack(ack)
        return real(self, plan, **kwargs)

    return begin_step


def ack_left_out(real: Any) -> Any:
    return lambda self, plan, ack=None, **kwargs: real(self, plan, **kwargs)


MUTANTS: dict[str, Mutant] = {
    "commit without fence": Mutant(
        "a zombie producer commits; with the intents checked that could do no harm, so they are not either",
        ((Store, "commit_samples", unfenced), (Store, "_may_commit", unchecked_intents)),
    ),
    "reserve without fence": Mutant("a zombie producer reserves", ((Store, "reserve", unfenced),)),
    "lease without fence": Mutant("a zombie producer leases", ((Store, "lease_tasks", unfenced),)),
    "ack without fence": Mutant(
        "a zombie consumer acks", ((Store, "ack_step", unfenced), (Store, "begin_step", ack_unfenced))
    ),
    "ack not taken with the plan": Mutant("trained, never freed", ((Store, "begin_step", ack_left_out),)),
    "ack kept over a checkpoint": Mutant(
        "the head covers what is not acked", ((DataFlowController, "write_ack", nothing),)
    ),
    "head without fence": Mutant("a zombie's checkpoint is head", ((Store, "record_checkpoint", unfenced),)),
    "release without fence": Mutant("a zombie deleter frees", ((Store, "begin_release", unfenced),)),
    "facts without fence": Mutant("a zombie ends the stream", ((Store, "set_facts", unfenced),)),
    "epochs stand still": Mutant("nobody is ever fenced", ((Store, "acquire_role", same_epoch),)),
    "collected at ack": Mutant("features go before the head", ((Store, "_is_covered", covered_by_ack),)),
    "acks inherited": Mutant("steps of dead weights count", ((Store, "acquire_role", not_undone),)),
    "plans not written": Mutant("a replay knows no plan", ((Store, "begin_step", plan_forgotten),)),
    "acks in any order": Mutant("steps are acked twice", ((Store, "_take_ack", any_step),)),
    "acks of any revision": Mutant("a revised step is acked as it was", ((Store, "_take_ack", any_rev),)),
    "leases inherited": Mutant(
        "a dead producer's prompts are stuck", ((Store, "acquire_role", acquire("producer", "_tasks")),)
    ),
    "intents inherited": Mutant(
        "a dead producer's bytes are promised for ever",
        ((Store, "acquire_role", acquire("producer", "_intents")),),
    ),
    "generations reused": Mutant("late frees hit new bytes", ((Store, "reserve", reserve_again),)),
    "intents not checked": Mutant(
        "revoked bytes are committed", ((Store, "_may_commit", unchecked_intents),)
    ),
    "sweep keeps nothing": Mutant(
        "committed bytes are swept", ((Store, "present_generations", kept_nothing),)
    ),
    "sweep without bound": Mutant(
        "a zombie sweeps", ((DataFlowController, "skip_generations", unasked_skip),)
    ),
    "checkpoint sweep without bound": Mutant(
        "a zombie removes the head", ((SimulatedFolder, "sweep", unbounded),)
    ),
    "release of any generation": Mutant(
        "a zombie frees what was captured since", ((DataFlowController, "release", release_any_generation),)
    ),
    "recapture alone": Mutant("other batch, other bits", ((Groups, "group", only_wanted),)),
    "recapture with other seeds": Mutant(
        "other answer, other bits", ((capture, "sample_seed", seed_of_the_moment),)
    ),
    "commits out of order": Mutant("another log", ((DataFlowController, "commit_samples", reversed_group),)),
    "losses not reported": Mutant("nobody captures again", ((Store, "report_lost", never_lost),)),
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
        ((Store, "refuse_if_replaced", nothing),),
    ),
    "position not restored": Mutant("visits again", ((training, "recover", starts_over),)),
    "lineage left out": Mutant("heads tell no story", ((Commits, "stage", no_lineage),)),
    "weights taken while they train": Mutant("a head of later weights", ((Ranks, "snapshot", staged_late),)),
    "first visit is the last": Mutant("freed between passes", ((PlannedStep, "finished", all_finished),)),
    "retry under a new op id": Mutant(
        "a call happens twice", ((DataFlowController, "_settled", new_op_ids),)
    ),
    "quarantine forgotten": Mutant("poison comes back", ((Store, "quarantine", nothing),)),
    "deaths forgotten": Mutant("it kills for ever", ((Store, "acquire_role", deaths_forgotten),)),
    "one death convicts": Mutant(
        "the innocent are set aside",
        ((trial, "DEATHS_TO_CONVICT", lambda _: 1), (isolation, "DEATHS_BEFORE_TRIAL", lambda _: 1)),
    ),
    "folded too early": Mutant("no way back", ((Store, "compact", folds_everything),)),
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
        crash_free(world.shape.weights_only, world.poison)  # what to expect is the healthy product's to say
        with MUTANTS[name].planted():
            try:
                simulate(seed)
            except Exception:  # noqa: BLE001 (whatever it breaks, it is found)
                return seed + 1
    return None
