"""A run as Slurm jobs: one batch script, whose job trains, and whose array of jobs joins as producers.

A text of the user's is one quoted word in an assignment; the rest of the script (job.sh) has none.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from paceline.errors import ConfigError, PacelineError
from paceline.launch.fleet import Fleet, Needs, quoted

NOTICE_S = 300  # before the time limit
LATE_S = 120  # of that notice, for `paceline stop`, and again for what it has not ended
PAUSE_S = 30  # between two tries to join
LEAST_S = 2 * NOTICE_S  # of a time limit
TIME = re.compile(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?")
PATIENCE_S = 60.0  # with Slurm's controller


def script(fleet: Fleet, *, time: str, setup: Path | None = None, options: Sequence[str] = ()) -> str:
    """`time`: the limit, as Slurm writes it. `setup`: a shell file that each job reads first. `options`: more
    of sbatch's. Raises ConfigError."""
    for option in options:
        if not option.startswith("--") or not option.isprintable():
            raise ConfigError(
                f"{option!r} is no option of sbatch.",
                why="Each option becomes a line at the script's head.",
                next="write it as --sbatch=--partition=gpu",
            )
    limit = _seconds(time)
    if 0 < limit < LEAST_S:
        raise ConfigError(
            f"--time {time} is {limit} s.",
            why=f"A job is stopped {NOTICE_S} s before its limit and queued again, so it would do next to "
            "nothing each time, for ever. Nothing was written.",
            next="give an hour or more: --time 1:00:00",
        )
    needs = fleet.trainer
    head = [
        f"--job-name={fleet.name}",
        f"--nodes={fleet.hosts}",
        "--ntasks-per-node=1",
        *_asked(needs),
        f"--time={time}",
        "--requeue",
        f"--signal=B:USR1@{NOTICE_S}",
        "--open-mode=append",
        *options,
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"# {line}" for line in _told(fleet)),
            *(f"#SBATCH {option}" for option in head),
            "",
            *_values(fleet, setup),
            "",
            files(__package__).joinpath("job.sh").read_text(),
        ]
    )


def joining(fleet: Fleet) -> list[str]:
    """The options of sbatch that make the script's job an array of producers."""
    none = ["--gpus-per-node=0"] if fleet.trainer.gpus and not fleet.producer.gpus else []
    return ["--nodes=1", f"--array=1-{fleet.producers}", *_asked(fleet.producer), *none]


def submit(fleet: Fleet, text: str) -> list[str]:
    """Queue the script's jobs; their numbers. Producers wait until the trainer's job has begun.

    Raises PacelineError if Slurm refuses one.
    """
    number = _sbatch(text)
    if not fleet.producers:
        return [number]
    return [number, _sbatch(text, *joining(fleet), f"--dependency=after:{number}")]


def _seconds(time: str) -> int:
    """Of a limit as Slurm writes it: [D-]H[:M[:S]] with days, else M, M:S or H:M:S; 0: none."""
    found = TIME.fullmatch(time)
    if found is None:
        raise ConfigError(f"{time!r} is no time limit.", next="write it as Slurm does: --time 24:00:00")
    days, *parts = found.groups()
    given = [int(part) for part in parts if part is not None]
    if days is not None or len(given) == 3:
        hours, minutes, seconds = [*given, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*given, 0][:2]
    return (24 * int(days or 0) + hours) * 3600 + 60 * minutes + seconds


def _asked(needs: Needs) -> list[str]:
    gpus = [f"--gpus-per-node={needs.gpus}"] if needs.gpus else []
    return [f"--cpus-per-task={needs.processors}", *gpus, f"--mem={needs.memory_mib}M"]


def _told(fleet: Fleet) -> list[str]:
    several = f"trains on {fleet.hosts} nodes" if fleet.hosts > 1 else "trains"
    lines = [f"The run {fleet.name} on Slurm, by `paceline launch slurm`. This job {several}: sbatch SCRIPT"]
    if fleet.producers:
        lines += [
            "Producers join it, each as a job of its own, more or fewer of them, at any time:",
            f"  sbatch {' '.join(joining(fleet))} SCRIPT",
        ]
    return lines


def _values(fleet: Fleet, setup: Path | None) -> list[str]:
    values = {
        "WORK": Path.cwd(),
        "RUN": fleet.run_file.absolute(),
        "BIN": Path(sys.executable).parent,
        "SETUP": setup.absolute() if setup else "",
        "NAME": fleet.name,
        "SEED": fleet.config.run.seed,
        "RANKS": fleet.config.machine.trainers,
        "PAUSE_S": PAUSE_S,
        "LATE_S": LATE_S,
        "ELSEWHERE": fleet.sections_elsewhere() if fleet.is_wide else "",
    }
    return [f"{name}={quoted(value)}" for name, value in values.items()]


def _sbatch(text: str, *options: str) -> str:
    command = ["sbatch", "--parsable", *options]
    try:
        told = subprocess.run(
            command, input=text, text=True, capture_output=True, timeout=PATIENCE_S, check=False
        )
    except FileNotFoundError:
        raise ConfigError(
            "There is no sbatch on this host.",
            why="It belongs to Slurm, and hands jobs to it. Nothing was queued.",
            next="run the same command on a login node; without --submit it prints the script.",
        ) from None
    except subprocess.TimeoutExpired:
        raise PacelineError(
            f"sbatch did not end within {PATIENCE_S:g} s.",
            why="Whether the job was queued is unknown.",
            next="squeue --me shows the queued jobs.",
        ) from None
    if told.returncode:
        raise PacelineError(
            f"sbatch refused the job: {told.stderr.strip() or told.returncode}",
            why="Jobs that were queued before stay (squeue --me).",
            next="correct the option that it names, and run the same command again.",
        )
    return told.stdout.strip().partition(";")[0]
