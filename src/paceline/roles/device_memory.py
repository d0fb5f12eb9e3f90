"""What roles take of a GPU's memory beside weights and optimizer. No torch.

Upper estimates, within about a third of what is measured: tensors that live at the same time are added up.
Libraries, fragments, what kernels keep for themselves, and the engine's attention are not in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from paceline.config.run import RunConfig
from paceline.engines.settings import PREFILL_ROWS, TransformersSection
from paceline.methods.settings import MicroBatch
from paceline.roles.evaluation_schedule import EVALUATOR
from paceline.roles.footprint import Process, SampleSizes, target_bytes
from paceline.roles.lengths import Lengths
from paceline.roles.machine import Machine
from paceline.roles.plan import RunPlan
from paceline.roles.trainers import trainer_roles
from paceline.target.shape import BYTES, LayerSizes, TargetShape

CHOICE_BYTES = 12  # of a token's logit while the next token is chosen: float32, three times


@dataclass(frozen=True)
class Extent:
    """Tokens of a sample: of its `prompt`, of its `answer`, and `targets` that the draft learns."""

    prompt: float
    answer: float
    targets: float

    @property
    def tokens(self) -> float:
        return self.prompt + self.answer


def extents(plan: RunPlan, sizes: SampleSizes, lengths: Lengths) -> tuple[Extent, Extent]:
    """Of a sample as the data suggests, and of the largest one."""
    data = plan.config.data
    longest, answer = data.max_prompt_tokens, data.max_answer_tokens
    are_prompts = data.answers == "target" and not plan.prompts.has_chats
    return (
        Extent(lengths.prompt, lengths.answers, lengths.answers),
        Extent(longest, answer, answer if are_prompts else sizes.tokens_max),
    )


def with_activations(
    processes: list[Process],
    plan: RunPlan,
    shape: TargetShape,
    machine: Machine,
    sizes: SampleSizes,
    lengths: Lengths,
    trained: int | None,
) -> list[Process]:
    """The processes, with what they take of GPUs for samples as the data suggests and for the largest ones;
    and the evaluator, if it can measure and does so while training goes on."""
    about, most = extents(plan, sizes, lengths)
    config, trainers = plan.config, trainer_roles(plan.config)
    found = []
    for process in processes:
        told = [0.0, 0.0]
        if process.device != "cpu" and process.role in trainers and trained is not None:
            width = int(BYTES[machine.dtype(config.method.dtype, process.device)])
            casts = trained * width if width < BYTES["float32"] else 0
            told = [casts + training_bytes(config, shape.sizes, one, width) for one in (about, most)]
        elif process.device.startswith("cuda") and isinstance(config.engine, TransformersSection):
            width = int(BYTES[sizes.dtype])
            told = [capture_bytes(config, shape.sizes, one, sizes.layers, width) for one in (about, most)]
        # Of micro_batch_tokens the largest samples may be fewer tokens to learn than others.
        low, high = (int(value) or None for value in (told[0], max(told)))
        found.append(process.model_copy(update={"activations_about": low, "activations_max": high}))
    return found if plan.evaluation_obstacle else [*found, *_evaluator(config, shape, machine, trained)]


def training_bytes(config: RunConfig, target: LayerSizes, sample: Extent, width: int) -> float:
    """Of the activations of a micro-batch of such samples, in products of `width` bytes a number."""
    training = config.training
    if training.micro_batch_tokens is not None:
        samples = max(1.0, training.micro_batch_tokens / sample.tokens)
    else:
        samples = float(training.micro_batch_size)
        if training.tokens_per_step is None:  # ranks divide a step's samples
            samples = min(samples, math.ceil(training.batch_size / config.machine.trainers))
    batch = MicroBatch(samples, samples * sample.tokens, samples * sample.targets, width)
    return config.method.activation_bytes(target, batch)


def capture_bytes(config: RunConfig, target: LayerSizes, sample: Extent, states: int, width: int) -> float:
    """Of a capture group of the transformers engine: the cache of keys and values, the states that are kept
    (`states` of every token, one of every target), what the prefill computes in a layer, and the logits."""
    rows, hidden = config.capture.group_size, target.hidden_size
    # A given answer is read as the prompt is, and not gone on from.
    is_written = config.data.answers == "target"
    writing = rows if is_written else 0
    together = min(rows, PREFILL_ROWS) * (sample.prompt if is_written else sample.tokens)
    cache = 2 * target.num_hidden_layers * target.key_width * width * (writing * sample.tokens + together)
    kept = rows * width * hidden * (states * sample.tokens + sample.targets)
    layer = together * (8 * hidden + width * ((states + 3) * hidden + 3 * target.intermediate_size))
    return cache + kept + layer + writing * target.vocab_size * CHOICE_BYTES


def _evaluator(config: RunConfig, shape: TargetShape, machine: Machine, trained: int | None) -> list[Process]:
    """Its copy of target and draft. It decodes one prompt at a time, so the rest is small."""
    evaluation = config.evaluation
    if evaluation is None or not evaluation.every_steps:
        return []
    device = machine.device(evaluation.device)
    dtype = machine.dtype(evaluation.dtype, device)
    return [
        Process(
            role=EVALUATOR,
            device=device,
            threads=None,
            what=f"the target and the draft, every {evaluation.every_steps} steps",
            memory_bytes=target_bytes(shape, dtype) + int((trained or 0) * BYTES[dtype]),
        )
    ]
