"""The metrics of a run in the OpenMetrics text format, for Prometheus and what reads like it.

docs/metrics.md is written from METRICS. A name is never given another meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from paceline.monitoring.schema import Process, RunStatus

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
STATES = ("live", "stopped", "failed", "complete")
Value = float | int | None
Labelled = Iterable[tuple[Mapping[str, str], Value]]


@dataclass(frozen=True)
class Metric:
    """`kind`: gauge, or counter, whose samples end in _total. `labels`: beside `run`. None is left out."""

    name: str
    kind: str
    meaning: str
    read: Callable[[RunStatus], Labelled]
    unit: str = ""
    labels: tuple[str, ...] = ()

    @property
    def sample_name(self) -> str:
        return f"{self.name}_total" if self.kind == "counter" else self.name


def one(
    name: str, meaning: str, read: Callable[[RunStatus], Value], kind: str = "gauge", unit: str = ""
) -> Metric:
    return Metric(f"paceline_{name}", kind, meaning, lambda s: [({}, read(s))], unit)


def by_role(
    name: str, meaning: str, read: Callable[[Process], Value], kind: str = "gauge", unit: str = ""
) -> Metric:
    def of_all(s: RunStatus) -> Labelled:
        return [({"role": process.role}, read(process)) for process in s.processes]

    return Metric(f"paceline_{name}", kind, meaning, of_all, unit, ("role",))


METRICS = (
    Metric(
        "paceline_state",
        "gauge",
        f"1 for the state that the run is in, else 0: {', '.join(STATES)}",
        lambda s: [({"state": state}, int(s.state == state)) for state in STATES],
        labels=("state",),
    ),
    by_role("process_live", "1 if the process is live on this host", lambda p: int(p.state == "live")),
    by_role("process_starts", "how often the role was taken", lambda p: p.starts, "counter"),
    by_role(
        "process_waited_seconds",
        "waited for the other side since the last start",
        lambda p: p.waited_seconds,
        "counter",
        "seconds",
    ),
    by_role(
        "process_waiting_ratio", "the share of the newest minute that it waited so", lambda p: p.waiting_share
    ),
    by_role(
        "process_idle_ratio",
        "a producer: the share of the newest minute that it waited for its turn",
        lambda p: p.idle_share,
    ),
    one("prompts_planned", "prompts of the whole run, all rounds", lambda s: s.prompts.planned),
    one("prompts_pending", "registered and not leased", lambda s: s.prompts.pending),
    one("prompts_leased", "being captured", lambda s: s.prompts.leased),
    one("prompts_failed", "never to be captured", lambda s: s.prompts.failed, "counter"),
    one("samples_committed", "captured and recorded, ever", lambda s: s.samples.committed, "counter"),
    one("samples_trained", "trained, durably or not; a restart may lower it", lambda s: s.samples.trained),
    one("samples_provisional", "trained, not yet covered by a checkpoint", lambda s: s.samples.provisional),
    one("samples_waiting", "committed and not yet trained", lambda s: s.samples.waiting),
    one("samples_lost", "to be captured again", lambda s: s.samples.lost),
    one("samples_quarantined", "never to be trained (again)", lambda s: s.samples.quarantined, "counter"),
    by_role("captured_samples_per_second", "of a producer", lambda p: _captured(p, p.samples_per_second)),
    by_role("captured_tokens_per_second", "of a producer", lambda p: p.tokens_per_second),
    one("features_bytes", "resident in the feature store", lambda s: s.features.bytes, unit="bytes"),
    one("features_budget_bytes", "features.budget_mib", lambda s: s.features.budget_bytes, unit="bytes"),
    one("features_samples", "resident in the feature store", lambda s: s.features.samples),
    one("step", "the newest optimizer step in the weights; a restart may lower it", lambda s: s.step.number),
    one("steps_planned", "optimizer steps of the whole run", lambda s: s.step.planned),
    one("steps_per_second", "over the newest minute", lambda s: s.step.per_second),
    one("step_seconds", "of computing the newest step", lambda s: s.step.seconds, unit="seconds"),
    one("loss", "of the newest step", lambda s: s.step.loss),
    one("learning_rate", "of the newest step", lambda s: s.step.learning_rate),
    one("grad_norm", "of the newest step", lambda s: s.step.grad_norm),
    one(
        "estimated_acceptance_length",
        "from the training data, a mean over the newest steps",
        lambda s: s.step.acceptance_length,
    ),
    one(
        "acceptance_length",
        "of the newest measured checkpoint, on held-out prompts: 1 + accepted / cycles of the chain",
        lambda s: s.evaluation.curve[-1].acceptance_length if s.evaluation.curve else None,
    ),
    one(
        "best_acceptance_length",
        "of the best checkpoint whose draft is kept",
        lambda s: None if s.evaluation.best is None else s.evaluation.best.acceptance_length,
    ),
    one(
        "evaluated_step",
        "the step of the newest measured checkpoint",
        lambda s: s.evaluation.curve[-1].step if s.evaluation.curve else None,
    ),
    one("checkpoint_step", "of the newest durable checkpoint", lambda s: s.checkpoint.step),
    one(
        "checkpoint_stall_seconds",
        "that training waited for the newest checkpoint",
        lambda s: s.checkpoint.stall_seconds,
        unit="seconds",
    ),
    one(
        "checkpoint_stall_ratio",
        "the share of the newest minute of these waits",
        lambda s: s.waiting.checkpoint_share,
    ),
    one("restarts", "starts of all roles beyond their first", lambda s: s.restarts, "counter"),
    one("left_seconds", "until the last step, at the present rate", lambda s: s.seconds_left, unit="seconds"),
)


def _captured(process: Process, rate: float | None) -> float | None:
    return rate if process.role.startswith("producer") else None


def exposition(status: RunStatus | None, run: str) -> str:
    """The metrics as text. `status` None: the run cannot be read now, and paceline_up alone says so."""
    name = run if status is None else status.run
    lines = [
        "# TYPE paceline_up gauge",
        "# HELP paceline_up 1 if the run could be read",
        f"paceline_up{_labels({'run': name})} {int(status is not None)}",
    ]
    for metric in METRICS if status is not None else ():
        assert status is not None
        samples = [
            f"{metric.sample_name}{_labels({'run': name, **labels})} {value}"
            for labels, value in metric.read(status)
            if value is not None
        ]
        if samples:
            unit = [f"# UNIT {metric.name} {metric.unit}"] if metric.unit else []
            told = [f"# TYPE {metric.name} {metric.kind}", *unit, f"# HELP {metric.name} {metric.meaning}"]
            lines += [*told, *samples]
    return "\n".join([*lines, "# EOF", ""])


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    text = value.encode(errors="replace").decode()
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
