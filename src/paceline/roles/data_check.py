"""What `paceline data check` learns of a source with the target's tokenizer, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from pydantic import Field

from paceline.data.settings import DataSection
from paceline.errors import PacelineError
from paceline.roles.child import RoleFailedError
from paceline.roles.plan import role_environment
from paceline.section import Section
from paceline.target.settings import TargetSection
from paceline.terminal import one_line

LOOKED_AT_MAX = 2000
SAMPLES_SHOWN = 3


class CheckRequest(Section):
    """The sections of a run file that decide what is captured. `seed`: the run's, for the order of a mixture.

    `measure`: time the target, too.
    """

    data: DataSection
    target: TargetSection
    method: dict[str, Any] = {"name": "eagle3"}
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
    command = [sys.executable, "-m", "paceline.roles.data_checker"]
    environment = {**os.environ, **role_environment(len(os.sched_getaffinity(0)))}
    ended = subprocess.run(
        command,
        input=request.model_dump_json(),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode == 0:
        return CheckResult.model_validate_json(ended.stdout)
    try:
        told: dict[str, Any] = json.loads(ended.stdout)
        raise RoleFailedError(told["what"], told["why"], told["next"], int(told["exit_code"]))
    except (ValueError, LookupError, TypeError):
        said = one_line(ended.stderr.strip().rpartition("\n")[2][:400])
        raise PacelineError(
            f"The check ended with {ended.returncode}: {said or 'it printed nothing'}.",
            why="Nothing was changed.",
            next="check that this Python has all that Paceline needs, and that there is enough memory.",
        ) from None
