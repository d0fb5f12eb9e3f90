"""The run file's `capture` section: in which batches prompts are answered."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from paceline.data.settings import AnswersSection, DataSection
from paceline.methods.table import DEFAULT_METHOD
from paceline.section import Count, Section
from paceline.types import Feature

GROUPS_IN_FLIGHT_MAX = 256
TooLong = Literal["truncate", "skip", "refuse"]


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
    name. `answers`: their source. `max_prompt_tokens`: of a prompt; of a sample whose answers are given,
    together with `max_answer_tokens`; None: no limit. `too_long`: what becomes of longer ones.
    """

    features: tuple[Feature, ...]
    seed: int = 0
    strategy: str = DEFAULT_METHOD
    max_prompt_tokens: Count | None = None
    answers: Literal["target", "data"] = "target"
    too_long: TooLong = "skip"

    def temperature_in(self, round_: int) -> float:
        return self.temperature if round_ else self.first_round_temperature

    @classmethod
    def of(cls, capture: CaptureSection, data: DataSection, **rest: Any) -> CaptureSettings:
        answers = {name: getattr(data, name) for name in AnswersSection.model_fields}
        groups = {name: getattr(capture, name) for name in CaptureSection.model_fields}
        return cls(
            max_prompt_tokens=data.max_prompt_tokens,
            answers="target" if data.answers == "target" else "data",
            too_long=data.too_long,
            **answers,
            **groups,
            **rest,
        )
