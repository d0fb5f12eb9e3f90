"""The comparer process: `python -m paceline.roles.comparer RUN.yaml COMPARISON [NUMBER]`.

COMPARISON is a Comparison as JSON. Without a NUMBER the process captures the features, or verifies those that
are kept. With one it trains and measures that variant: the draft and its figures stay, so a killed
measurement does not train again.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paceline.config.run import RunConfig
from paceline.durable_files import make_folder, replace_file, sync_folder, write_file
from paceline.methods.method import DraftMethod
from paceline.roles.comparison import PREPARED, RESULT, TRAINED, Comparison
from paceline.roles.held_out import TemplateOnly
from paceline.roles.kept_capture import capture_kept
from paceline.roles.kept_features import Asked, KeptFeatures
from paceline.roles.measured_draft import build_measured_draft, held_out_of, measure_held_out
from paceline.roles.plan import RunPlan
from paceline.roles.process import run_role
from paceline.roles.trainer_rank import trainer_settings
from paceline.target.head import TargetHead
from paceline.target.tokenizer import PromptEncoder
from paceline.telemetry import EventLog
from paceline.training.checkpoint import Checkpoint
from paceline.training.determinism import compute_deterministically
from paceline.training.learner import DRAFT
from paceline.training.replay import (
    Batch,
    KeptSample,
    Trained,
    batches_of_run,
    for_tokens,
    judged,
    progress_of_run,
    steps_within,
    train,
)
from paceline.training.torch_learner import TorchLearner, restore_draft
from paceline.types import Feature


def compare(
    plan: RunPlan,
    events: EventLog,
    should_stop: Callable[[], bool],  # noqa: ARG001 (a kill undoes nothing that is kept)
    request: str,
    number: int | None = None,
) -> None:
    """Capture or verify the features, or give the figures of one variant."""
    comparison = Comparison.model_validate_json(request)
    asked = asked_of(plan, comparison)
    make_folder(comparison.directory)
    if number is None:
        kept, samples = capture_kept(comparison.directory, asked, events)
        told = {
            "features": kept.folder.name,
            "samples": [list(astuple(sample)) for sample in samples],
            "tokens": sum(sample.num_targets for sample in samples),
            "bytes": kept.store.usage().resident_bytes,
        }
        replace_file(comparison.directory / PREPARED, json.dumps(told).encode())
        return
    told = json.loads((comparison.directory / PREPARED).read_bytes())
    kept = KeptFeatures(comparison.directory / told["features"])
    samples = [KeptSample(*sample) for sample in told["samples"]]
    folder = comparison.folder_of(plan.config, number, told["features"])
    make_folder(folder)
    variant = _Variant(plan, comparison, number, asked, kept, folder)
    if not (folder / TRAINED).exists():
        variant.train(samples, events)
    result = variant.measure(events)
    replace_file(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())


def asked_of(plan: RunPlan, comparison: Comparison) -> Asked:
    """What all variants need. Raises ConfigError for one that does not fit the target."""
    head = TargetHead.load(plan.config.target.model)
    methods = [
        comparison.config_of(plan.config, number).method.build() for number in range(len(comparison.variants))
    ]
    for method in methods:
        method.check_target(head)
    size = plan.prompts.size
    return Asked(plan, min(size, comparison.prompts or size), methods, head)


class _Variant:
    """One variant: its method, and the kept samples as that method reads them."""

    def __init__(
        self,
        plan: RunPlan,
        comparison: Comparison,
        number: int,
        asked: Asked,
        kept: KeptFeatures,
        folder: Path,
    ) -> None:
        self._config: RunConfig = comparison.config_of(plan.config, number)
        self._plan = replace(plan, config=self._config)
        self._comparison, self._asked, self._kept, self._folder = comparison, asked, kept, folder
        self._method: DraftMethod = asked.methods[number]
        self._facts = replace(asked.head.facts, dtype=kept.dtype)

    @property
    def _features(self) -> tuple[Feature, ...]:
        return self._method.features(self._facts)

    def _read(self, sample: KeptSample) -> dict[str, torch.Tensor]:
        return self._kept.read(sample, self._features)

    # -- training ------------------------------------------------------------------------------

    def train(self, samples: list[KeptSample], events: EventLog) -> None:
        """Leave the trained draft and what its training took in the variant's folder."""
        compute_deterministically(self._config.machine.consumer_threads)
        first = samples[: self._config.method.first_samples]
        batches, seconds = self._batches(samples, first), None
        if self._comparison.minutes is not None:
            seconds = 60 * self._comparison.minutes
        learner = self._learner(self._total_steps(batches))
        trained = train(
            learner,
            first,
            batches,
            self._read,
            seconds=seconds,
            progress=self._progress(samples),
            greedy=self._kept.is_greedy,
            report=events.write,
        )
        write_file(self._folder / DRAFT, learner.files()[DRAFT])
        sync_folder(self._folder)
        replace_file(self._folder / TRAINED, json.dumps(asdict(trained)).encode())

    def _batches(self, samples: list[KeptSample], first: list[KeptSample]) -> list[Batch]:
        """The steps that the budget gives."""
        training = self._config.training
        batches = batches_of_run(samples, self._config.capture.group_size, training)
        if self._comparison.tokens is not None:
            return for_tokens(batches, self._comparison.tokens)
        if self._comparison.minutes is None:
            return batches[: training.max_steps]
        timed = self._learner(len(batches))
        count = steps_within(60 * self._comparison.minutes, timed, first, batches, self._read)
        return [batches[step % len(batches)] for step in range(count)]

    @property
    def _has_budget(self) -> bool:
        return self._comparison.tokens is not None or self._comparison.minutes is not None

    def _progress(self, samples: list[KeptSample]) -> list[float] | None:
        """With which the learning rate falls: without a budget that of a run."""
        config, size = self._config, self._asked.source.size or 0
        if self._has_budget:
            return None
        return progress_of_run(samples, config.capture.group_size, config.training, size)

    def _total_steps(self, batches: list[Batch]) -> int:
        """Where the learning rate reaches its end: without a budget where that of a run does, which cannot
        know of prompts that fail."""
        training = self._config.training
        if self._has_budget or training.tokens_per_step is not None:
            return len(batches)
        whole = math.ceil((self._asked.source.size or 0) * training.passes / training.batch_size)
        return min(whole, training.max_steps or whole)

    def _learner(self, num_steps: int) -> TorchLearner:
        totals = self._plan.num_steps((self._plan.stretch,))
        settings = trainer_settings(self._plan.config, totals)
        return TorchLearner(self._method, self._asked.head, replace(settings, total_steps=num_steps))

    # -- measuring -----------------------------------------------------------------------------

    def measure(self, events: EventLog) -> dict[str, Any]:
        """The figures of the kept draft: simulated and by lossless decoding."""
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as `paceline evaluate` computes
        trained = Trained(**json.loads((self._folder / TRAINED).read_bytes()))
        files = {DRAFT: (self._folder / DRAFT).read_bytes()}
        draft = restore_draft(self._method, self._asked.head, files)
        measured, date = None, self._kept.date
        if not self._plan.evaluation_obstacle:
            events.write("measuring")
            measured = build_measured_draft(self._config, Checkpoint(trained.steps, 0, files, {}), date)
        encoder = PromptEncoder.of(self._config.target, date=date) if measured is None else measured.encoder
        simulated = self._simulated(draft, encoder)
        return {
            **asdict(trained),
            "method": self._config.method.name,
            "parameters": sum(weight.numel() for weight in draft.parameters()),
            "simulated_acceptance_length": simulated.get("acceptance_length_estimate"),
            "simulated": simulated,
            "obstacle": self._plan.evaluation_obstacle,
            "evaluation": measured
            and measure_held_out(self._config, measured, held_out_of(self._config, measured)),
        }

    def _simulated(self, draft: torch.nn.Module, encoder: PromptEncoder) -> dict[str, float]:
        """The method's own figures on the target's answers to the held-out prompts; empty without any."""
        held_out = self._asked.held_out(TemplateOnly(encoder, self._config.target.model))
        kept = self._kept.held_out(held_out, self._config.evaluation.max_new_tokens)
        if not kept:
            return {}
        samples = [self._kept.as_of_method(sample, self._features) for sample in kept]
        return dict(judged(self._method, draft, samples))


if __name__ == "__main__":
    chosen = int(sys.argv[3]) if len(sys.argv) > 3 else None
    work = partial(compare, request=sys.argv[2], number=chosen)
    sys.exit(run_role("comparer", Path(sys.argv[1]), work, stops_itself=False))
