"""Builds what a measurement decodes with, a checkpoint's draft and its target, and measures it.

The evaluator measures at a run's end and for `paceline evaluate`; a measurement during training uses the same
two functions: `build_measured_draft`, then `measure_held_out`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from paceline.config.run import RunConfig
from paceline.evaluation.acceptance import PromptFigures, Way, compare, decode_prompts, summarise
from paceline.evaluation.heldout import Asked, HeldOut, refuse_nothing_to_measure
from paceline.evaluation.library_target import LibraryTarget
from paceline.evaluation.lookup import LookupDrafter
from paceline.evaluation.marked import MarkedAnswer
from paceline.evaluation.settings import EvaluationSection
from paceline.evaluation.speculative import Decoded, Decoding
from paceline.evaluation.target import LlamaTarget
from paceline.evaluation.tree import Drafting
from paceline.evaluation.verifier import Verifier
from paceline.methods.drafter import Drafter
from paceline.precision import resolve_device, torch_dtype
from paceline.roles.held_out import TemplateOnly, held_out_prompts
from paceline.roles.wire import Report, no_report
from paceline.target.head import TargetHead
from paceline.target.plain_llama import why_not_plain_llama
from paceline.target.tokenizer import PromptEncoder
from paceline.training.checkpoint import Checkpoint
from paceline.training.torch_learner import restore_draft

LOOKUP = "lookup"  # the name of the baseline's way


@dataclass(frozen=True)
class MeasuredDraft:
    """A draft and its target on one device, ready to decode. `step`: of the draft's checkpoint; `chain`:
    how many guesses its method makes in a chain."""

    step: int
    chain: int
    drafter: Drafter
    target: Verifier
    head: TargetHead
    encoder: PromptEncoder
    dtype: torch.dtype
    device: torch.device

    @property
    def positions(self) -> int | None:
        """How many positions the target has; None without a limit."""
        limit = self.head.config.get("max_position_embeddings")
        return None if limit is None else int(limit)


class Answers:
    """The draft's answers of a measurement, with its tokens marked, by the way of guessing."""

    def __init__(self) -> None:
        self.of_ways: defaultdict[str, list[MarkedAnswer]] = defaultdict(list)

    def hear(self, asked: Asked, found: Mapping[str, Decoded]) -> None:
        """The answers of one prompt."""
        for name, one in found.items():
            if name != LOOKUP:
                marked = MarkedAnswer.of(asked.prompt_id, asked.token_ids, one.tokens, one.accepted)
                self.of_ways[name].append(marked)


def build_measured_draft(config: RunConfig, checkpoint: Checkpoint, date: str | None) -> MeasuredDraft:
    """`checkpoint` must have been read with its draft; `date`: of the run's fact RENDERING_DATE.

    Raises ConfigError or EngineError for a target that cannot be decoded with.
    """
    device = resolve_device(config.evaluation.device)
    method, head = config.method.build(), TargetHead.load(config.target.model)
    dtype = _dtype(config.evaluation.dtype, head, device)
    drafter: Drafter = method.drafter(restore_draft(method, head, checkpoint.files).to(device), dtype)
    target: Verifier
    if why_not_plain_llama(head.config):
        target = LibraryTarget(config.target.model, drafter.layers, dtype, device)
    else:
        target = LlamaTarget(head, drafter.layers, dtype, device)
    encoder = PromptEncoder.of(config.target, date=date)
    chain = method.chain_length(config.evaluation.draft_tokens)
    return MeasuredDraft(checkpoint.step, chain, drafter, target, head, encoder, dtype, device)


def held_out_of(config: RunConfig, measured: MeasuredDraft) -> HeldOut:
    """The run's held-out prompts. Raises ConfigError if none of them can be decoded."""
    target = TemplateOnly(measured.encoder, config.target.model)
    held_out = held_out_prompts(config, target, measured.head.vocab_size, measured.positions)
    refuse_nothing_to_measure(held_out)
    return held_out


def measure_held_out(
    config: RunConfig,
    measured: MeasuredDraft,
    held_out: HeldOut,
    *,
    with_plain: bool = True,
    with_lookup: bool = False,
    report: Report = no_report,
    answers: Answers | None = None,
) -> dict[str, Any]:
    """The report of greedy decoding as JSON values (see `report_of`), the content of evaluation.json.

    Without plain decoding it is faster, and tells acceptance alone. With the lookup, the figures of the
    baseline stand under "lookup" and the comparison with it under "against_lookup". `report` hears of each
    prompt. `answers` takes up the draft's answers.
    """
    section, drafts = config.evaluation, draft_ways(config, measured)
    ways = [*drafts, lookup_way(config, measured)] if with_lookup else drafts
    decoding = Decoding(section.max_new_tokens, measured.head.eos_token_ids)
    figures: list[PromptFigures] = []
    heard = None if answers is None else answers.hear
    decoded = decode_prompts(
        measured.target, ways, held_out.asked, decoding, with_plain=with_plain, heard=heard
    )
    for each in decoded:
        figures.append(each)
        report("measured", prompts=len(figures), of=len(held_out.asked), what="held-out prompts")
    reports = {way.name: summarise(figures, way.name, way.drafting).to_dict() for way in ways}
    whole = report_of(config, measured, held_out, [reports[way.name] for way in drafts])
    if with_lookup:
        gains = {way.name: asdict(compare(figures, way.name, LOOKUP)) for way in drafts}
        whole |= {LOOKUP: reports[LOOKUP], "against_lookup": gains}
    return {**whole, "figures_of_prompts": [asdict(each) for each in figures]}


def report_of(
    config: RunConfig, measured: MeasuredDraft, held_out: HeldOut, ways: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The figures of each way to draft, the chain's last, with what was measured and how.

    Those of the tree (of the chain, if the run file asks for no tree) stand at the top, the chain's under
    "chain".
    """
    return {
        "checkpoint_step": measured.step,
        "dtype": str(measured.dtype),
        "device": measured.device.type,
        "prompts_file": str(config.evaluation.prompts),
        "max_new_tokens": config.evaluation.max_new_tokens,
        **ways[0],
        "chain": ways[-1],
        "prompts_set_aside": dict(held_out.left_out),
        "prompts_repeated": held_out.repeated,
        "prompts_beyond_max": held_out.beyond,
        "prompts_not_measured": held_out.note,
    }


def ways_of_drafting(section: EvaluationSection, guesses: int) -> list[Drafting]:
    """The run file's tree and a chain of so many `guesses`; the chain alone if `branching` is 1."""
    chain = Drafting(guesses)
    tree = Drafting(section.draft_tokens, section.branching, min(section.depth, section.draft_tokens))
    return [chain] if section.branching == 1 else [tree, chain]


def draft_ways(config: RunConfig, measured: MeasuredDraft) -> list[Way]:
    """The same with the draft: "tree" and "chain", or "chain"."""
    draftings = ways_of_drafting(config.evaluation, measured.chain)
    names = ["tree", "chain"][-len(draftings) :]
    return [Way(name, measured.drafter, drafting) for name, drafting in zip(names, draftings, strict=True)]


def lookup_way(config: RunConfig, measured: MeasuredDraft) -> Way:
    """The baseline guesses as many tokens a cycle as the draft's tree: guesses cost it nothing."""
    drafter = LookupDrafter(measured.head.vocab_size, measured.device)
    return Way(LOOKUP, drafter, Drafting(config.evaluation.draft_tokens))


def _dtype(name: str, head: TargetHead, device: torch.device) -> torch.dtype:
    """The library's sums depend, in bfloat16, on the number of rows: "auto" is float32 there."""
    if name == "auto" and why_not_plain_llama(head.config):
        return torch.float32
    return torch_dtype(name, device)
