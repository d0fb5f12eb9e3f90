"""What `paceline data check` learns of a source with the target's tokenizer, in a process of its own."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from paceline.data.settings import DataSection
from paceline.methods.table import DEFAULT_METHOD
from paceline.roles.question import ask
from paceline.section import Section
from paceline.target.settings import TargetSection

LOOKED_AT_MAX = 2000
SAMPLES_SHOWN = 3


class CheckRequest(Section):
    """The sections of a run file that decide what is captured. `seed`: the run's, for the order of a mixture.

    `measure`: time the target, too.
    """

    data: DataSection
    target: TargetSection
    method: dict[str, Any] = {"name": DEFAULT_METHOD}
    seed: int = 0
    measure: bool = False


class Part(Section):
    """A stretch of a sample's tokens as text; the draft learns the tokens of a target."""

    text: str
    is_target: bool


class ShownSample(Section):
    """`rest`: tokens that are not shown. `is_open`: the target goes on after the last token."""

    name: str
    num_tokens: int
    parts: tuple[Part, ...]
    rest: int = 0
    is_open: bool = False


class Problem(Section):
    """Samples that the target cannot be given, for one reason."""

    reason: str
    count: int
    first: tuple[str, ...]


class CheckResult(Section):
    """`lengths`: tokens of each sample that was looked at. `num_samples`: of a round, as far as these tell.

    `sample_bytes`: on average, of captured features. `group_seconds`, `group_samples`: of one capture group,
    if it was measured.
    """

    num_samples: int
    lengths: tuple[int, ...]
    num_targets: int
    samples: tuple[ShownSample, ...]
    problems: tuple[Problem, ...] = ()
    sample_bytes: float = 0.0
    dtype: str = ""
    group_seconds: float = 0.0
    group_samples: int = Field(default=0, ge=0)


def check_with_target(request: CheckRequest) -> CheckResult:
    """Run the check in a process that loads the tokenizer, and the target if it is to be measured.

    Raises the error of that process.
    """
    told = ask("paceline.roles.data_checker", request.model_dump_json(), "check")
    return CheckResult.model_validate_json(told)
