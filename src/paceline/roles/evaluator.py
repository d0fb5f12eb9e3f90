"""The evaluator process: `python -m paceline.roles.evaluator RUN.yaml`; writes evaluation.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from paceline.capture.prompt_file import PromptFile
from paceline.durable_files import replace_file
from paceline.evaluation.acceptance import measure_acceptance
from paceline.evaluation.speculative import Decoding
from paceline.evaluation.target import LlamaTarget
from paceline.evaluation.tree import Drafting
from paceline.ledger.facts import RENDERING_DATE
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.precision import CPU, torch_dtype
from paceline.roles.draft import newest_checkpoint
from paceline.roles.plan import RunPlan
from paceline.roles.process import run_role
from paceline.target.head import TargetHead
from paceline.target.tokenizer import PromptEncoder
from paceline.telemetry import EventLog
from paceline.training.torch_learner import restore_draft


def evaluate(plan: RunPlan, events: EventLog, should_stop: Callable[[], bool]) -> None:  # noqa: ARG001
    """Decode held-out prompts plainly and speculatively with the newest checkpoint's draft."""
    config = plan.config
    store = SQLiteMetadataStore(config.ledger_path)
    checkpoint = newest_checkpoint(config, store)
    date = store.facts().get(RENDERING_DATE)
    store.close()
    dtype = torch_dtype(config.evaluation.dtype, CPU)
    method, head = config.method.build(), TargetHead.load(config.target.model)
    draft = restore_draft(method, head, config.run.seed, checkpoint.files)
    encoder = PromptEncoder(
        config.target.model, max_prompt_tokens=config.prompts.max_prompt_tokens, date=date
    )
    section = config.evaluation
    heldout = PromptFile(section.prompts)
    prompts = [prompt for prompt in heldout.read(0, heldout.size) if not prompt.broken]
    chain = Drafting(min(3, section.draft_tokens))
    tree = Drafting(section.draft_tokens, section.branching, min(section.depth, section.draft_tokens))
    ways = [chain] if section.branching == 1 else [tree, chain]
    drafter = method.drafter(draft, dtype)
    reports = measure_acceptance(
        LlamaTarget(head, drafter.layers, dtype),
        drafter,
        [encoder.encode(prompt.text) for prompt in prompts[: section.max_prompts]],
        Decoding(max_new_tokens=section.max_new_tokens, eos_token_ids=head.eos_token_ids),
        ways,
    )
    result = {
        "checkpoint_step": checkpoint.step,
        "dtype": str(dtype),
        **reports[0].to_dict(),
        "chain": reports[-1].to_dict(),
    }
    path = config.run.directory / "evaluation.json"
    replace_file(path, (json.dumps(result, indent=1) + "\n").encode())
    events.write("evaluated", **result)


if __name__ == "__main__":
    sys.exit(run_role("evaluator", Path(sys.argv[1]), evaluate, stops_itself=False))
