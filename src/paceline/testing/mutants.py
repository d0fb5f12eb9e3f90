"""Protocol bugs, planted on purpose: the tests must find each, or they prove nothing.

A mutant is a name, what it breaks, and a patch of the product that lasts for a `with` block. Only an
AssertionError (of the oracle, or because the run does not end) counts as found. A mutant that raises anything
else is a broken mutant.
"""

from __future__ import annotations

from paceline.capture import samples
from paceline.capture.backpressure import Backpressure
from paceline.capture.groups import Groups
from paceline.capture.neighbours import Neighbours
from paceline.data.answers import AnswerFiles
from paceline.ledger import isolation as bisection
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.session import Session
from paceline.loader.loader import StepLoader
from paceline.loader.planned import PlannedStep
from paceline.testing.light_adapters import InMemoryLightFeatureStore
from paceline.testing.mutants_changes import (
    Mutant,
    ack_left_out,
    acks_survive,
    all_finished,
    any_rev,
    any_step,
    any_workers_intent,
    archives_everything,
    archives_what_is_read,
    budget_beside_reserve,
    covered_by_ack,
    deaths_forgotten,
    durable_may_be_lost,
    ends_early,
    generations_reused,
    holes_left_open,
    keeps,
    kept_unchecked,
    leased_twice,
    new_ops,
    newest_folder_wins,
    no_lineage,
    not_claimed,
    not_undone,
    nothing,
    of_all_workers,
    only_mine,
    only_wanted,
    ops_forgotten,
    owns_nothing,
    page_of_present,
    past_a_hole,
    plan_forgotten,
    release_any_generation,
    reversed_places,
    same_epoch,
    seed_of_the_moment,
    staged_late,
    starts_over,
    swept_unseen,
    unbounded,
    unbounded_lease,
    unchecked_intents,
    unfenced,
    unread_digest,
    without_new_epoch,
)
from paceline.testing.simulated_parts import SimulatedFolder
from paceline.testing.specification_of_steps import SpecificationLedger as Store
from paceline.training import isolation, recovery
from paceline.training import trainer as training
from paceline.training.checkpoint import CheckpointFolder
from paceline.training.checkpoint_writer import CheckpointWriter
from paceline.training.coordinator import Coordinator
from paceline.training.ranks import Ranks

MUTANTS: dict[str, Mutant] = {
    "commit without fence": Mutant(
        "a zombie producer commits; with the intents checked that could do no harm, so they are not either",
        ((Store, "commit", unfenced), (Store, "_may_commit", unchecked_intents)),
    ),
    "reserve without fence": Mutant("a zombie producer reserves", ((Store, "reserve", unfenced),)),
    "lease without fence": Mutant("a zombie producer leases", ((Store, "lease", unfenced),)),
    "fail without fence": Mutant("a zombie fails its successor's prompt", ((Store, "give_back", unfenced),)),
    "plan and ack without fence": Mutant("a zombie consumer acks", ((Store, "plan", unfenced),)),
    "ack not taken with the plan": Mutant("trained, never freed", ((Store, "plan", ack_left_out),)),
    "ack kept over a checkpoint": Mutant(
        "the head covers what is not acked", ((ConsumerSession, "write_ack", nothing),)
    ),
    "head without fence": Mutant("a zombie's checkpoint is head", ((Store, "head", unfenced),)),
    "release without fence": Mutant("a zombie deleter frees", ((Store, "release", unfenced),)),
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
    "leased twice": Mutant("two workers capture one prompt", ((Store, "lease", leased_twice),)),
    "leased beyond the bound": Mutant(
        "who runs ahead takes the room of the group that all wait for", ((Store, "lease", unbounded_lease),)
    ),
    "nobody keeps room": Mutant(
        "captured work is given up, again and again", ((Neighbours, "bound", nothing),)
    ),
    "the silent keep their work": Mutant(
        "a dead producer's prompts are stuck", ((ProducerSession, "take_from", nothing),)
    ),
    "given up without a new epoch": Mutant(
        "a zombie goes on beside who took its work",
        ((ProducerSession, "take_from", without_new_epoch),),
    ),
    "late answers kept": Mutant(
        "a sample comes back with another answer than was committed", ((AnswerFiles, "keep", kept_unchecked),)
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
        "other answer, other bits", ((samples, "sample_seed", seed_of_the_moment),)
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
    "lineage left out": Mutant("heads tell no story", ((CheckpointWriter, "begin", no_lineage),)),
    "weights taken while they train": Mutant("a head of later weights", ((Ranks, "files", staged_late),)),
    "first visit is the last": Mutant("freed between passes", ((PlannedStep, "finished", all_finished),)),
    "quarantine forgotten": Mutant("bad samples come back", ((Store, "quarantine", nothing),)),
    "deaths forgotten": Mutant("it kills for ever", ((Store, "acquire", deaths_forgotten),)),
    "one death makes a culprit": Mutant(
        "the innocent are quarantined",
        (
            (bisection, "DEATHS_OF_A_CULPRIT", lambda _: 1),
            (isolation, "DEATHS_BEFORE_ISOLATION", lambda _: 1),
        ),
    ),
    "archived too early": Mutant("no way back", ((Store, "retire", archives_everything),)),
    "archived though it is read": Mutant(
        "a resume finds no samples", ((Store, "retire", archives_what_is_read),)
    ),
    "revision not planned": Mutant(
        "bad samples are trained",
        ((StepLoader, "revise", lambda real: lambda self, planned, quarantined: real(self, planned, ())),),
    ),
}


def seeds_to_detect(name: str, seeds_max: int, first: int = 0) -> int | None:
    """How many seeds from `first` on the simulation needs to find the mutant; None if it survives them."""
    from paceline.testing.simulation import crash_free, draw, simulate

    for seed in range(first, first + seeds_max):
        world = draw(seed)
        world.disk.close()
        crash_free(world.shape.weights_only, world.culprits)  # what to expect is the healthy product's to say
        with MUTANTS[name].planted():
            try:
                simulate(seed)
            except AssertionError:
                return seed - first + 1
    return None
