"""What the scripts answer: refusals as the errors that every store raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paceline.errors import LedgerRegressedError, PacelineError, SchemaError
from paceline.ledger import refusals
from paceline.ledger.image import appeared
from paceline.ledger.records import Fence, StepPlan

SCHEMA_VERSION = 1
Detail = list[Any]


class BasisMovedError(Exception):
    """The head or a plan changed between the caller's reading and its call."""


def refused(status: str, detail: Any, subject: Any) -> Exception:
    """The error of an operation's refusal. `subject`: the ack or the checkpoint that was refused."""
    return REFUSALS[status](detail, subject)


def fence_refused(status: str, detail: int, fence: Fence) -> PacelineError:
    return refusals.fenced(fence, detail) if status == "fenced" else refusals.late(fence, detail)


def _other_place(detail: Detail) -> PacelineError:
    sample_id, ordinal, why, value = detail
    there = {
        "for_prompt": f"it is there for prompt {value}",
        "too_far": f"the run has {value} prompts",
        "no_prompt": "it does not name its prompt, whose ordinal is its place",
        "taken": f"{value} is there",
    }
    return refusals.other_place(sample_id, ordinal, there[why])


REFUSALS: dict[str, Callable[[Detail, Any], Exception]] = {
    "other_order": lambda detail, wanted: refusals.other_order(detail[0], wanted),
    "prompts_differ": lambda detail, _: refusals.prompts_differ(*detail),
    "intent_revoked": lambda detail, _: refusals.intent_revoked(detail[0]),
    "other_place": lambda detail, _: _other_place(detail),
    "not_covered": lambda detail, _: refusals.not_covered(detail[0]),
    "history_is_archived": lambda detail, _: refusals.history_is_archived(*detail),
    "out_of_turn": lambda detail, ack: refusals.out_of_turn(
        ack, detail[0], None if detail[1] is None else StepPlan(ack.step, (), detail[1])
    ),
    "moved": lambda _, __: BasisMovedError(),
    "appeared": lambda _, __: appeared("this place on the server"),
    "behind_head": lambda detail, checkpoint: refusals.behind_head(checkpoint.step, detail[0]),
    "contradicts": lambda detail, checkpoint: refusals.contradicts(checkpoint, detail[0]),
}


# -- the ledger that was found -----------------------------------------------------------------


def other_schema(ledger: str, version: int | None) -> SchemaError:
    return SchemaError(
        f"{ledger} has schema version {version}; this Paceline knows {SCHEMA_VERSION}.",
        why="A newer version wrote it, and a wrong guess at its meaning could lose samples.",
        next="upgrade paceline, or open the run with the version that made it.",
    )


def not_the_same(ledger: str, what: str) -> LedgerRegressedError:
    return LedgerRegressedError(
        f"{ledger} {what}.",
        why="The server was restarted from an older file, failed over to a server that had less, or was "
        "cleared; going on from here could train a sample twice.",
        next="stop every process of the run, and restore the server's data if there is a newer copy. Then "
        "run the same command again: it goes on from the newest checkpoint, and captures what is missing.",
    )
