"""`paceline plan`: what a run will take, in at most 80 columns, or as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console

from paceline.cli.plain import out, plain, say, say_document, say_wrapped, tell_findings
from paceline.config.load import load_run_config
from paceline.errors import ConfigError
from paceline.roles.cost_plan import CostPlan, cost_plan


def plan(run_file: Path, gpu: str | None, target_config: Path | None, *, as_json: bool) -> None:
    """Raises typer.Exit if something does not fit, PacelineError."""
    found = cost_plan(load_run_config(run_file), gpu=gpu or "", target_config=target_config)
    if as_json:
        say_document({**found.model_dump(mode="json"), "fits": found.fits})
    else:
        show(out, found, run_file)
    if not found.fits:
        raise typer.Exit(ConfigError.exit_code)


def show(console: Console, found: CostPlan, run_file: Path) -> None:
    for name, lines in _parts(found).items():
        for number, line in enumerate(filter(None, lines)):
            say_wrapped(console, plain(f"{name if number == 0 else '':<10}", "bold"), line)
    tell_findings(console, [(one.refuses, one.what, one.next) for one in found.findings])
    refused = sum(finding.refuses for finding in found.findings)
    if refused:
        say(console, f"{refused} thing{'s' * (refused > 1)} must change before paceline train {run_file}")
    else:
        say(console, f"It fits. Next: paceline train {run_file}")


def _parts(found: CostPlan) -> dict[str, list[str]]:
    """The lines of each part, under its name."""
    return {
        "run": list(_run(found)),
        "machine": [found.machine],
        "target": list(_target(found)),
        "draft": [f"{found.draft.method}, {_count(found.draft.parameters)} parameters to learn"],
        "process": list(_processes(found)),
        "sample": list(_sample(found)),
        "features": list(_features(found)),
        "disk": list(_disk(found)),
        "time": list(_time(found)),
    }


def _run(found: CostPlan) -> Iterator[str]:
    run = found.run
    rounds = f" in {run.rounds} rounds" if run.rounds > 1 else ""
    visits = f", each visited {run.passes} times" if run.passes > 1 else ""
    yield f"{run.name}: {run.samples:,} samples{rounds}{visits}"
    if run.tokens_per_step is None:
        yield f"{run.steps:,} steps of {run.batch_size}, in {run.directory}"
    else:
        yield f"about {run.steps:,} steps of {run.tokens_per_step:,} tokens, in {run.directory}"


def _target(found: CostPlan) -> Iterator[str]:
    target = found.target
    yield f"{target.model}"
    active = ""
    if target.active_parameters < target.parameters:
        active = f" ({_count(target.active_parameters)} active)"
    yield (
        f"{target.layers} layers of {target.hidden_size}, about {_count(target.parameters)} "
        f"parameters{active}"
    )
    held = "on this disk" if target.has_weights else "estimated, not fetched yet"
    how = f"quantised ({target.quantised})" if target.quantised else f"states in {target.dtype}"
    yield f"{as_size(target.weights_bytes)} of weights, {held}; {how}"


def _processes(found: CostPlan) -> Iterator[str]:
    for one in found.processes:
        threads = f", {one.threads} thread{'s' * (one.threads != 1)}" if one.threads else ""
        memory = f", {as_size(one.memory_bytes)}" if one.memory_bytes else ""
        yield f"{one.role} on {one.device}{threads}{memory}: {one.what}"
        if one.activations_about and one.activations_max:
            yield (
                f"  and about {as_size(one.activations_about)} of activations and caches, at most "
                f"{as_size(one.activations_max)}"
            )


def _sample(found: CostPlan) -> Iterator[str]:
    sample = found.sample
    yield f"at most {sample.tokens_max:,} tokens, {as_size(sample.bytes_max)} reserved"
    if sample.narrowed:
        yield f"{', '.join(sample.narrowed)} in float8, with a scale for each token and layer"
    known = (
        "as the data's answers suggest" if sample.answers_known else "if answers are as long as they may be"
    )
    yield (
        f"about {sample.prompt_tokens_about:.0f} + {sample.answer_tokens_about:.0f} tokens, "
        f"{as_size(sample.bytes_about)}, {known}"
    )


def _features(found: CostPlan) -> Iterator[str]:
    window, features = found.window, found.features
    yield f"{features.store} in {features.directory}: budget {as_size(window.budget_bytes)}"
    about = int(window.budget_bytes / max(1.0, found.sample.bytes_about))
    yield f"window: {window.samples:,} samples of the largest size, about {about:,} of these"
    yield (
        f"needed at once: groups of {window.group_samples} and {window.collected_samples:,} that the trainer "
        f"collects"
    )
    yield f"the least budget for them: {as_size(window.needed_bytes)}"
    if features.traffic_mib_per_s is not None:
        where = (
            "on one host: no network" if features.network_mib_per_s == 0 else "over the network, if it is one"
        )
        yield f"traffic: {as_rate(features.traffic_mib_per_s)} written and read, {where}"


def _disk(found: CostPlan) -> Iterator[str]:
    disk = found.disk
    parts = {
        "checkpoints": disk.checkpoints_bytes,
        "exports": disk.exports_bytes,
        "answers": disk.answers_bytes,
        "ledger": disk.ledger_bytes,
        "events and logs up to": disk.logs_bytes,
    }
    told = [f"{name} {as_size(size)}" for name, size in parts.items() if size]
    yield ", ".join(told[:3])
    yield ", ".join(told[3:])
    if disk.download_bytes:
        yield f"to fetch from the hub: {as_size(disk.download_bytes)}"
    if disk.free_bytes is not None:
        total = "" if disk.total_bytes is None else f"{as_size(disk.total_bytes)} in all, "
        yield f"{total}{as_size(disk.free_bytes)} free"


def _time(found: CostPlan) -> Iterator[str]:
    time = found.time
    if time.total_s is None or time.capture_s is None or time.training_s is None:
        yield time.source
        return
    yield f"{as_clock(time.total_s)}, evaluations and starts not counted"
    order = "side by side" if time.together else "in turns, for they share processors or a GPU"
    yield f"capture {as_clock(time.capture_s)}, training {as_clock(time.training_s)}, {order}"
    yield {
        "capture": "capture binds",
        "training": "training binds",
        "both": "both sides are busy: neither waits long for the other",
    }[time.binds]
    if time.advice:
        yield time.advice
    yield f"by {time.source}"


def _count(number: int | None) -> str:
    if number is None:
        return "an unknown number of"
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)


def as_size(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size:.0f} bytes"
        size /= 1024
    return f"{size:,.1f} GiB"


def as_rate(mib: float) -> str:
    return (
        f"{mib / 1024:.1f} GiB/s" if mib >= 1024 else f"{mib:.0f} MiB/s" if mib >= 10 else f"{mib:.1f} MiB/s"
    )


def as_clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
