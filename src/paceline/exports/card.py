"""The model card of an exported draft: what it drafts for, how well, and how that was measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.exports.export import ExportedDraft
from paceline.exports.reader.replay import Verdict
from paceline.target.rope import rope_kind


def model_card(
    draft: ExportedDraft,
    commands: Mapping[str, list[str]],
    evaluation: Mapping[str, Any],
    verdict: Verdict,
    replayed: str,
    refusals: Sequence[str] = (),
) -> str:
    """Markdown. `evaluation`: the run's report, {} if this step was not measured; `replayed`: the rows.

    `refusals`: what is known of servers that do not draft for the target, a sentence each.
    """
    name = draft.target.name
    front = ["---", "tags:", "- speculative-decoding", f"- {draft.method}"]
    front += [f"base_model: {name}"] if not name.startswith("/") else []
    parts = [
        [*front, "---", ""],
        [f"# A draft model for {name.rpartition('/')[2]}", ""],
        _facts(draft),
        _measured(draft, evaluation),
        _checked(verdict, replayed),
        ["## Serving", ""],
        *([told, ""] for told in refusals),
    ]
    for server, command in commands.items():
        parts.append([f"{server}:", "", "```sh", shlex.join(command), "```", ""])
    return "\n".join(line for part in parts for line in part)


def _facts(draft: ExportedDraft) -> list[str]:
    target, origin = draft.target, draft.origin
    rows = {
        "method": draft.method,
        "target": target.name,
        "target revision": target.revision or "unknown",
        "target digest (weights and config)": target.version.model,
        "target digest (tokenizer)": target.version.tokenizer,
        "reads the target's states after blocks": ", ".join(map(str, draft.sizes["aux_layer_ids"])),
        "draft vocabulary": f"{draft.sizes['draft_vocab_size']} of {draft.sizes['vocab_size']} tokens",
        **_rope(draft),
        "dtype": draft.dtype,
        **{name.replace("_", " "): value for name, value in origin.items()},
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def _rope(draft: ExportedDraft) -> dict[str, str]:
    """Only where the target's scaling is none that the draft takes over."""
    kind = rope_kind(draft.target.config)
    if kind == "default" or draft.sizes["rope_scaling"]:
        return {}
    return {"rotary embedding": f"plain frequencies; the target's are of the kind {kind!r}"}


def _measured(draft: ExportedDraft, evaluation: Mapping[str, Any]) -> list[str]:
    if not evaluation:
        return ["## Acceptance", "", f"The draft of step {draft.origin['step']} was not measured.", ""]
    e, ways = evaluation, {"a chain": evaluation["chain"]}
    where = f"{str(e.get('dtype')).removeprefix('torch.')} on {e.get('device')}"
    prompts = f"{e['prompts']} held-out prompts of {Path(str(e.get('prompts_file', 'an unknown file'))).name}"
    if evaluation["branching"] != 1:
        ways["a tree"] = evaluation
    if "lookup" in evaluation:
        ways["no draft, prompt lookup"] = evaluation["lookup"]
    lines = [
        "## Acceptance",
        "",
        f"Lossless decoding of {prompts}, up to {e.get('max_new_tokens', '?')} tokens an answer, in {where}: "
        f"{_compared(e)} The checkpoint's own "
        f"weights were measured, before they were written here in {draft.dtype}.",
        "",
        "| guesses a cycle | acceptance length | emitted tokens a cycle | kept at depth 1, 2, ... |",
        "|---|---|---|---|",
    ]
    for shape, way in ways.items():
        kept = ", ".join(f"{share:.3f}" for share in way["acceptance_rate"])
        bounds = way.get("acceptance_length_interval")
        is_known = isinstance(bounds, list) and [type(bound) for bound in bounds] == [float, float]
        interval = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if is_known else ""
        lines.append(
            f"| {shape} of {way['num_draft_tokens']} | {way['acceptance_length']:.3f}{interval} "
            f"| {way['emitted_per_cycle']:.3f} | {kept} |"
        )
    told = (
        "The acceptance length is 1 + accepted guesses / cycles, as vLLM's counters give it. Emitted tokens "
        "leave out what was accepted beyond an answer's end. In brackets: 95 % over prompts."
    )
    return [*lines, "", told, ""]


def _compared(evaluation: Mapping[str, Any]) -> str:
    if "identical" in evaluation:
        return f"{evaluation['identical']} answers are identical to plain decoding, token for token."
    return "It was measured while training went on, without plain decoding beside it."


def _checked(verdict: Verdict, replayed: str) -> list[str]:
    return [
        "## Self-check",
        "",
        f"An independent reader loaded this folder by the server's rules and replayed {replayed}: "
        f"{verdict.guesses} guesses are those of the trainer's decoder, and the relative error of their "
        f"logits is at most {verdict.error:.1g} (float32).",
        "",
    ]
