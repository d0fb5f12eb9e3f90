"""The run file's `data` section: what a run reads, where answers come from, how long both may be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from paceline.section import Count, Section

ROUNDS_MAX = 10_000
WEIGHT_MAX = 10_000

Format = Literal["auto", "prompts", "messages", "sharegpt", "alpaca", "tokens"]
ANSWERS = ("target", "data")


class SourceSection(Section):
    """One source of samples: a file or a folder under `path`, or a data set of the Hugging Face hub by name.

    `subset`, `split`, `revision`: which part of a hub data set, or of a `datasets` folder. `format`: what a
    record is; "auto" decides for each record. `weight`: how often a round takes each sample of the source:
    0.5 takes every second one, 2 takes each twice.
    """

    path: Path | None = None
    hub: str = ""
    subset: str = ""
    split: str = ""
    revision: str = ""
    format: Format = "auto"
    weight: Annotated[float, Field(gt=0.0, le=WEIGHT_MAX)] = 1.0

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (not self.hub):
            raise ValueError("a source has either a path or a hub name")
        return self


class AnswersSection(Section):
    """How long answers may be and how they are sampled.

    `first_round_temperature` applies when the run answers a prompt for the first time.
    """

    max_answer_tokens: Count = 128
    first_round_temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.8


class RoundsSection(AnswersSection):
    """`rounds`: how often the data is answered; from the second round on answers are sampled.

    `duplicates`: a repeated sample is used once, or the run is refused.
    """

    rounds: Annotated[int, Field(ge=1, le=ROUNDS_MAX)] = 1
    duplicates: Literal["once", "refuse"] = "once"
    max_prompt_tokens: Count = 192


class DataSection(RoundsSection):
    """`sources`: what the run reads; a single source may be given in the section itself (`path: ...`).

    `answers`: "target" (the target writes them), "data" (those of the sources), or the directory of a run
    whose answers are used. `too_long`: what becomes of a longer sample. Sources may move between starts,
    because their content is known by digests.
    """

    changeable: ClassVar[tuple[str, ...]] = ("sources", "duplicates")
    sources: tuple[SourceSection, ...] = ()
    answers: Annotated[str, Field(min_length=1)] = "target"
    too_long: Literal["truncate", "skip", "refuse"] = "skip"

    @property
    def other_run(self) -> Path | None:
        """The directory of the run whose answers are used; None if there is none."""
        return None if self.answers in ANSWERS else Path(self.answers)

    @model_validator(mode="before")
    @classmethod
    def _source_in_place(cls, values: Any) -> Any:
        """Read the settings of a single source that stand in the section itself."""
        if not isinstance(values, dict):
            return values
        own = {key: value for key, value in values.items() if key in SourceSection.model_fields}
        if own and "sources" in values:
            raise ValueError(f"give {sorted(own)[0]!r} inside of 'sources', or leave 'sources' out")
        rest = {key: value for key, value in values.items() if key not in own}
        return {**rest, "sources": [own]} if own else rest

    @model_validator(mode="after")
    def _something_to_read(self) -> Self:
        if self.other_run is None and not self.sources:
            raise ValueError("it names nothing to read: give a 'path', or 'sources'")
        if self.other_run is not None and self.sources:
            raise ValueError(
                f"answers is {self.answers!r}, a run whose prompts are read with its answers: leave the "
                "sources out (or set answers to 'target' or 'data')"
            )
        return self


class PromptsSection(RoundsSection):
    """The section `prompts` of a run file: a data section with one file of plain prompts."""

    path: Path

    def as_data(self) -> dict[str, Any]:
        """The same settings as values of a data section."""
        settings = self.model_dump(exclude={"path"}, exclude_unset=True)
        return {**settings, "sources": [{"path": self.path, "format": "prompts"}]}
