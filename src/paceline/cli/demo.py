"""`paceline demo`: what the guarantee means, seen in a minute, without a network or a file of one's own."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import typer

from paceline.cli.fsck import fsck_directory
from paceline.cli.plain import INTERRUPTED, out, say
from paceline.config.load import load_run_config
from paceline.demo.runs import (
    CALM,
    KILL_FROM,
    KILLED,
    TARGET,
    KillOnce,
    make_target,
    prepare,
    resumed_from,
    weights_digest,
)
from paceline.roles.plan import RunPlan, plan_run
from paceline.roles.preflight import preflight
from paceline.roles.supervisor import Supervisor

DIFFERENT = 9  # exit code, as of fsck: the promise is broken
SHOWN = 16  # hex digits of a digest


def demonstrate(folder: Path) -> None:
    """Raises typer.Exit if the user stopped it or the promise is broken, PacelineError."""
    files = prepare(folder)
    say(out, f"1. A tiny target with random weights, made here: {folder / TARGET}")
    make_target(folder)
    plans = {name: plan_run(load_run_config(path)) for name, path in files.items()}

    say(out, "2. A run that nothing happens to: a producer and a consumer process, a ledger between them.")
    _train(folder, files[CALM], plans[CALM])
    steps, expected = weights_digest(plans[CALM].config.run.directory)
    say(out, f"   {steps} steps; SHA-256 of the draft's weights: {expected[:SHOWN]}")

    say(out, "3. The same run again. Its consumer is killed (SIGKILL) in the middle.")
    _train(folder, files[KILLED], plans[KILLED], kills=True)
    steps, found = weights_digest(plans[KILLED].config.run.directory)
    same = found == expected
    verdict = "the same weights, bit for bit" if same else "OTHER WEIGHTS than those of the undisturbed run"
    say(out, f"   {steps} steps; SHA-256 of the draft's weights: {found[:SHOWN]}: {verdict}")

    directory = folder / KILLED
    named = shlex.quote(str(directory))
    say(out, f"4. A checker that shares no code with the trainer: paceline fsck {named}")
    code = fsck_directory(out, directory)
    if code or not same:
        raise typer.Exit(code or DIFFERENT)
    say(out, f"Look around: paceline status {named}, paceline inspect {named} --step {KILL_FROM + 1}")
    say(
        out,
        f"The target is random, and the draft useless. Remove both: rm -r {shlex.quote(str(folder))}",
    )
    say(out, "Next, a draft for your own model: paceline init")


def _train(folder: Path, run_file: Path, plan: RunPlan, *, kills: bool = False) -> None:
    """To the end. Raises typer.Exit if the user stopped it, PacelineError."""
    preflight(plan)
    supervisor = Supervisor(run_file, plan, tell=partial(say, out))
    killer = KillOnce(plan.config)
    if kills:
        with killer:
            completed = supervisor.run()
    else:
        completed = supervisor.run()
    if not completed:
        say(out, f"Stopped; nothing is lost. Go on with: paceline demo {shlex.quote(str(folder))}")
        raise typer.Exit(INTERRUPTED)
    if killer.killed is not None:
        pid, trained, head = killer.killed
        say(
            out, f"   process {pid} was killed after step {trained}; its newest durable checkpoint was {head}"
        )
        say(
            out,
            f"   its successor went on from checkpoint {resumed_from(plan.config)}, by the recorded plans",
        )
    elif kills:
        say(out, "   nothing was killed: the run was over before")
