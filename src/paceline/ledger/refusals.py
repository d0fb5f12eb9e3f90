"""The messages with which every ledger store refuses a call."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.errors import ConfigError, FencedError, IllegalTransitionError, IntentRevokedError
from paceline.ledger.records import CheckpointRecord, Fence, StepAck, StepPlan


def fenced(fence: Fence, current: int) -> FencedError:
    return FencedError(
        f"This {fence.role} holds epoch {fence.epoch}, but epoch {current} has taken over.",
        why="A newer process does this work now; nothing was written.",
        next="stop this process; `paceline status RUN` shows which process holds the role.",
    )


def late(fence: Fence, last: int) -> FencedError:
    return FencedError(
        f"Operation {fence.op} of this {fence.role} arrived after operation {last}.",
        why="It is a delayed copy of a call that was answered long ago; nothing was written.",
        next="nothing: the process that sent it has gone on.",
    )


def behind_head(step: int, head: int) -> IllegalTransitionError:
    return IllegalTransitionError(
        f"A checkpoint at step {step} cannot follow the head at step {head}.",
        why="Checkpoints of a run form a chain of growing steps.",
        next="resume from the head checkpoint: run the same command again.",
    )


def not_covered(sample_ids: Sequence[str]) -> IllegalTransitionError:
    return IllegalTransitionError(
        f"{len(sample_ids)} samples are not covered by a durable checkpoint yet (first: {sample_ids[0]}).",
        why="Their features would be needed again after a crash.",
        next="release them after a recorded checkpoint covers their last step.",
    )


def intent_revoked(sample_ids: Sequence[str]) -> IntentRevokedError:
    return IntentRevokedError(
        f"The intents of {len(sample_ids)} samples were revoked (first: {sample_ids[0]}).",
        why="Their bytes may have been deleted meanwhile, so nothing of this batch was committed.",
        next="reserve again and write the bytes under the new generation.",
    )


def other_place(sample_id: str, ordinal: int | None, there: str) -> IllegalTransitionError:
    return IllegalTransitionError(
        f"{sample_id} cannot be committed for prompt {ordinal}: {there}.",
        why="A sample's place in the log is its prompt's ordinal; another would change what is trained.",
        next="pass the prompts the run was started with, in the same order.",
    )


def other_order(settled: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"This run's log is in {settled} order, and the producer asked for {wanted} order.",
        why="The first producer settles the order of the log for the whole run.",
        next="use the same producer as before, or start a new run in another folder.",
    )


def out_of_turn(ack: StepAck, trained: int, plan: StepPlan | None) -> IllegalTransitionError:
    on_record = "none" if plan is None else f"revision {plan.rev}"
    return IllegalTransitionError(
        f"An ack of step {ack.step}, revision {ack.rev}, cannot follow step {trained} "
        f"(plan on record: {on_record}).",
        why="Steps are acked in order, as planned; another order would train a sample twice.",
        next="resume from the head checkpoint: run the same command again.",
    )


def contradicts(checkpoint: CheckpointRecord, because: str) -> IllegalTransitionError:
    return IllegalTransitionError(
        f"The checkpoint {checkpoint.name} of step {checkpoint.step} contradicts the ledger: {because}.",
        why="Ledger and weights must agree on what was trained. Nothing was changed.",
        next="run `paceline fsck RUN`; restore the ledger or the checkpoints from the same backup.",
    )


def history_is_archived(step: int, archived: int) -> IllegalTransitionError:
    return IllegalTransitionError(
        f"The ledger cannot go back to step {step}: its history up to step {archived} is archived.",
        why="The samples trained up to there have no rows left to undo.",
        next=f"restore a checkpoint of step {archived} or later, or start a new run.",
    )


def prompts_differ(first: int, known: int) -> ConfigError:
    return ConfigError(
        f"The prompts from number {first} on are not those that this run knows ({known} in all).",
        why="A prompt's ordinal identifies its sample; with other prompts, samples would be trained again.",
        next="pass the prompts the run was started with, in the same order; new ones go to the end.",
    )


def passed_over(name: str) -> str:
    """Why a prompt has failed that an adopted checkpoint passed over."""
    return f"it failed before this ledger was restored: checkpoint {name} passed over it"
