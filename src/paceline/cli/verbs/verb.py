"""What all verbs share: how they stand together, and what becomes of an error."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import typer

from paceline.errors import DEBUG_VARIABLE, explained
from paceline.terminal import printable

INTERRUPTED = 130  # exit code
P = ParamSpec("P")


def group(told: str = "") -> typer.Typer:
    """Verbs that stand together; with a help text, under a name of their own.

    Help is plain text: half of its time would be spent on importing what draws boxes.
    """
    return typer.Typer(help=told or None, no_args_is_help=bool(told), rich_markup_mode=None)


def advises(command: Callable[P, None]) -> Callable[P, None]:
    """Print an error as what, why and next; exit with its code."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from paceline.cli.plain import exit_code_of_lost_output, say_error, stderr

        code = 0
        try:
            command(*args, **kwargs)
        except typer.Exit as end:
            code = end.exit_code
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:  # noqa: BLE001 (every error is reported)
            if DEBUG_VARIABLE in os.environ:
                stderr.write(printable(traceback.format_exc()))
            advice = explained(error)
            say_error(advice)
            code = advice.exit_code
        if code := code or exit_code_of_lost_output():
            raise typer.Exit(code)

    return run
