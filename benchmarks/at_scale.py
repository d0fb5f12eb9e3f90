"""64 producers and 64 ranks over a million samples, simulated: where window, network and ledger bind.

    python -m benchmarks.at_scale [--quick]

First what the simulation is fed with: seconds of a ledger for a call and a sample, measured with up to 64
producers. Then whether it is right: rates that were measured with real processes, beside those that it gives.
Then the sweeps, each beside the formula of `paceline plan --hosts`. The record is
benchmarks/results/DATE-at-scale.json, its picture beside it; docs/at-scale.md has the figures.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.control_plane import PROMPTS, know_prompts
from benchmarks.ledger_server import Measured
from benchmarks.ledger_workers import RUN, commit_leased, opened
from benchmarks.record import RESULTS, commit, keep
from benchmarks.rows import Row, row
from benchmarks.simulated_hosts import Outcome, Simulated, simulate
from paceline.capture.backpressure import Watermarks
from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import StepPlan
from paceline.roles.at_scale import GBIT, LEDGERS
from paceline.testing.valkey_server import ValkeyServer

GROUP = 32
WORKERS = (1, 8, 64)
MEASURED_GROUPS = 192
NO_LIMIT = 1e18

# -- what a ledger does for a sample ---------------------------------------------------------


def driven(path: str, workers: int, groups: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of `clock` for a sample's whole way through the ledger, and for a producer that waits and asks.

    So many producers take turns in this process, with a consumer that plans and acknowledges steps of 32.
    """
    sessions = [ProducerSession(opened(path, "head"), RUN, f"w{number}") for number in range(workers)]
    consumer = ConsumerSession(opened(path, "head"), RUN)
    for session in (*sessions, consumer):
        session.acquire()
    began, place = clock(), 0
    for number in range(groups):
        session = sessions[number % workers]
        commit_leased(session, session.lease(GROUP))
        entries = consumer.read(place, place + GROUP).entries
        place = entries[-1].place + 1
        plan = consumer.plan(StepPlan(number + 1, tuple(entry.sample_id for entry in entries))).plan
        consumer.ack(number + 1, plan.rev, plan.sample_ids)
    consumer.write_ack()
    a_sample = (clock() - began) / (groups * GROUP)
    began = clock()
    for number in range(groups):  # as Backpressure.wait_for_credit
        session = sessions[number % workers]
        session.snapshot(), session.lsn(), session.snapshot(), session.wait(0, 0.0)
    asked = (clock() - began) / groups
    for session in (*sessions, consumer):
        session.ledger.close()
    return a_sample, asked


def calls(groups: int) -> list[Row]:
    """Processor time of the server, or, of a file, of the process that calls."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")) as place:
        with (
            ValkeyServer(Path(place), appendfsync="everysec", auto_aof_rewrite_percentage="0") as server,
            server.client() as client,
        ):
            measured = Measured(server, 0.0)

            def spent() -> float:
                told = client.info("cpu")
                return float(told["used_cpu_user_main_thread"] + told["used_cpu_sys_main_thread"])

            for workers in WORKERS:
                rows += told("Valkey", workers, *driven(measured.ledger(), workers, groups, spent))
        for workers in WORKERS:
            path = str(Path(place) / f"{workers}.db")
            know_prompts(path, PROMPTS)
            rows += told("SQLite", workers, *driven(path, workers, groups, time.process_time))
    return rows


def told(store: str, workers: int, a_sample: float, asked: float) -> list[Row]:
    producers = f"{workers} producer{'s' * (workers > 1)}"
    return [
        row(f"{store}, {producers}: a sample, in groups and steps of {GROUP}", 1e6 * a_sample, "us"),
        row(f"{store}, {producers}: one that waits looks again", 1e6 * asked, "us"),
    ]


# -- what was measured, beside what the simulation says --------------------------------------

SMALL = {"sample_bytes": 1.0, "storage_rate": NO_LIMIT, "host_rate": NO_LIMIT, "trainers_rate": NO_LIMIT}


def roomy(group: int = GROUP, group_bytes: int = 1) -> Watermarks:
    return Watermarks(
        budget_bytes=1 << 50, group_bytes=group_bytes, group_samples=group, window_samples=group
    )


def newest(name: str) -> dict[str, Any]:
    """The rows of the newest record of that name, by their names."""
    path = sorted(RESULTS.glob(f"????-??-??-{name}.json"))[-1]
    return {one["name"]: one for one in json.loads(path.read_text())["rows"]}


def compared(name: str, measured: float, shape: Simulated, note: str) -> Row:
    simulated = simulate(shape).rate
    more = {"limit": measured, "limit_name": "measured", "ratio": simulated / measured, "goal": None}
    return row(f"simulated: {name}", simulated, "samples/s", note=note, **more)


def validated() -> list[Row]:
    """Configurations of recorded benchmarks, fed with each side's own rate alone."""
    producers, pipeline = newest("producers"), newest("benchmarks")
    rows = []
    for store, kind in (("SQLite", "sqlite"), ("Valkey", "redis")):
        kept = producers[f"whole run with three producers, {store}: samples trained"]
        one, trained = (float(part.split("/s")[0].split()[-1]) for part in kept["note"].split(": ")[1:3])
        shape = Simulated(
            samples=24 * GROUP,
            producers=3,
            group_s=GROUP / one,
            step_s=8 / trained,
            marks=roomy(),
            ledger=LEDGERS[kind],
            batch=8,
            uneven=0.0,
            **SMALL,
        )
        rows.append(compared(f"three producers, {store}", kept["value"], shape, "producers.json"))
    for slower, passes in (("producer", 1), ("consumer", 4)):
        what = "captured" if slower == "producer" else "trained"
        kept = pipeline[f"whole pipeline, the {slower} slower: samples {what}"]
        one, visits = (
            float(part.split()[0]) for part in kept["note"].removeprefix("alone: ").split(", ")[:2]
        )
        shape = Simulated(
            samples=64 * GROUP,
            producers=1,
            group_s=GROUP / one,
            step_s=4 / visits,
            marks=roomy(),
            ledger=LEDGERS["sqlite"],
            batch=4,
            passes=passes,
            uneven=0.0,
            **SMALL,
        )
        measured = kept["value"] / (passes if slower == "consumer" else 1)
        rows.append(compared(f"whole pipeline, the {slower} slower", measured, shape, "benchmarks.json"))
    return rows


def windowed(quick: bool) -> list[Row]:
    """Real processes with a budget that lets fewer of them capture than there are, measured now."""
    from benchmarks.producers import Runs, Shape, rate, shape_of
    from benchmarks.producers import capture as capturing
    from benchmarks.producers import train as training
    from benchmarks.together import together

    rows = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")) as place:
        runs = Runs(Path(place), "")
        for tight in (False, True):
            shape: Shape = replace(shape_of(24, 3, 0.5 if quick else 1.0), tight=tight)
            options = runs.options(shape)
            makers = [(capturing, {**options, "worker": str(n)}) for n in range(3)]
            *captured, trained = together(*makers, (training, options))
            last = max(at for one in captured for at, *_ in one["groups"])
            measured = rate([step for step in trained["steps"] if step[0] <= last])
            marks = Watermarks(
                budget_bytes=shape.budget_bytes,
                group_bytes=GROUP,
                group_samples=GROUP,
                budget_samples=shape.budget_samples,
                window_samples=shape.window,
            )
            simulated = Simulated(
                samples=shape.prompts,
                producers=3,
                group_s=shape.group_s,
                step_s=8 / 1800,
                marks=marks,
                ledger=LEDGERS["sqlite"],
                batch=8,
                uneven=0.0,
                write_s=0.05,
                first_samples=GROUP,
                **SMALL,
            )
            name = f"three producers, room for {min(3, marks.groups_ahead)} at a time"
            rows.append(compared(name, measured, simulated, f"measured now; {shape.group_s:g} s a group"))
    return rows


# -- the sweeps ------------------------------------------------------------------------------

# 64 producers of 2,000 tokens/s on 8 hosts, 64 ranks of 2,000 tokens/s on 8 more; answers of 500 tokens,
# states of 25 MB a sample (three of 4,096 bfloat16 numbers for 1,000 tokens), twice that reserved.
SAMPLE, RESERVED = 25e6, 50e6
WINDOW = 2 * GROUP + 512
BASE = Simulated(
    samples=1_000_000,
    producers=64,
    group_s=GROUP * 500 / 2000,
    step_s=512 * 500 / (64 * 2000),
    marks=Watermarks(budget_bytes=0, group_bytes=0),
    ledger=LEDGERS["redis"],
    sample_bytes=SAMPLE,
    batch=512,
    interval=25,
    host_rate=100 * GBIT,
    trainers_rate=8 * 200 * GBIT,
    storage_rate=400 * GBIT,
    ask_s=0.4e-3,
    stall_s=0.2,
    write_s=5.0,
)


def marks(budget_gib: float) -> Watermarks:
    return Watermarks(
        budget_bytes=int(budget_gib * 2**30),
        group_bytes=int(GROUP * RESERVED),
        group_samples=GROUP,
        window_samples=WINDOW,
    )


BUDGET_GIB = 1000.0


def formula(shape: Simulated) -> tuple[float, str]:
    """What `paceline plan --hosts` says: the least of what each part could do (roles/at_scale.py)."""
    captured = shape.producers * GROUP / shape.group_s
    hosts = -(-shape.producers // shape.producers_of_a_host)
    told = {
        "capture": captured,
        "window": captured * min(1.0, shape.marks.groups_ahead / shape.producers),
        "training": shape.batch / shape.step_s / shape.passes,
        "network": min(hosts * shape.host_rate, shape.trainers_rate / shape.passes) / shape.sample_bytes,
        "storage": shape.storage_rate / shape.sample_bytes / (1 + shape.passes),
        "ledger": 1 / shape.ledger.of_a_sample(GROUP, shape.batch, shape.passes),
    }
    least = min(told, key=lambda name: told[name])
    return told[least], least


def sweeps(samples: int) -> list[Row]:
    base = replace(BASE, samples=samples, marks=marks(BUDGET_GIB))
    shapes: list[tuple[str, float, Simulated]] = [("as it is", 0.0, base)]
    for gib in (75, 100, 125, 150, 200, 300):
        shapes.append(("budget, GiB", gib, replace(base, marks=marks(gib))))
    for gbit in (25, 50, 75, 100, 150, 200):
        shapes.append(("shared storage, Gbit/s", gbit, replace(base, storage_rate=gbit * GBIT)))
    for gbit in (1, 2.5, 5, 10, 25):
        shapes.append(("network of a host that captures, Gbit/s", gbit, replace(base, host_rate=gbit * GBIT)))
    for producers in (8, 16, 32, 64, 128, 256):
        shapes.append(("producers", producers, replace(base, producers=producers)))
    fast = replace(base, sample_bytes=1e4, marks=roomy(GROUP, 1))
    for times in (8, 16, 32, 64, 128):
        quick = replace(fast, group_s=base.group_s / times, step_s=base.step_s / times / 2)
        shapes.append(("speed of all roles, times (samples of 10 kB)", times, quick))
    return [swept(*one) for one in shapes]


def swept(what: str, x: float, shape: Simulated) -> Row:
    began = time.perf_counter()
    found: Outcome = simulate(shape)
    expected, binds = formula(shape)
    name = what if what == "as it is" else f"{what}: {x:g}"
    shares = (
        f"{binds} binds; producers wait {found.producers_waited:.0%}, trainer {found.trainer_waited:.0%}; "
        f"busy: ledger {found.ledger_busy:.0%}, storage {found.storage_busy:.0%}; "
        f"{found.checkpoints} checkpoints"
    )
    print(
        f"{name}: {found.rate:.1f} of {expected:.1f}, {shares} ({time.perf_counter() - began:.0f} s)",
        flush=True,
    )
    more = {"limit": expected, "limit_name": "the formula", "ratio": found.rate / expected}
    return row(name, found.rate, "samples/s", note=shares, curve=what, x=x, binds=binds, **more)


def draw(rows: Sequence[Row], path: Path) -> None:
    """What the simulation gives (points) and the formula (lines)."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    curves = list(dict.fromkeys(one["curve"] for one in rows if one["curve"] != "as it is"))
    figure, places = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.2), layout="constrained")
    for curve, axes in zip(curves, places, strict=True):
        found = [one for one in rows if one["curve"] == curve]
        x = [one["x"] for one in found]
        axes.plot(x, [one["limit"] for one in found], label="formula")
        axes.plot(x, [one["value"] for one in found], "o", label="simulation")
        axes.set(xlabel=curve, xscale="log", ylim=(0, None))
    places[0].set_ylabel("samples/s")
    places[0].legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    quick = "--quick" in sys.argv
    rows = [{"module": "ledger", **one} for one in calls(MEASURED_GROUPS // (4 if quick else 1))]
    print(json.dumps(rows, indent=1), flush=True)
    checks = [*validated(), *windowed(quick)]
    print(json.dumps(checks, indent=1), flush=True)
    simulated = sweeps(50_000 if quick else 1_000_000)
    rows += [{"module": "validation", **one} for one in checks]
    rows += [{"module": "sweep", **one} for one in simulated]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    worst = max(abs(one["ratio"] - 1) for one in checks)
    report = {"date": date, "commit": commit(), "quick": quick, "worst_error": worst, "rows": rows}
    path = keep("at-scale", report)
    draw(simulated, path.with_suffix(".svg"))
    print(f"{path}: beside what was measured the simulation was wrong by {worst:.0%} at most")


if __name__ == "__main__":
    main()
