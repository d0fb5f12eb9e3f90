"""What a setting does to a draft per token: samples captured once, then trained on again and again.

    python -m benchmarks.levers capture FOLDER [--model FOLDER] [--groups N]
    python -m benchmarks.levers train FOLDER [--model FOLDER] [--tokens N] [KEY=VALUE ...]

`capture` writes the samples that recipes/smollm2-cpu.yaml would capture, group by group (it goes on where it
was killed), and the target's greedy answers to the held-out prompts. `train` trains a draft on the first N
tokens of them (from the start again if they do not suffice), in the recipe's order and by its settings,
changed by keys of the run file such as `method.loss=kl`, and prints one line of JSON. Nothing but the setting
differs between two lines: samples, their order and the held-out text are the same.

Figures, over every token of the held-out answers: `chain`, the tokens that a cycle of a greedy chain of three
gives, by the target's choice in its whole vocabulary (a test holds this equal to decoding from each token);
`hits`, how often the guess at each depth is right where the text before it is the target's. `seconds` are the
processor's. The standard error of a chain is about 0.012, that of a difference on the same tokens less.

`--noise X` adds Gaussian noise of X times a state's size to the features; `--ema X` measures the average of
the weights that forgets as X per step, beside the last weights; `--rate NAME=X` scales a parameter's rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from paceline.config.load import parse_run_config
from paceline.config.run import RunConfig
from paceline.engines.engine import CaptureRequest
from paceline.engines.transformers import TransformersEngine
from paceline.methods.eagle3.batch import Unrolling, collate
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.methods.losses.settings import LossSection
from paceline.precision import CPU, torch_dtype
from paceline.target.head import TargetHead
from paceline.training.determinism import compute_deterministically
from paceline.training.settings import TrainerSettings
from paceline.training.torch_learner import TorchLearner

Sample = dict[str, torch.Tensor]
RECIPE = Path("recipes/smollm2-cpu.yaml")
HELD_OUT, DEPTH = "heldout.safetensors", 3


def configured(model: str | None, changes: Sequence[str] = ()) -> RunConfig:
    recipe = yaml.safe_load(RECIPE.read_text())
    if model:
        recipe["target"]["model"] = model
    for change in changes:
        key, _, value = change.partition("=")
        section, _, knob = key.partition(".")
        recipe.setdefault(section, {})[knob] = yaml.safe_load(value)
    return parse_run_config(recipe, source=str(RECIPE))


def capture(folder: Path, config: RunConfig, num_groups: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    engine = TransformersEngine(Path(config.target.model))
    features = Eagle3Method().features(engine.facts)
    length, size = config.data.max_answer_tokens, config.capture.group_size
    prompts = _prompts(Path("prompts/train.jsonl"))
    for number in range(num_groups):
        path = folder / f"group-{number:03}.safetensors"
        if path.exists():
            continue
        requests = []
        for place in range(number * size, (number + 1) * size):
            again, prompt = divmod(place, len(prompts))
            ids, heat = engine.encode(prompts[prompt]), config.data.temperature if again else 0.0
            requests.append(CaptureRequest(str(place), ids, (), length, heat, seed=place))
        _keep(path, [sample.tensors for sample in engine.capture(requests, features)])
        print(path.name, flush=True)
    held_out = [
        CaptureRequest(str(n), engine.encode(prompt), (), length)
        for n, prompt in enumerate(_prompts(config.evaluation.prompts))
    ]
    _keep(folder / HELD_OUT, [sample.tensors for sample in engine.capture(held_out, features)])


def _prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def _keep(path: Path, samples: Sequence[Sample]) -> None:
    tensors = {
        f"{n}.{name}": t.contiguous() for n, sample in enumerate(samples) for name, t in sample.items()
    }
    aside = path.with_suffix(".part")
    save_file(tensors, aside)
    aside.rename(path)


def kept(path: Path) -> list[Sample]:
    samples: dict[int, Sample] = {}
    for key, tensor in load_file(path).items():
        number, _, name = key.partition(".")
        samples.setdefault(int(number), {})[name] = tensor
    return [samples[n] for n in range(len(samples))]


def captured(folder: Path) -> list[Sample]:
    """The samples of all groups, in the order of their capture."""
    return [sample for path in sorted(folder.glob("group-*.safetensors")) for sample in kept(path)]


@dataclass(frozen=True)
class Trial:
    """What the run file has no setting for."""

    tokens: int
    noise: float
    ema: float
    rates: Mapping[str, float]


def train(folder: Path, config: RunConfig, trial: Trial) -> dict[str, Any]:
    method, head = config.method.build(), TargetHead.load(config.target.model)
    samples = captured(folder)
    size, batches, tokens = config.training.batch_size, list[list[Sample]](), 0
    again = itertools.cycle(samples)
    while tokens < trial.tokens:
        batches.append(list(itertools.islice(again, size)))
        tokens += method.num_tokens(batches[-1])
    first = samples[: config.method.first_samples]
    dtype = torch_dtype(config.method.dtype, CPU)
    settings = TrainerSettings(
        total_steps=len(batches),
        first_samples=len(first),
        training=config.training,
        seed=config.run.seed,
        autocast_dtype=dtype if dtype is torch.bfloat16 else None,
    )
    scales = {**method.learning_rate_scales(), **trial.rates}
    method.learning_rate_scales = lambda: scales  # type: ignore[method-assign]
    learner = TorchLearner(method, head, settings)
    learner.build(first)
    assert isinstance(learner.draft, Eagle3Draft)
    average = {name: weight.detach().clone() for name, weight in learner.draft.named_parameters()}
    generator, began = torch.Generator().manual_seed(0), time.process_time()
    for step, batch in enumerate(batches, 1):
        learner.step(
            step, [_noisy(sample, trial.noise, generator) for sample in batch] if trial.noise else batch
        )
        if trial.ema:
            for name, weight in learner.draft.named_parameters():
                average[name].lerp_(weight.detach(), 1.0 - min(trial.ema, step / (step + 10)))
    seconds = time.process_time() - began
    held_out = kept(folder / HELD_OUT)
    found = {
        "tokens": tokens,
        "steps": len(batches),
        "seconds": round(seconds, 1),
        **score(learner.draft, held_out),
    }
    if trial.ema:
        learner.draft.load_state_dict(average, strict=False)
        found["averaged"] = score(learner.draft, held_out)
    return found


def _noisy(sample: Sample, size: float, generator: torch.Generator) -> Sample:
    states = sample["aux_hidden_states"]
    noise = (
        torch.randn(states.shape, generator=generator) * states.float().square().mean(-1, keepdim=True).sqrt()
    )
    return {**sample, "aux_hidden_states": (states + size * noise).to(states.dtype)}


@torch.no_grad()
def score(draft: Eagle3Draft, held_out: Sequence[Sample]) -> dict[str, Any]:
    """The draft's figures on the held-out answers, in float32; losses are cross entropies."""
    draft.loss = LossSection()
    sums: dict[str, float] = {}
    for sample in held_out:
        for name, value in draft(collate([sample], Unrolling(DEPTH, 1.0, judged_share=1))).metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    hits = [sums[f"hits_{k}"] / sums[f"judged_{k}"] for k in range(DEPTH)]
    losses = [sums[f"loss_{k}"] / sums[f"count_{k}"] for k in range(DEPTH)]
    return {
        "chain": round(1 + sums["chain"] / sums["judged_0"], 4),
        "hits": [round(hit, 4) for hit in hits],
        "losses": [round(loss, 3) for loss in losses],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=("capture", "train"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--model", help="the target's folder, if it is not the recipe's")
    parser.add_argument("--groups", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument("--rate", action="append", default=[], metavar="NAME=X")
    given = parser.parse_intermixed_args()
    config = configured(given.model, given.changes)
    compute_deterministically(1)
    if given.verb == "capture":
        capture(given.folder, config, given.groups)
        return
    rates = {name: float(rate) for name, _, rate in (text.partition("=") for text in given.rate)}
    found = train(given.folder, config, Trial(given.tokens, given.noise, given.ema, rates))
    tried = [f"{name} {value}" for name in ("noise", "ema") if (value := getattr(given, name))]
    print(json.dumps({"changes": [*given.changes, *given.rate, *tried], **found}))


if __name__ == "__main__":
    main()
