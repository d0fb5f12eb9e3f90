"""Trains a draft on samples that are kept, by the steps that a run of the same settings would make.

The order of visits is the run's (loader/passes.py), and learner and step are the consumer's. So without a
budget the last weights are those of the run, bit for bit on a CPU. A budget of tokens or of seconds ends
training elsewhere: the same visits are gone over again if they do not suffice, and the learning rate falls
over the steps that the budget gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.loader.packing import packs
from paceline.loader.passes import Block, Visit, VisitOrder, at_most
from paceline.loader.settings import LoaderSettings
from paceline.methods.method import DraftMethod
from paceline.training.learner import Learner, Sample
from paceline.training.settings import TrainingSection

TELL_S = 5.0
TIMED_SHARE = 0.02  # of the time that is given, to find how long a step takes
TIMED_MIN = 4  # steps, the first of which is slower and does not count


@dataclass(frozen=True)
class KeptSample:
    """`place`: in the log of the run that would have captured it; `num_targets`: tokens to predict;
    `num_tokens`: those that the target processed."""

    sample_id: str
    place: int
    num_targets: int
    num_tokens: int = 0


Batch = tuple[KeptSample, ...]
Read = Callable[[KeptSample], Sample]


@dataclass(frozen=True)
class Trained:
    """`tokens`: those that the target wrote, counted at each visit; `seconds`: the first weights included.

    `step_ms`: the mean of an optimizer step, without the reading of its samples.
    """

    steps: int
    samples: int
    tokens: int
    seconds: float
    step_ms: float


def batches_of_run(samples: Sequence[KeptSample], block_size: int, training: TrainingSection) -> list[Batch]:
    """The steps of a run over these samples, in order; `max_steps` does not bound them."""
    return [tuple(visit.item for visit in step) for step in _steps(samples, block_size, training)]


def progress_of_run(
    samples: Sequence[KeptSample], block_size: int, training: TrainingSection, size: int
) -> list[float] | None:
    """The progress of a run of `size` prompts after each of its steps; see `LoaderSettings.progress`."""
    if training.tokens_per_step is None:
        return None
    settings = LoaderSettings(
        training.batch_size,
        training.passes,
        block_size,
        tokens_per_step=training.tokens_per_step,
        size=size,
    )
    found = [settings.progress(step[-1].after) for step in _steps(samples, block_size, training)]
    return [share for share in found if share is not None]


def _steps(
    samples: Sequence[KeptSample], block_size: int, training: TrainingSection
) -> list[list[Visit[KeptSample]]]:
    blocks: dict[int, list[KeptSample]] = {}
    for sample in samples:
        blocks.setdefault(sample.place // block_size, []).append(sample)
    last = max(blocks, default=0)

    def read(number: int) -> Block[KeptSample]:
        return Block(blocks.get(number, []), ends=number >= last)

    order = VisitOrder[KeptSample](passes=training.passes)
    visits = order.visits(at_most(len(samples) * training.passes), read) or []
    if training.tokens_per_step is None:
        cuts = packs([1] * len(visits), training.batch_size)
    else:
        cuts = packs([visit.item.num_tokens for visit in visits], training.tokens_per_step)
    return [visits[cut] for cut in cuts]


def again_and_again(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Endlessly. Raises ConfigError for samples without a token to predict."""
    if not any(sample.num_targets for batch in batches for sample in batch):
        raise ConfigError(
            f"None of {len({sample for batch in batches for sample in batch})} samples has a token to learn.",
            why="Training would never reach its budget.",
            next="give prompts that the target answers, or chats with answers.",
        )
    return itertools.cycle(batches)


def for_tokens(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The batches that hold so many tokens to predict, the last one whole."""
    found, seen = [], 0
    for batch in again_and_again(batches):
        found.append(batch)
        seen += _targets(batch)
        if seen >= tokens:
            break
    return found


def steps_within(
    seconds: float, learner: Learner, first: Sequence[KeptSample], batches: Sequence[Batch], read: Read
) -> int:
    """How many steps fit into `seconds` beside the first weights, by a learner that is thrown away.

    The measurement takes a fiftieth of the time, at least four steps, and is no part of it.
    """
    began = monotonic()
    learner.build([read(sample) for sample in first])
    built = monotonic()
    marks = [built]
    for step, batch in enumerate(again_and_again(batches), 1):
        learner.step(step, [read(sample) for sample in batch])
        marks.append(monotonic())
        if step >= TIMED_MIN and marks[-1] - built >= TIMED_SHARE * seconds:
            break
    a_step = (marks[-1] - marks[1]) / (len(marks) - 2)
    return max(1, int((seconds - (built - began)) / a_step))


def train(
    learner: Learner,
    first: Sequence[KeptSample],
    batches: Sequence[Batch],
    read: Read,
    *,
    seconds: float | None = None,
    progress: Sequence[float] | None = None,
    greedy: Callable[[KeptSample], bool] = lambda _: False,
    report: Callable[..., None] = lambda *_, **__: None,
) -> Trained:
    """Build the first weights and train the batches, but no longer than `seconds`.

    `progress`: of the run after each batch, if the learning rate falls with it. `greedy`: whether the target
    chose its answer greedily, so that it can be checked. Raises TrainingError, CaptureMismatchError,
    StoreError for a sample that cannot be read.
    """
    began = told = monotonic()
    samples = {sample: read(sample) for sample in first}
    learner.check_greedy([tensors for sample, tensors in samples.items() if greedy(sample)])
    learner.build(list(samples.values()))
    del samples
    trained, spent = list[Batch](), 0.0
    for step, batch in enumerate(batches, 1):
        tensors, at = [read(sample) for sample in batch], monotonic()
        share = None if progress is None else progress[step - 1]
        figures = learner.step(step, tensors, progress=share)
        now = monotonic()
        trained.append(batch)
        spent += now - at
        if now - told >= TELL_S:
            told = now
            report("replayed", step=step, steps=len(batches), loss=figures["loss"])
        if seconds is not None and now - began >= seconds:
            break
    return Trained(
        steps=len(trained),
        samples=sum(map(len, trained)),
        tokens=sum(map(_targets, trained)),
        seconds=monotonic() - began,
        step_ms=1000 * spent / max(1, len(trained)),
    )


def _targets(batch: Batch) -> int:
    return sum(sample.num_targets for sample in batch)


@torch.no_grad()
def judged(method: DraftMethod, draft: nn.Module, samples: Sequence[Sample]) -> Mapping[str, float]:
    """The method's readable figures, in float32, on samples that were not trained: simulated acceptance."""
    device = next(draft.parameters()).device
    sums: dict[str, float] = {}
    for sample in samples:
        for name, value in draft(method.collate([sample], device)).metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return method.mean_metrics(sums)
