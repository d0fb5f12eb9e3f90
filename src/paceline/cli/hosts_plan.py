"""`paceline plan RUN --hosts FILE`: a run on many hosts, in at most 80 columns, or as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console

from paceline.cli.plain import out, plain, say, say_document, say_wrapped, tell_findings
from paceline.cli.plan import as_clock, as_rate, as_size
from paceline.config.load import load_run_config
from paceline.errors import ConfigError
from paceline.roles.hosts import read_hosts
from paceline.roles.hosts_plan import HostsPlan, HostTold, hosts_plan


def plan_hosts(run_file: Path, hosts_file: Path, target_config: Path | None, *, as_json: bool) -> None:
    """Raises typer.Exit if something does not fit, PacelineError."""
    config = load_run_config(run_file)
    found = hosts_plan(config, read_hosts(hosts_file), target_config=target_config)
    if as_json:
        say_document({**found.model_dump(mode="json"), "fits": found.fits})
    else:
        show(out, found)
    if not found.fits:
        raise typer.Exit(ConfigError.exit_code)


def show(console: Console, found: HostsPlan) -> None:
    parts = {
        "run": [_run(found)],
        "hosts": list(_hosts(found)),
        "window": list(_window(found)),
        "limits": list(_limits(found)),
        "time": [
            f"{as_clock(found.total_s)}, at {_number(found.samples_per_s)} samples/s",
            f"{found.binds} binds",
        ],
    }
    for name, lines in parts.items():
        for number, line in enumerate(lines):
            say_wrapped(console, plain(f"{name if number == 0 else '':<10}", "bold"), line)
    tell_findings(console, [(one.refuses, one.what, one.next) for one in found.findings])
    refused = sum(finding.refuses for finding in found.findings)
    if refused:
        say(console, f"{refused} thing{'s' * (refused > 1)} must change before this run can use these hosts")
    else:
        say(console, "It fits. paceline launch writes what starts it on a cluster.")


def _run(found: HostsPlan) -> str:
    visits = f", each visited {found.passes} times" if found.passes > 1 else ""
    return f"{found.run}: {found.samples:,} samples of about {as_size(found.sample_bytes_about)}{visits}"


def _hosts(found: HostsPlan) -> Iterator[str]:
    for host in found.hosts:
        yield f"{host.count} x {host.name}: {', '.join(_roles(host))}; by {host.source}"
        written, read = as_rate(host.written_mib_per_s), as_rate(host.read_mib_per_s)
        yield f"each writes {written} and reads {read} over the network"
    if found.network_bytes:
        yield f"{as_size(found.network_bytes)} over the network in all"


def _roles(host: HostTold) -> Iterator[str]:
    if host.producers:
        yield f"{host.producers} producers of {host.capture_tokens_per_s:,.0f} tokens/s"
    if host.trainers:
        yield f"{host.trainers} ranks of {host.train_tokens_per_s:,.0f} tokens/s"


def _window(found: HostsPlan) -> Iterator[str]:
    yield (
        f"budget {as_size(found.budget_bytes)}: {found.producers_at_once} of {found.producers} producers "
        "capture at the same time"
    )
    if found.producers_at_once < found.producers:
        yield f"for all of them: {as_size(found.budget_for_all_bytes)}"


def _limits(found: HostsPlan) -> Iterator[str]:
    for one in found.limits:
        name = f" of {one.name}" if one.name else ""
        yield f"{one.what}{name}: {_number(one.samples_per_s)} samples/s, {one.share:.0%} used"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
