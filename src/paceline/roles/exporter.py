"""The exporter process: `python -m paceline.roles.exporter RUN.yaml REQUEST REPORT`.

It writes a checkpoint's draft as folders for inference servers. The request is an export section as JSON, the
report a file with the run's RunReport.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paceline.errors import ExportError
from paceline.exports.card import model_card
from paceline.exports.drafted_targets import architectures_of, refusals
from paceline.exports.export import Export, ExportedDraft, TargetOfDraft
from paceline.exports.folder import refuse_foreign, write_folder
from paceline.exports.reader.replay import Replay, ServedTarget
from paceline.exports.serving import Served, commands
from paceline.exports.settings import ExportSection
from paceline.exports.table import EXPORTS
from paceline.ledger.facts import RENDERING_DATE
from paceline.precision import CPU
from paceline.roles.draft import draft_to_give
from paceline.roles.dumped_rows import dump
from paceline.roles.export_request import add_note, read_run_report, requested
from paceline.roles.plan import RunPlan
from paceline.roles.process import run_role
from paceline.roles.target_binding import refuse_other_target
from paceline.run_report.document import RunReport
from paceline.target.head import TargetHead
from paceline.target.origin import origin_of
from paceline.telemetry import EventLog
from paceline.training import tensor_files
from paceline.training.learner import DRAFT


@dataclass(frozen=True)
class _Work:
    draft: ExportedDraft
    target: ServedTarget
    replays: list[Replay]
    replayed: str
    report: RunReport
    why: str  # this checkpoint and no other
    revision: str  # that servers fetch; "" for a path, and for a name that the user gave
    classes: tuple[str, ...]  # of the target, as its folder names them


def export(
    plan: RunPlan,
    events: EventLog,
    should_stop: Callable[[], bool],  # noqa: ARG001 (there is no safe point before the end)
    request: str,
    report: Path,
) -> None:
    """Write, check and record each folder that is asked for; stop at the first that is wrong.

    `report`: a file with the run's RunReport, for the model card.
    """
    config, section = plan.config, requested(request)
    folders = section.folders(config.run.directory)
    adapters: dict[str, Export] = {name: EXPORTS.find(name) for name in folders}
    for folder in folders.values():
        refuse_foreign(folder)
    work = _prepare(plan, section, read_run_report(report))
    for name, folder in folders.items():
        _write(work, adapters[name], name, folder)
        step, served = work.draft.origin["step"], _served(work, folder)
        note = {"format": name, "step": step, "why": work.why, "target": served.target}
        note |= {"revision": served.revision, "method": served.method, "chain": served.chain}
        add_note(config.run.directory, folder, {**note, "refusals": _refusals(work, name)})
        events.write("exported", format=name, folder=str(folder), step=step, why=work.why)


def _prepare(plan: RunPlan, section: ExportSection, report: RunReport) -> _Work:
    config = plan.config
    view = config.view_ledger()
    version = refuse_other_target(view, config)
    checkpoint, choice = draft_to_give(config, view, section.step, only=(DRAFT,))
    method, head = config.method.build(), TargetHead.load(config.target.model)
    dtype = getattr(torch, section.dtype)
    stored = tensor_files.read(DRAFT, checkpoint.files)
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in stored.items()}
    exact = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    draft = method.restore(head, exact).to(CPU)
    drafter = method.drafter(draft, torch.float32)
    replays, replayed = dump(config, head, drafter, view.facts().get(RENDERING_DATE))
    origin = origin_of(config.target.model)
    target = TargetOfDraft(
        section.target_name or origin.name, origin.revision, version, head.config, head.embed_tokens
    )
    return _Work(
        draft=ExportedDraft(
            method=method.name,
            tensors=tensors,
            sizes=method.describe(draft),
            dtype=section.dtype,
            target=target,
            origin={
                "run": config.run.name,
                "step": checkpoint.step,
                "checkpoint": choice.record.manifest_digest,
            },
            chain=method.chain_length(config.evaluation.draft_tokens),
        ),
        target=ServedTarget(
            head.hidden_size,
            head.num_hidden_layers,
            head.config.get("max_position_embeddings"),
            head.embed_tokens,
            head.lm_head,
        ),
        replays=replays,
        replayed=replayed,
        report=report,
        why=choice.why,
        revision="" if section.target_name or origin.name.startswith("/") else origin.revision,
        classes=architectures_of(config.target.model),
    )


def _served(work: _Work, folder: Path) -> Served:
    draft = work.draft
    return Served(draft.target.name, str(folder), draft.method, draft.chain, revision=work.revision)


def _refusals(work: _Work, name: str) -> list[str]:
    return refusals(name, work.draft.method, work.classes)


def _write(work: _Work, adapter: Export, name: str, folder: Path) -> None:
    def finish(aside: Path) -> tuple[str, dict[str, Any]]:
        verdict = adapter.check(aside, work.target, work.replays)
        if verdict.problems or not verdict.guesses:
            raise ExportError(
                f"The export for {name} failed its self-check: {'; '.join(verdict.problems) or 'no guess'}.",
                why="A server would load it and accept fewer guesses, without an error. Nothing was kept.",
                next="report this, with the run's method and target.",
            )
        lines = commands(name, _served(work, folder))
        told = _refusals(work, name)
        card = model_card(work.draft, lines, work.report, verdict, work.replayed, told)
        values = {
            "format": name,
            "self_check": {"guesses": verdict.guesses, "logits_error": verdict.error, "rows": work.replayed},
            "origin": dict(work.draft.origin),
        }
        return card, values

    write_folder(folder, adapter.build(work.draft), finish)


if __name__ == "__main__":
    work = partial(export, request=sys.argv[2], report=Path(sys.argv[3]))
    sys.exit(run_role("exporter", Path(sys.argv[1]), work, stops_itself=False))
