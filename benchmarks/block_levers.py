"""What a setting does to a block draft: samples captured once, then trained on again and again.

    python -m benchmarks.levers capture FOLDER
    python -m benchmarks.block_levers FOLDER [--model FOLDER] [--steps N] [--held-out N] [name=dflash
    KEY=VALUE ...]

The samples are those of benchmarks/levers.py: three states of the target each, so `target_states` is 3
here, and the trained drafts serve these figures only. KEY=VALUE are settings of `method`, or
`training.KEY=VALUE`. The other settings are those of recipes/smollm2-cpu.yaml. One line of JSON a run.

Figures over every token of the held-out greedy answers, in bfloat16: `chain`, the tokens that a cycle of a
greedy chain of a whole block gives, the target's own included; `hits`, how often the guess at each depth is
right where the text before it is the target's. `seconds` are the processor's, with one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.levers import HELD_OUT, RECIPE, Sample, captured, kept
from paceline.config.load import parse_run_config
from paceline.config.run import RunConfig
from paceline.methods.dflash.model import DFlashDraft
from paceline.precision import CPU
from paceline.target.head import TargetHead
from paceline.training.determinism import compute_deterministically
from paceline.training.settings import TrainerSettings
from paceline.training.torch_learner import TorchLearner

ALL = 1 << 30


def configured(model: str | None, changes: Sequence[str]) -> RunConfig:
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["method"] = {"name": "dflash", "target_states": 3, "dtype": "bfloat16"}
    if model:
        recipe["target"]["model"] = model
    for change in changes:
        key, _, value = change.partition("=")
        section, _, knob = key.rpartition(".")
        recipe[section or "method"][knob] = yaml.safe_load(value)
    return parse_run_config(recipe, source=str(RECIPE))


def train(folder: Path, config: RunConfig, steps: int, held_out: Sequence[Sample]) -> dict[str, Any]:
    method, head = config.method.build(), TargetHead.load(config.target.model)
    samples = captured(folder)
    settings = TrainerSettings(
        total_steps=max(1, steps),
        first_samples=config.method.first_samples,
        training=config.training,
        seed=config.run.seed,
        autocast_dtype=torch.bfloat16,
    )
    learner = TorchLearner(method, head, settings)
    learner.build(samples[: config.method.first_samples])
    again, tokens, began = itertools.cycle(samples), 0, time.process_time()
    for step in range(1, steps + 1):
        batch = list(itertools.islice(again, config.training.batch_size))
        learner.step(step, batch)
        tokens += sum(int(sample["input_ids"].numel()) for sample in batch)
    seconds = time.process_time() - began
    assert isinstance(learner.draft, DFlashDraft)
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
        **score(learner.draft, config, held_out),
    }


@torch.no_grad()
def score(draft: DFlashDraft, config: RunConfig, held_out: Sequence[Sample]) -> dict[str, Any]:
    section = config.method.model_copy(update={"anchors_max": ALL})
    method, sums = section.build(), dict[str, float]()
    for sample in held_out:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            metrics = draft(method.collate([sample], CPU)).metrics
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    depths = range(draft.config.depths)
    return {
        "chain": round(1 + sums["chain"] / sums["judged_0"], 4),
        "hits": [round(sums[f"hits_{k}"] / max(1.0, sums[f"judged_{k}"]), 3) for k in depths],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--model", help="the target's folder, if it is not the recipe's")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=16)
    given = parser.parse_intermixed_args()
    compute_deterministically(1)
    config = configured(given.model, given.changes)
    held_out = kept(given.folder / HELD_OUT)[: given.held_out]
    print(json.dumps({"changes": given.changes, **train(given.folder, config, given.steps, held_out)}))


if __name__ == "__main__":
    main()
