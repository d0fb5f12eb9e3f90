"""The model card of an exported draft: what it drafts for, how well, and how that was measured."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

from paceline.exports.export import ExportedDraft
from paceline.exports.reader.replay import Verdict
from paceline.run_report.document import RunReport
from paceline.run_report.markdown import as_markdown
from paceline.run_report.tables import acceptance, cost, guarantee
from paceline.target.rope import rope_kind


def model_card(
    draft: ExportedDraft,
    commands: Mapping[str, list[str]],
    report: RunReport,
    verdict: Verdict,
    replayed: str,
    refusals: Sequence[str] = (),
) -> str:
    """Markdown. `report`: of the draft's run; `replayed`: the rows that were replayed.

    `refusals`: what is known of servers that do not draft for the target, a sentence each.
    """
    name = draft.target.name
    front = ["---", "tags:", "- speculative-decoding", f"- {draft.method}"]
    front += [f"base_model: {name}"] if not name.startswith("/") else []
    parts = [
        [*front, "---", ""],
        [f"# A draft model for {name.rpartition('/')[2]}", ""],
        _facts(draft),
        *_of_the_run(draft, report),
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


def _of_the_run(draft: ExportedDraft, report: RunReport) -> Iterator[list[str]]:
    """What was measured of this step, what was checked, and what it cost: as in the run's report."""
    step = draft.origin["step"]
    measured = report.measured_at(step)
    if measured is None:
        yield ["## Acceptance", "", f"The draft of step {step} was not measured.", ""]
    else:
        yield as_markdown(acceptance(measured, is_best=step == report.best_step))
        yield [
            f"The checkpoint's own weights were measured, before they were written here in {draft.dtype}.",
            "",
        ]
    yield as_markdown(guarantee(report.check))
    yield as_markdown(cost(report))


def _checked(verdict: Verdict, replayed: str) -> list[str]:
    return [
        "## Self-check",
        "",
        f"An independent reader loaded this folder by the server's rules and replayed {replayed}: "
        f"{verdict.guesses} guesses are those of the trainer's decoder, and the relative error of their "
        f"logits is at most {verdict.error:.1g} (float32).",
        "",
    ]
