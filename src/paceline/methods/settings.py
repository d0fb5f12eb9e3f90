"""The part of the run file's `method` section that all methods share. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from paceline.section import Count, Dtype, Section, StartingValue
from paceline.table import resolve

if TYPE_CHECKING:
    from paceline.methods.method import DraftMethod
    from paceline.target.facts import TargetFacts
    from paceline.target.shape import LayerSizes
    from paceline.types import Feature


@dataclass(frozen=True)
class MicroBatch:
    """What a draft computes at a time in training. Of all its `samples`: `rows`, the tokens that the target
    processed, and `targets`, those that the draft learns. `width`: bytes of a number in products."""

    samples: float
    rows: float
    targets: float
    width: int = 2


class MethodSection(Section):
    """Base of each method's section; a subclass names the class to build from it in `component`.

    `first_samples`: how many of the run's first samples the draft's first weights are made from.
    """

    component: ClassVar[str]  # "module:class", a DraftMethod that takes the section
    name: str
    first_samples: Count = 128
    dtype: Dtype = "auto"

    @classmethod
    def starting_values(cls, target: LayerSizes, *, large: bool) -> list[StartingValue]:  # noqa: ARG003
        """What `paceline init` writes beside name and `first_samples`; `large`: for training on a GPU."""
        return []

    @property
    def folders(self) -> tuple[Path, ...]:
        """Model folders besides the target's that decide the draft; a run is bound to their content."""
        return ()

    @property
    def notes(self) -> list[tuple[str, str]]:
        """What a user should know of these settings before a run starts, each with what to do about it."""
        return []

    @property
    def compiles(self) -> bool:
        """Whether training on a GPU compiles kernels, for which Triton asks for a C compiler."""
        return False

    def features(self, target: TargetFacts) -> tuple[Feature, ...]:
        """See `DraftMethod.features`. A section that knows them without torch answers itself."""
        return self.build().features(target)

    def num_parameters(self, target: LayerSizes) -> int | None:  # noqa: ARG002
        """How many numbers the draft learns, for `paceline plan`; None: unknown before it is built."""
        return None

    def rows_per_target(self, num_targets: float) -> float:  # noqa: ARG002
        """How many rows the draft computes for each token to predict, of a sample with so many."""
        return 1.0

    def activation_bytes(self, target: LayerSizes, batch: MicroBatch) -> float:  # noqa: ARG002
        """What a step on a GPU keeps between forward and backward, and the largest tensors that come and go:
        an upper estimate, for `paceline plan`. 0: unknown."""
        return 0.0

    def build(self) -> DraftMethod:
        method: DraftMethod = resolve(self.component)(self)
        return method
