"""Measures a draft on suites of prompts, and writes down what was found as one report.

A part of the report is a suite at a temperature. Greedy parts measure the run file's tree and a chain,
sampled ones the chain alone, which rejection sampling verifies; all measure prompt lookup, the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from paceline.config.run import RunConfig
from paceline.data.opening import scan
from paceline.data.prompts import asked
from paceline.errors import ConfigError
from paceline.evaluation.acceptance import PromptFigures, Way, compare, decode_prompts, summarise
from paceline.evaluation.heldout import Asked, HeldOut, Room, encode_held_out
from paceline.evaluation.settings import EvaluationRequest
from paceline.evaluation.speculative import Decoding
from paceline.evaluation.suites import HELD_OUT, Suite, SuitePrompt, find_suite, read_suite
from paceline.evaluation.unfinished import Unfinished
from paceline.roles.held_out import TemplateOnly, question
from paceline.roles.measured_draft import LOOKUP, MeasuredDraft, draft_ways, lookup_way
from paceline.roles.wire import Report, no_report

DEFINITION = "1 + accepted draft tokens / cycles"
INTERVALS = "95 %, bootstrap over prompts, percentiles of 2000 draws, seed 0"
ALL = "all"


@dataclass(frozen=True)
class ReadSuite:
    """`broken`: why records of the suite cannot be used. `also_trained`: how many of the run's training
    prompts are among the suite's; None if that is unknown."""

    suite: Suite
    prompts: list[SuitePrompt]
    broken: dict[str, str]
    also_trained: int | None


def read_suites(config: RunConfig, request: EvaluationRequest) -> list[ReadSuite]:
    """Raises ConfigError for a suite that does not exist or holds no prompt."""
    most, found = request.max_prompts or config.evaluation.max_prompts, []
    for suite in [find_suite(name, config.evaluation.prompts) for name in request.suites]:
        prompts, broken = read_suite(suite, most)
        # The held-out prompts were compared when the run was planned.
        shared = 0 if suite.name == HELD_OUT else _also_trained(config, prompts)
        found.append(ReadSuite(suite, prompts, broken, shared))
    return found


def measure_suites(
    config: RunConfig,
    measured: MeasuredDraft,
    suites: Sequence[ReadSuite],
    temperatures: Sequence[float],
    unfinished: Unfinished,
    report: Report = no_report,
) -> list[dict[str, Any]]:
    """A part of the report for each suite and temperature, as JSON values. `report` hears of each prompt.

    Raises ConfigError if no prompt of a suite can be decoded.
    """
    target = TemplateOnly(measured.encoder, config.target.model)
    answer = config.evaluation.max_new_tokens
    parts = []
    for read in suites:
        room = Room(measured.head.vocab_size, measured.positions, None, answer)
        held_out = encode_held_out(read.prompts, lambda prompt: question(prompt, target), room)
        _refuse_none(read.suite, held_out)
        for temperature in temperatures:
            decoding = Decoding(answer, measured.head.eos_token_ids, temperature)
            ways = [
                way for way in draft_ways(config, measured) if temperature <= 0 or way.drafting.is_chain
            ] + [lookup_way(config, measured)]
            part = _Part(f"{read.suite.path}, temperature {temperature:g}", ways, held_out.asked, decoding)
            figures = _measured(measured, part, unfinished, report)
            parts.append(
                {
                    "suite": read.suite.name,
                    "file": str(read.suite.path),
                    "temperature": temperature,
                    "also_trained": read.also_trained,
                    "left_out": {**read.broken, **held_out.left_out},
                    "groups": groups_of(figures, ways),
                    "prompts": [asdict(each) for each in figures],
                }
            )
    return parts


def groups_of(figures: Sequence[PromptFigures], ways: Sequence[Way]) -> list[dict[str, Any]]:
    """All prompts, then each category if there are several: the report of every way, and each draft's
    comparison with the lookup."""
    categories = sorted({each.category for each in figures})
    members = {ALL: list(figures)}
    if len(categories) > 1:
        members |= {name: [each for each in figures if each.category == name] for name in categories}
    return [
        {
            "category": name,
            "prompts": len(group),
            "ways": {way.name: summarise(group, way.name, way.drafting).to_dict() for way in ways},
            "against_lookup": {
                way.name: asdict(compare(group, way.name, LOOKUP)) for way in ways if way.name != LOOKUP
            },
        }
        for name, group in members.items()
    ]


@dataclass(frozen=True)
class _Part:
    """A suite at a temperature."""

    name: str
    ways: Sequence[Way]
    asked: Sequence[Asked]
    decoding: Decoding


def _measured(
    measured: MeasuredDraft, part: _Part, unfinished: Unfinished, report: Report
) -> list[PromptFigures]:
    """The figures of every prompt; those that an earlier, killed evaluation has are taken from there."""
    found = {prompt: unfinished.find(part.name, prompt) for prompt in part.asked}
    left = [prompt for prompt, figures in found.items() if figures is None]
    if left:
        decoded = decode_prompts(measured.target, part.ways, left, part.decoding)
        for place, (prompt, figures) in enumerate(zip(left, decoded, strict=True)):
            unfinished.add(part.name, prompt, figures)
            found[prompt] = figures
            done = len(found) - len(left) + place + 1
            report("measured", prompts=done, of=len(found), what=part.name)
    return [figures for figures in found.values() if figures is not None]


def _also_trained(config: RunConfig, prompts: Sequence[SuitePrompt]) -> int | None:
    sections = config.data.sources
    if not sections or any(section.path is None for section in sections):
        return None  # kept answers, or a data set of the hub
    keys = {key for each in prompts for key, _ in asked(each.prompt)[-1:]}
    return sum(scan(section, heldout=keys).index.shared for section in sections)


def _refuse_none(suite: Suite, held_out: HeldOut) -> None:
    if not held_out.asked:
        name, reason = next(iter(held_out.left_out.items()))
        raise ConfigError(
            f"No prompt of the suite {suite.name} can be decoded; the first, {name}: {reason}.",
            why="Without one there is nothing to measure the draft on.",
            next="choose shorter prompts, or lower evaluation.max_new_tokens.",
        )
