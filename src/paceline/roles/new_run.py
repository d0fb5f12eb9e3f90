"""A run file for a target, data and a machine: what `paceline init` chooses, and why, as a commented text.

The choices are starting points, by the target's size and by what it runs on; none was tuned for the target.
No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paceline.engines.table import ENGINES
from paceline.exports.drafted_methods import servers_of
from paceline.methods.table import METHODS
from paceline.section import StartingValue as Entry
from paceline.target.shape import TargetShape

COMMENTS_AT = 34  # column
IN_THE_PRODUCER = "transformers"  # the engine that is no server


def servers() -> list[str]:
    """The engines that run the target in a program of its own, also installed ones."""
    return [name for name in ENGINES.names() if name != IN_THE_PRODUCER]


@dataclass(frozen=True)
class Wishes:
    """What the user asked for. `serve`: one of `servers`, or "" for the target in the producer's process.

    `samples`: of the data. `processors`: of a machine without a GPU. `thinks`: whether the chat template has
    the variable enable_thinking. `command`: the command that wrote the file, for its first line.
    """

    name: str
    target: str
    data: Path
    heldout: Path
    method: str
    gpus: int
    serve: str
    samples: int
    processors: int = 2
    thinks: bool = False
    command: str = "paceline init"


@dataclass(frozen=True)
class _Sizes:
    """Numbers that depend on what the run computes on, and on how much data there is."""

    prompt: int
    answer: int
    group: int
    batch: int
    micro_batch: int
    passes: int
    first_samples: int
    interval: int
    warmup: int
    rate: float


def run_file(wishes: Wishes, shape: TargetShape, budget_mib: int) -> str:
    """The text of the run file."""
    sizes = _sizes(wishes, shape)
    sections = {
        "run": _run(wishes),
        "target": _target(wishes),
        "engine": _engine(wishes),
        "data": _data(wishes, sizes),
        "capture": _capture(wishes, sizes),
        "features": [
            ("budget_mib", budget_mib, "of shared memory; paceline plan says how many samples it holds"),
        ],
        "method": _method(wishes, shape, sizes),
        "training": _training(wishes, sizes),
        "checkpoint": [("interval_steps", sizes.interval, "a crash costs at most so many steps again")],
        "evaluation": _evaluation(wishes, shape),
        "export": _export(wishes),
        "machine": _machine(wishes),
    }
    lines = list(_head(wishes, shape))
    for name, entries in sections.items():
        if entries:
            lines += [f"{name}:", *(_entry(*entry) for entry in entries)]
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, comment: str = "") -> str:
    shown = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    line = f"  {key}: {shown.removesuffix('...' + chr(10)).strip()}"
    if not comment:
        return line
    if len(line) < COMMENTS_AT:
        return f"{line:<{COMMENTS_AT - 1}} # {comment}"
    return f"  # {comment}\n{line}"


def _head(wishes: Wishes, shape: TargetShape) -> Iterator[str]:
    size = f"{shape.parameters / 1e9:.3g} B" if shape.parameters >= 1e9 else f"{shape.parameters / 1e6:.3g} M"
    where = f"{wishes.gpus} GPU{'s' * (wishes.gpus > 1)}" if wishes.gpus else "processors"
    yield f"# A draft ({wishes.method}) for a target of {size} parameters, on {where}."
    yield "# Next: paceline plan, doctor and train, each with this file. Written by:"
    yield f"#   {wishes.command}"
    yield "# The figures are starting points by size; none was tuned for this target."


def _run(wishes: Wishes) -> list[Entry]:
    directory = f"runs/{wishes.name}"
    return [
        ("name", wishes.name, ""),
        ("directory", directory, "checkpoints, events, answers; the same command goes on from there"),
        ("seed", 0, ""),
    ]


def _target(wishes: Wishes) -> list[Entry]:
    found: list[Entry] = [
        ("model", wishes.target, "a folder, or a model of the hub; `revision` pins a commit")
    ]
    if wishes.gpus:
        found.append(("dtype", "bfloat16", ""))
    if wishes.thinks:
        found.append(("template", {"enable_thinking": False}, "as you will serve it"))
    return found


def _engine(wishes: Wishes) -> list[Entry]:
    name, told = (wishes.serve, "") if wishes.serve else (IN_THE_PRODUCER, "the target runs in the producer")
    return [("name", name, told), *ENGINES.find(name).starting_values(wishes.name, wishes.gpus)]


def _data(wishes: Wishes, sizes: _Sizes) -> list[Entry]:
    return [
        ("path", str(wishes.data), "paceline data check THIS_FILE shows what is read of it"),
        ("answers", "target", "the target writes every answer anew; `data` trains on the file's own"),
        ("too_long", "truncate", "whole turns go from the end of a chat that is too long"),
        ("max_prompt_tokens", sizes.prompt, ""),
        ("max_answer_tokens", sizes.answer, "longer ones teach more and take longer"),
        ("rounds", 1, "more of them answer the same prompts again, sampled"),
    ]


def _capture(wishes: Wishes, sizes: _Sizes) -> list[Entry]:
    found: list[Entry] = [("group_size", sizes.group, "prompts that are answered together")]
    if wishes.serve:
        found.append(("groups_in_flight", 4, "the server batches what is in flight"))
    return found


def _method(wishes: Wishes, shape: TargetShape, sizes: _Sizes) -> list[Entry]:
    *names, last = METHODS.names()
    return [
        ("name", wishes.method, f"{', '.join(names)} or {last}"),
        ("first_samples", sizes.first_samples, "the first weights are a regression on them"),
        *METHODS.find(wishes.method).starting_values(shape.sizes, large=wishes.gpus > 0),
    ]


def _training(wishes: Wishes, sizes: _Sizes) -> list[Entry]:
    found: list[Entry] = []
    if wishes.gpus:
        other = wishes.gpus > 1
        found.append(("device", f"cuda:{wishes.gpus - 1 if other else 0}", ""))
    return [
        *found,
        ("passes", sizes.passes, "visits of each sample while its features are there"),
        ("batch_size", sizes.batch, "samples a step"),
        ("micro_batch_size", sizes.micro_batch, "fewer need less memory; the weights stay the same"),
        ("learning_rate", sizes.rate, ""),
        ("final_learning_rate", sizes.rate / 20, ""),
        ("warmup_steps", sizes.warmup, "a twentieth of the steps, at most 200"),
    ]


def _evaluation(wishes: Wishes, shape: TargetShape) -> list[Entry]:
    quantised = f"not measured: a quantised target ({shape.quantised}) is not decoded here"
    found: list[Entry] = [
        ("prompts", str(wishes.heldout), quantised if shape.quantised else "never trained on"),
        ("max_prompts", 24, ""),
        ("max_new_tokens", 256 if wishes.gpus else 64, ""),
    ]
    if wishes.gpus:
        found.append(("device", f"cuda:{wishes.gpus - 1}", ""))
    return found


def _export(wishes: Wishes) -> list[Entry]:
    formats = servers_of(wishes.method)
    return [("formats", formats, "folders that these servers load")] if formats else []


def _machine(wishes: Wishes) -> list[Entry]:
    if wishes.gpus:
        return [
            ("producer_threads", 2, "of processors"),
            ("consumer_threads", 4, "the first weights are made on them"),
        ]
    half = max(1, wishes.processors // 2)
    return [
        ("producer_threads", half, "fixed for the run: their number decides bits"),
        ("consumer_threads", max(1, wishes.processors - half), ""),
    ]


def _sizes(wishes: Wishes, shape: TargetShape) -> _Sizes:
    is_large, hidden = wishes.gpus > 0, shape.sizes.hidden_size
    batch, passes = (16, 2) if is_large else (2, 2)
    steps = max(1, math.ceil(wishes.samples * passes / batch))
    positions = shape.max_positions or 1 << 20
    prompt, answer = (2048, 512) if is_large else (320, 64)
    return _Sizes(
        prompt=min(prompt, positions // 2),
        answer=min(answer, max(1, positions // 4)),
        group=32,
        batch=batch,
        micro_batch=4 if is_large else 2,
        passes=passes,
        first_samples=max(1, min(128 if is_large else 96, wishes.samples // 4)),
        interval=max(25, min(500 if is_large else 200, steps // 4)),
        warmup=min(200, max(1, steps // 20)),
        rate=1e-3 if hidden <= 1024 else 4e-4 if hidden <= 2560 else 2e-4,
    )
