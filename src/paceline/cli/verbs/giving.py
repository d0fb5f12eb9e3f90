"""What becomes of a run: its draft for servers, its ledger elsewhere, its memory freed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import HOST, Run
from paceline.cli.verbs.verb import advises, group

verbs = group()
ledger = group("Move a run's ledger.")
verbs.add_typer(ledger, name="ledger")


@verbs.command()
@advises
def export(
    run: Run,
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]",
            help="The folder to write; for several formats, it gets a folder for each.",
            readable=False,
        ),
    ] = None,
    to: Annotated[list[str] | None, typer.Option(help="vllm, sglang, speculators or hf; repeatable.")] = None,
    step: Annotated[
        int | None, typer.Option(help="The step of a kept checkpoint (default: the best).", min=1)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 (the default) or fp32.")] = None,
    target_name: Annotated[str | None, typer.Option(help="The target's hub id or path for servers.")] = None,
) -> None:
    """Write a checkpoint's draft as folders for inference servers.

    Each is checked by the rules of its server.
    """
    from paceline.cli.export import export_as_asked

    export_as_asked(run, to or [], directory, step, dtype, target_name)


@verbs.command()
@advises
def serve(
    run: Run,
    server: Annotated[
        str | None, typer.Option(help="vllm or sglang (default: that of the newest export).")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="An exported folder (default: the newest).")] = None,
    host: Annotated[str, typer.Option(help="The address that the server listens on.")] = HOST,
    start: Annotated[bool, typer.Option("--run", help="Run the command instead of printing it.")] = False,
) -> None:
    """Print the command that serves the target with its draft."""
    from paceline.cli.export import serve_run, serving_command
    from paceline.cli.named_run import directory_of
    from paceline.cli.plain import out

    serve_run(out, serving_command(directory_of(run), server, folder, host), run=start)


@ledger.command("copy")
@advises
def copy_ledger(
    run: Run,
    to: Annotated[str, typer.Argument(metavar="TO", help="sqlite, or a server's address: redis://...")],
) -> None:
    """Copy a stopped run's ledger to another store, compare the copy, and make it the run's ledger."""
    from paceline.cli.ledger import copy_run_ledger
    from paceline.cli.named_run import directory_of
    from paceline.cli.plain import out

    copy_run_ledger(out, directory_of(run), to)


@verbs.command()
@advises
def clean(
    base: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where feature folders lie.", readable=False)
    ] = Path("/dev/shm"),  # noqa: S108 (the default of features.directory)
    yes: Annotated[bool, typer.Option("--yes", help="Free them; without it, only list them.")] = False,
) -> None:
    """List feature folders that no run needs, or free them."""
    from paceline.cli.clean import clean_folder
    from paceline.cli.plain import out

    clean_folder(out, base, free=yes)
