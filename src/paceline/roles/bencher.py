"""The process of `paceline bench`: times a run's engine, store and training step on its own prompts.

It answers a few groups with the run's engine, puts the samples into a store of the run's kind, and trains on
them, each for a part of the time that is given. Nothing of the run is read or written. The two sides are
timed one after the other; in a run they share the memory's bandwidth.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from paceline.capture.encoding import EncodedPrompt, Encoding
from paceline.capture.settings import CaptureSettings
from paceline.config.load import load_run_config
from paceline.engines.engine import CaptureRequest, TargetEngine
from paceline.errors import ConfigError
from paceline.features.float8 import narrowed, widened
from paceline.methods.settings import MethodSection
from paceline.roles.bench import BenchRequest, Measured
from paceline.roles.engine_prober import trial_engine
from paceline.roles.plan import RunPlan, plan_run
from paceline.roles.question import answer
from paceline.roles.trainer_rank import trainer_settings
from paceline.target.head import TargetHead
from paceline.training.determinism import compute_deterministically
from paceline.training.torch_learner import TorchLearner
from paceline.types import Feature, Targets, name_of

ANSWER_TOKENS_MAX = 64  # longer answers are timed by as many of their tokens
TRIAL_TOKENS = 4  # of each answer of the group that tells how long answers can be
PROMPTS_MAX = 512  # that are encoded
KEPT_BYTES_MAX = 4 << 30  # of samples, for the store and training
CAPTURE_SHARE, STORE_SHARE = 0.5, 0.05  # of the time that is left
STEPS_MIN = 2  # that are timed, after one that warms up
Sample = Mapping[str, torch.Tensor]


def bench(request: BenchRequest) -> Measured:
    began = monotonic()
    plan = plan_run(load_run_config(Path(request.run_file)))
    with trial_engine(plan.config, lambda *_, **__: None) as engine:
        ready = monotonic()
        features = plan.config.method.features(engine.facts)
        samples, capture = _capture(plan, engine, features, request.seconds * CAPTURE_SHARE)
        dtype = engine.facts.dtype
    store = _store(plan, samples, request.seconds * STORE_SHARE)
    left = request.seconds - (monotonic() - ready)
    train = _train(plan, samples, features, left)
    return Measured(
        dtype=dtype,
        start_s=ready - began,
        samples=len(samples),
        capture_tokens_per_s=capture,
        train_tokens_per_s=train,
        store_mib_per_s=store,
    )


# -- capture ------------------------------------------------------------------------------------


def _capture(
    plan: RunPlan, engine: TargetEngine, features: Sequence[Feature], seconds: float
) -> tuple[list[Sample], float]:
    """Samples of whole groups, as they are stored, and how many tokens were written (or, of given answers,
    read) a second."""
    config = plan.config
    settings = CaptureSettings.of(config.capture, config.data, features=features, seed=config.run.seed)
    prompts = _prompts(plan, Encoding(engine, settings))
    at_once = max(1, min(config.capture.groups_in_flight, engine.facts.groups_in_flight_max))
    size, most = config.capture.group_size, min(settings.max_answer_tokens, ANSWER_TOKENS_MAX)
    engine.capture(next(_groups(prompts, 1, 1, settings)), features)  # a process's first call is slower
    trial = monotonic()
    engine.capture(next(_groups(prompts, size, TRIAL_TOKENS, settings)), features)
    # As long answers as the time allows: one group at least is answered whole.
    most = max(1, min(most, int(TRIAL_TOKENS * seconds / (monotonic() - trial))))
    groups = _groups(prompts, size, most, settings)
    samples, kept_bytes, tokens, began = list[Sample](), 0, 0, monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        while not samples or monotonic() - began < seconds:
            asked = list(islice(groups, at_once))
            for group in pool.map(lambda one: engine.capture(one, features), asked):
                new = [narrowed(one.sample_id, one.tensors, features) for one in group]
                tokens += sum(_written(sample, features, whole=settings.answers == "data") for sample in new)
                if kept_bytes < KEPT_BYTES_MAX:
                    samples += new
                    kept_bytes += sum(part.nbytes for sample in new for part in sample.values())
    return samples, tokens / (monotonic() - began)


def _prompts(plan: RunPlan, encoding: Encoding) -> list[EncodedPrompt]:
    """Encoded prompts spread over the data. Raises ConfigError if none can be captured."""
    data = plan.prompts
    wanted = min(PROMPTS_MAX, plan.config.capture.group_size * 4)
    step = max(1, data.size // wanted)
    read = (prompt for ordinal in range(0, data.size, step) for prompt in data.read(ordinal, 1))
    encoded = (encoding.prompt(number, prompt) for number, prompt in enumerate(read) if not prompt.broken)
    good = list(islice((prompt for prompt in encoded if not prompt.broken), wanted))
    if not good:
        raise ConfigError(
            f"No prompt of {data.name} can be captured.",
            why="The measurement takes the run's own prompts.",
            next="paceline data check RUN.yaml shows why.",
        )
    return good


def _groups(
    prompts: Sequence[EncodedPrompt], size: int, most: int, settings: CaptureSettings
) -> Iterator[list[CaptureRequest]]:
    """Groups without end, with answers of at most `most` tokens; every request has an id of its own."""
    requests = (
        CaptureRequest(
            f"bench-{number}",
            prompt.token_ids,
            prompt.spans,
            max_new_tokens=0 if prompt.is_whole else most,
            temperature=0.0 if prompt.is_whole else settings.first_round_temperature,
            seed=number,
        )
        for number, prompt in enumerate(cycle(prompts))
    )
    while True:
        yield list(islice(requests, size))


def _written(sample: Sample, features: Sequence[Feature], *, whole: bool) -> int:
    targets = sample[name_of(Targets, features)]
    return len(targets) if whole else int(targets.sum())


# -- store and training -------------------------------------------------------------------------


def _store(plan: RunPlan, samples: Sequence[Sample], seconds: float) -> float:
    """MiB a second that are put into a store of the run's kind, digested."""
    section = plan.config.features
    with tempfile.TemporaryDirectory(prefix="paceline-bench-", dir=section.directory) as name:
        store = section.build(Path(name) / "features", owner=True)
        num_bytes, began = 0, monotonic()
        for number, sample in enumerate(cycle(samples)):
            sealed = store.put(f"s{number}", sample, generation=number + 1)
            num_bytes += sealed.num_bytes
            store.free([(f"s{number}", number + 1)])
            if monotonic() - began > seconds:
                break
        took = monotonic() - began
        store.destroy()
    return num_bytes / 2**20 / took


def _train(plan: RunPlan, samples: Sequence[Sample], features: Sequence[Feature], seconds: float) -> float:
    """Tokens to predict that are trained a second, after the first step, which warms up."""
    config, began = plan.config, monotonic()
    compute_deterministically(config.machine.consumer_threads)
    section: MethodSection = config.method
    head, samples = TargetHead.load(config.target.model), [widened(sample) for sample in samples]
    totals = plan.num_steps([plan.stretch])
    learner = TorchLearner(section.build(), head, trainer_settings(config, totals))
    learner.build(list(samples[: section.first_samples]))
    mask = name_of(Targets, features)
    visits = cycle(samples)
    tokens, timed_from = 0, began
    for step in range(1, 1 << 30):
        batch = list(islice(visits, config.training.batch_size))
        learner.step(step, batch)
        if step == 1:
            timed_from = monotonic()
            continue
        tokens += sum(int(sample[mask].sum()) for sample in batch)
        if step > STEPS_MIN and monotonic() - began > seconds:
            break
    return tokens / (monotonic() - timed_from)


def measured(text: str) -> str:
    request: Any = BenchRequest.model_validate_json(text)
    return bench(request).model_dump_json()


if __name__ == "__main__":
    sys.exit(answer(measured))
