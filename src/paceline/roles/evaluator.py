"""The evaluator process: `python -m paceline.roles.evaluator RUN.yaml`. It writes evaluation.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from paceline.durable_files import replace_file
from paceline.evaluation.acceptance import measure_acceptance
from paceline.evaluation.heldout import refuse_nothing_to_measure
from paceline.evaluation.library_target import LibraryTarget
from paceline.evaluation.speculative import Decoding
from paceline.evaluation.target import LlamaTarget
from paceline.evaluation.tree import Drafting
from paceline.evaluation.verifier import Verifier
from paceline.ledger.facts import RENDERING_DATE
from paceline.ledger.stores.sqlite.view import LedgerView
from paceline.precision import resolve_device, torch_dtype
from paceline.roles.draft import newest_checkpoint
from paceline.roles.held_out import held_out_prompts
from paceline.roles.plan import RunPlan
from paceline.roles.process import run_role
from paceline.roles.target_binding import refuse_other_target
from paceline.target.head import TargetHead
from paceline.target.plain_llama import why_not_plain_llama
from paceline.target.tokenizer import PromptEncoder
from paceline.telemetry import EventLog
from paceline.training.torch_learner import DRAFT, restore_draft


def evaluate(plan: RunPlan, events: EventLog, should_stop: Callable[[], bool]) -> None:  # noqa: ARG001
    """Decode held-out prompts plainly and speculatively with the newest checkpoint's draft."""
    config = plan.config
    view = LedgerView(config.ledger_path)
    refuse_other_target(view, config)
    checkpoint = newest_checkpoint(config, view, only=(DRAFT,))
    date = view.facts().get(RENDERING_DATE)
    device = resolve_device(config.evaluation.device)
    method, head = config.method.build(), TargetHead.load(config.target.model)
    dtype = _dtype(config.evaluation.dtype, head, device)
    draft = restore_draft(method, head, checkpoint.files)
    section = config.evaluation
    chain = Drafting(min(3, section.draft_tokens))
    tree = Drafting(section.draft_tokens, section.branching, min(section.depth, section.draft_tokens))
    ways = [chain] if section.branching == 1 else [tree, chain]
    drafter = method.drafter(draft.to(device), dtype)
    target: Verifier
    if why_not_plain_llama(head.config):
        target = LibraryTarget(config.target.model, drafter.layers, dtype, device)
    else:
        target = LlamaTarget(head, drafter.layers, dtype, device)
    encoder = PromptEncoder.of(config.target, date=date)
    positions = head.config.get("max_position_embeddings")
    held_out = held_out_prompts(config, encoder.encode, head.vocab_size, positions)
    refuse_nothing_to_measure(held_out)
    reports = measure_acceptance(
        target,
        drafter,
        held_out.prompts,
        Decoding(max_new_tokens=section.max_new_tokens, eos_token_ids=head.eos_token_ids),
        ways,
    )
    result = {
        "checkpoint_step": checkpoint.step,
        "dtype": str(dtype),
        "device": device.type,
        "prompts_file": str(section.prompts),
        "max_new_tokens": section.max_new_tokens,
        **reports[0].to_dict(),
        "chain": reports[-1].to_dict(),
        "prompts_set_aside": dict(held_out.left_out),
    }
    path = config.run.directory / "evaluation.json"
    replace_file(path, (json.dumps(result, indent=1) + "\n").encode())
    events.write("evaluated", **result)


def _dtype(name: str, head: TargetHead, device: torch.device) -> torch.dtype:
    """The library's sums depend, in bfloat16, on the number of rows: "auto" is float32 there."""
    if name == "auto" and why_not_plain_llama(head.config):
        return torch.float32
    return torch_dtype(name, device)


if __name__ == "__main__":
    sys.exit(run_role("evaluator", Path(sys.argv[1]), evaluate, stops_itself=False))
