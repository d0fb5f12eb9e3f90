"""`python -m reliability [--scale X] [--seed N] [SUITE...]`: run the long suites, say what they counted.

Every suite is a module here with `run(scale, seed) -> counts`; it raises at the first violation, with
the command that repeats it. Two suites run at a time, each in a process of its own. The counts go, with
seed, scale, date, commit and machine, to benchmarks/results/reliability.json, in the place of what that
suite counted before; those of other suites stay.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any

from reliability.record import PATH, record

HERE = Path(__file__).parent
SUITES = [
    "simulation",
    "kill_schedules",
    "random_kills",
    "ranks",
    "mutants",
    "ledger_model",
    "ledger_on_a_server",
    "power_cuts",
    "power_loss_ledger",
    "file_histories",
    "file_flips",
]


def one(suite: str, scale: float, seed: int) -> dict[str, Any]:
    """Run one suite in this process."""
    started = monotonic()
    counts = import_module(f"reliability.{suite}").run(scale, seed)
    return {"suite": suite, "seed": seed, "seconds": round(monotonic() - started), "counts": counts}


def apart(suite: str, scale: float, seed: int) -> dict[str, Any]:
    """Run one suite in a process of its own; what went wrong, if anything, under "error"."""
    command = [
        sys.executable,
        "-m",
        "reliability",
        "--one",
        suite,
        "--scale",
        str(scale),
        "--seed",
        str(seed),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"suite": suite, "seed": seed, "error": (done.stdout + done.stderr)[-4000:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    arguments = argparse.ArgumentParser(prog="reliability", description=__doc__)
    arguments.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all")
    arguments.add_argument("--scale", type=float, default=1.0, help="1: three to four hours on two cores")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--one", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.scale, given.seed)))
        return 0
    if unknown := sorted(set(given.suites) - set(SUITES)):
        arguments.error(f"no suite is named {', '.join(unknown)}; there are {', '.join(SUITES)}")
    started = monotonic()
    with ThreadPoolExecutor(max_workers=2) as pool:
        chosen = given.suites or SUITES
        results = list(pool.map(lambda suite: _told(apart(suite, given.scale, given.seed)), chosen))
    failed = [result["suite"] for result in results if "error" in result]
    for line in record(results, given.scale):
        print(line)
    verdict = f"VIOLATIONS in {', '.join(failed)}" if failed else "0 violations"
    print(f"reliability: {len(results)} suites, {verdict}, {monotonic() - started:.0f} s -> {PATH.name}")
    return 1 if failed else 0


def _told(result: dict[str, Any]) -> dict[str, Any]:
    if "error" in result:
        print(f"{result['suite']}: FAILED\n{result['error']}", flush=True)
    else:
        counts = ", ".join(f"{count} {name}" for name, count in result["counts"].items())
        print(f"{result['suite']}: {counts} ({result['seconds']} s)", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
