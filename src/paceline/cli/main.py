"""The `paceline` command: its verbs are in `verbs`, by what a person is about to do. It loads no torch.

A verb imports what it does when it is called, so that `paceline --help` is there at once. Every error becomes
one readable message on stderr and an exit code. Only --debug shows a traceback.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from paceline import __version__
from paceline.cli.verbs import giving, launching, looking, preparing, running
from paceline.cli.verbs.verb import INTERRUPTED
from paceline.errors import DEBUG_VARIABLE, ConfigError
from paceline.terminal import open_standard_streams

app = typer.Typer(
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # half of the time of --help would be spent on importing what draws boxes
)
for part in (preparing, running, launching, looking, giving):  # the order of --help
    app.add_typer(part.verbs)


def main() -> None:
    """The command's entry point."""
    open_standard_streams()
    code = 1
    try:
        code = app(standalone_mode=False) or 0
    except typer.Abort:
        code = INTERRUPTED
    except Exception as error:
        # The command was used wrongly. The class of typer's error is private; its message and code are not.
        if not hasattr(error, "format_message"):
            raise
        from paceline.cli.plain import say_error

        used_wrongly = ConfigError(error.format_message(), next="paceline --help")
        say_error(used_wrongly)
        code = used_wrongly.exit_code
    sys.exit(code)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"paceline {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[  # noqa: ARG001 (its callback shows it)
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Train draft models for speculative decoding, online: producers capture, consumers train."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


if __name__ == "__main__":
    main()
