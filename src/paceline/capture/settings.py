"""The run file's `prompts` and `capture` sections: which prompts are answered, and in which batches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from paceline.section import Count, Section
from paceline.types import Feature

ROUNDS_MAX = 10_000
GROUPS_IN_FLIGHT_MAX = 256


class AnswersSection(Section):
    """How long answers may be and how they are sampled: part of the run file's `prompts` section.

    `first_round_temperature` applies when the run answers a prompt for the first time.
    """

    max_answer_tokens: Count = 128
    first_round_temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.8


class PromptsSection(AnswersSection):
    """`rounds`: how often the prompt set is answered; from the second round on answers are sampled.

    `duplicates`: a repeated line is used once, or the run is refused. The file may move between starts,
    because prompts are known by their digests.
    """

    changeable: ClassVar[tuple[str, ...]] = ("path", "duplicates")
    path: Path
    rounds: Annotated[int, Field(ge=1, le=ROUNDS_MAX)] = 1
    duplicates: Literal["once", "refuse"] = "once"
    max_prompt_tokens: Count = 192


class CaptureSection(Section):
    """`group_size`: prompts answered in one batch; the unit of capture and of re-capture.

    `groups_in_flight`: groups captured at the same time, if the engine can capture so many.
    `failures_in_a_row_max`: the producer stops if more prompts than this fail one after another.
    """

    changeable: ClassVar[tuple[str, ...]] = ("attempt_max", "failures_in_a_row_max", "groups_in_flight")
    group_size: Count = 64
    attempt_max: Count = 3
    failures_in_a_row_max: Count = 16
    groups_in_flight: Annotated[int, Field(ge=1, le=GROUPS_IN_FLIGHT_MAX)] = 1


class CaptureSettings(CaptureSection, AnswersSection):
    """The producer's settings: its sections of the run file, and what the rest of the run file decides.

    `features`: what the draft's method trains on, from `DraftMethod.features`; `strategy` is the method's
    name. `max_prompt_tokens`: longer prompts fail; None: no limit.
    """

    features: tuple[Feature, ...]
    seed: int = 0
    strategy: str = "eagle3"
    max_prompt_tokens: Count | None = None

    @classmethod
    def of(cls, capture: CaptureSection, prompts: PromptsSection, **rest: Any) -> CaptureSettings:
        answers = {name: getattr(prompts, name) for name in AnswersSection.model_fields}
        groups = {name: getattr(capture, name) for name in CaptureSection.model_fields}
        return cls(max_prompt_tokens=prompts.max_prompt_tokens, **answers, **groups, **rest)
