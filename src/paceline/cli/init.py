"""`paceline init`: asks what a run needs, where it is at a terminal, and writes its run file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import typer

from paceline.cli.plain import INTERRUPTED, out, plain, say, say_wrapped, tell_findings
from paceline.errors import ConfigError, PacelineError
from paceline.methods.table import DEFAULT_METHOD, METHODS
from paceline.roles.cost_plan import cost_plan
from paceline.roles.machine import this_machine
from paceline.roles.new_run import servers
from paceline.roles.starter import GPUS_MAX, NONE, Given, Started, start_run, target_folder
from paceline.target.shape import read_shape

METHODS_TOLD = "eagle3 is the widest supported; dflash guesses a block of tokens in one pass"


def init(given: dict[str, Any]) -> None:
    """`given`: the options by name, None where one was not given. Raises PacelineError, typer.Exit."""
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        given = _asked(given)
    missing = [f"--{name}" for name in ("target", "data") if given[name] is None]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} must be given.",
            why="Paceline asks for what is missing at a terminal only.",
            next="paceline init --target MODEL --data FILE -o run.yaml",
        )
    chosen = {name: value for name, value in given.items() if value is not None}
    wanted = Given(**{"output": Path("run.yaml"), **chosen})
    _tell(start_run(wanted, tell=partial(say, out)), wanted)


def _tell(started: Started, given: Given) -> None:
    if started.aside is not None:
        aside = started.aside
        left = ""
        if aside.shared or aside.broken:
            left = f"; in neither: {aside.shared} that share a question, {aside.broken} that cannot be used"
        say_wrapped(
            out, plain(""), f"{aside.held_out} of {aside.held_out + aside.training} records set aside{left}"
        )
    for path in started.files:
        say(out, f"wrote {path}")
    if started.wishes.gpus <= len(this_machine().gpus):
        plan = cost_plan(started.config, target_config=given.target_config)
        tell_findings(out, [(one.refuses, one.what, one.next) for one in plan.findings if one.next])
    run = given.output
    say(out, f"Read it, then: paceline plan {run}; paceline doctor {run}; paceline train {run}")


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    """The options, with answers for those that were not given."""
    found = dict(given)
    if found["target"] is None:
        found["target"] = _ask(
            "Target model, a folder or organisation/name of the hub", "", partial(_known_target, found)
        )
    if found["data"] is None:
        found["data"] = Path(_ask("Data, a file of chats or prompts", "", _known_file))
    if found["heldout"] is None:
        told = (
            "A file of prompts to measure the draft on, none of them in the data; empty: some are set aside"
        )
        answer = _ask(told, "", _known_file_or_none)
        found["heldout"] = Path(answer) if answer else None
    if given["method"] is None:
        say_wrapped(out, plain("  "), METHODS_TOLD)
        found["method"] = _ask("Method", DEFAULT_METHOD, _known_method)
    if found["gpus"] is None:
        found["gpus"] = int(_ask("GPUs", str(len(this_machine().gpus)), _count))
    if found["serve"] is None and found["gpus"]:
        told = f"Server that runs the target: {', '.join(servers())}, or {NONE} (the producer does)"
        one = found["gpus"] == 1  # which target and draft share; a server is another program to install
        found["serve"] = _ask(told, NONE if one else "vllm", _known_server)
    if given["output"] is None:
        found["output"] = Path(_ask("Run file to write", "run.yaml", lambda text: text))
    return found


def _ask(question: str, default: str, check: Callable[[str], object]) -> str:
    """The answer that `check` takes; asked again, with its advice, until it does.

    Raises typer.Exit at the end of all answers.
    """
    while True:
        out.print(plain(f"{question}{f' [{default}]' if default else ''}: ", "bold"), end="", soft_wrap=True)
        line = sys.stdin.readline()
        if not line:
            say(out, "")
            raise typer.Exit(INTERRUPTED)
        answer = line.strip() or default
        try:
            check(answer)
        except (PacelineError, OSError, ValueError) as error:
            said = f"{error.what} {error.next}" if isinstance(error, PacelineError) else str(error)
            say_wrapped(out, plain("  "), said)
        else:
            return answer


def _known_target(given: dict[str, Any], text: str) -> None:
    if not text:
        raise ConfigError(
            "A target is needed.", next="Name a folder or a model of the hub, such as Qwen/Qwen3-8B."
        )
    folder = target_folder(replace(Given(text, Path(), Path()), target_config=given["target_config"]))
    read_shape(folder)


def _known_file(text: str) -> None:
    if not text or not Path(text).exists():
        raise ConfigError(f"There is no {text or 'such file'}.", next="Name a file or folder that exists.")


def _known_file_or_none(text: str) -> None:
    if text:
        _known_file(text)


def _known_method(text: str) -> None:
    METHODS.find(text)


def _known_server(text: str) -> None:
    known = [*servers(), NONE]
    if text not in known:
        raise ConfigError(f"{text!r} is no server.", next=f"One of: {', '.join(known)}.")


def _count(text: str) -> None:
    if not text.isdecimal() or int(text) > GPUS_MAX:
        raise ConfigError(f"{text!r} is no number of GPUs.", next="0 for processors alone.")
