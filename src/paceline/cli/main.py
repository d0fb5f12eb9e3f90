"""The `paceline` command and its verbs. This process loads no torch.

Every error becomes one readable message on stderr and an exit code. Only --debug shows a traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from paceline.cli.clean import clean_folder
from paceline.cli.compare import compare, sweep
from paceline.cli.data import OPTIONS, check
from paceline.cli.evaluate import MeasuringProgress, evaluation_request, show_report
from paceline.cli.export import HOST, export_checkpoint, export_request, serve_run, serving_command
from paceline.cli.fsck import fsck_directory
from paceline.cli.inspect_run import inspect_all, inspect_sample, inspect_step
from paceline.cli.ledger import copy_run_ledger
from paceline.cli.options import takes
from paceline.cli.plain import (
    INTERRUPTED,
    exit_code_of_lost_output,
    out,
    say,
    say_document,
    say_error,
    stderr,
)
from paceline.cli.plan import plan
from paceline.cli.progress import Progress, best_lines, describe, evaluation_lines, final_line, trained
from paceline.config.load import load_run_config, recorded_config
from paceline.config.run import RunConfig
from paceline.durable_files import replace_file
from paceline.engines.table import ENGINES
from paceline.errors import ConfigError, PacelineError, explained
from paceline.evaluation.settings import EvaluationRequest
from paceline.exports.settings import ExportSection
from paceline.ledger.place import known
from paceline.monitoring.status import status_of
from paceline.regular_files import kind_of
from paceline.roles.child import RoleFailedError
from paceline.roles.plan import RunPlan, plan_run, role_environment
from paceline.roles.preflight import preflight
from paceline.roles.process import DEBUG_VARIABLE
from paceline.roles.snapshot import making_sense, open_run, take_snapshot
from paceline.roles.supervisor import Supervisor, evaluate_run, export_answers_of
from paceline.roles.workers import CONSUMER, JOIN, PRODUCER
from paceline.target.hub import local_target
from paceline.terminal import open_standard_streams, printable

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Look at what a run would read.", no_args_is_help=True)
app.add_typer(data_app, name="data")
ledger_app = typer.Typer(help="Move a run's ledger.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", readable=False)]
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="The run file, or the run's directory.", readable=False)
]
P = ParamSpec("P")


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
        used_wrongly = ConfigError(error.format_message(), next="paceline --help")
        say_error(used_wrongly)
        code = used_wrongly.exit_code
    sys.exit(code)


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train draft models for speculative decoding, online: producers capture, consumers train."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def advises(command: Callable[P, None]) -> Callable[P, None]:
    """Print an error as what, why and next; exit with its code."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
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


@app.command()
@advises
def train(run_file: RunFile) -> None:
    """Start both roles, watch them to the end, then evaluate. Continues a run that was stopped."""
    plan = plan_run(load_run_config(run_file))
    for note in [*plan.notes, *preflight(plan)]:
        say(out, note)
    with Progress(out, plan) as progress:
        supervisor = Supervisor(run_file, plan, show=progress.show, tell=partial(say, out))
        completed = supervisor.run()
    if not completed:
        say(out, f"Stopped; nothing is lost. Go on with: paceline train {run_file}")
        raise typer.Exit(INTERRUPTED)
    failure = _evaluate_if_possible(run_file, plan)
    if plan.config.export.formats:
        _export(run_file, plan.config, plan.config.export)
    if failure is not None:
        raise failure


@app.command()
@advises
def produce(
    run: Run,
    join: Annotated[
        bool, typer.Option(JOIN, help="Add a producer to a run that is going on; it may end at any time.")
    ] = False,
) -> None:
    """Run a producer alone, in the foreground."""
    _run_role(PRODUCER, _run_file(run), *([JOIN] if join else []))


@app.command()
@advises
def consume(run_file: RunFile) -> None:
    """Run the consumer alone, in the foreground."""
    _run_role(CONSUMER, run_file)


@app.command()
@advises
def status(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; see docs/status.md.")] = False,
) -> None:
    """Show what a run has done and what it is doing."""
    directory = _directory(run)
    with making_sense(directory):
        snapshot = take_snapshot(directory, open_run(directory))
        now = status_of(directory, snapshot)
    if as_json:
        say_document(now)
        return
    describe(out, snapshot)
    if now.waiting.words:
        say(out, now.waiting.words)


@app.command()
@advises
def engine(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The engine: vllm or sglang.")],
    run: Run,
) -> None:
    """Print the command that starts the engine's server for a run, for: engine: {name: NAME, url: ...}"""
    run_file = _run_file(run)
    config = load_run_config(run_file)
    _refuse_another_engine(name, run, config)
    local_target(config.target)  # that process does not use the network
    command = [sys.executable, "-m", "paceline.roles.server_command", str(run_file)]
    os.execve(sys.executable, command, {**os.environ, **role_environment(1)})  # noqa: S606 (our own module)


@app.command()
@advises
def evaluate(
    run: Run,
    suite: Annotated[
        list[str] | None, typer.Option(help="heldout, humaneval or a file of prompts; repeatable.")
    ] = None,
    temperature: Annotated[list[str] | None, typer.Option(help="0 (the default), or 0,1.")] = None,
    max_prompts: Annotated[int | None, typer.Option(help="Of each suite.", min=1)] = None,
    step: Annotated[int | None, typer.Option(help="A kept checkpoint's step; the newest.", min=1)] = None,
    report: Annotated[
        Path | None, typer.Option("--json", help="The report; evaluation-suites.json of the run.")
    ] = None,
) -> None:
    """Measure acceptance length and speed-up of a checkpoint by lossless decoding, beside prompt lookup.

    Without options: the newest checkpoint on the run's held-out prompts, as at the end of training.
    """
    run_file = _run_file(run)
    config = load_run_config(run_file)
    request = evaluation_request(config, suite or [], temperature or [], max_prompts, step, report)
    _evaluate(run_file, config, request)


app.command()(advises(plan))
app.command()(advises(compare))
app.command()(advises(sweep))


@app.command()
@advises
def export(
    run: Run,
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="Where to; for several formats, a folder each.", readable=False),
    ] = None,
    to: Annotated[list[str] | None, typer.Option(help="vllm, sglang, speculators or hf; repeatable.")] = None,
    step: Annotated[int | None, typer.Option(help="A kept checkpoint's step; the best.", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 (the default) or fp32.")] = None,
    target_name: Annotated[str | None, typer.Option(help="The target's hub id or path for servers.")] = None,
) -> None:
    """Write a checkpoint's draft as folders for inference servers, each checked by its server's rules."""
    run_file = _run_file(run)
    config = load_run_config(run_file)
    _export(run_file, config, export_request(config, to or [], directory, step, dtype, target_name))


@app.command()
@advises
def serve(
    run: Run,
    server: Annotated[str | None, typer.Option(help="vllm or sglang; that of the newest export.")] = None,
    folder: Annotated[Path | None, typer.Option(help="An exported folder; the newest.")] = None,
    host: Annotated[str, typer.Option(help="The address that the server listens on.")] = HOST,
    start: Annotated[bool, typer.Option("--run", help="Run the command instead of printing it.")] = False,
) -> None:
    """Print the command by which an inference server serves the run's target with its exported draft."""
    serve_run(out, serving_command(_directory(run), server, folder, host), run=start)


@app.command()
@advises
def fsck(run: Run) -> None:
    """Check, with code independent of the trainer, that a run has kept its guarantee. Changes nothing."""
    raise typer.Exit(fsck_directory(out, _directory(run)))


@app.command()
@advises
def clean(
    base: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where feature folders lie.", readable=False)
    ] = Path("/dev/shm"),  # noqa: S108 (the default of features.directory)
    yes: Annotated[bool, typer.Option("--yes", help="Free them; without it, only list them.")] = False,
) -> None:
    """List feature folders that no run needs, or free them."""
    clean_folder(out, base, free=yes)


@app.command()
@advises
def inspect(
    run: Run,
    step: Annotated[int | None, typer.Option(help="Show the samples of this step.")] = None,
    sample: Annotated[str | None, typer.Option(help="Show what became of this sample or prompt.")] = None,
) -> None:
    """Show from the ledger what was trained, which prompts failed, and which samples are quarantined."""
    directory = _directory(run)
    with making_sense(directory):
        view = open_run(directory)
        if step is not None:
            inspect_step(out, view, step)
        if sample is not None:
            inspect_sample(out, view, sample)
        if step is None and sample is None:
            inspect_all(out, view)


@ledger_app.command("copy")
@advises
def copy_ledger(
    run: Run,
    to: Annotated[str, typer.Argument(metavar="TO", help="sqlite, or a server's address: redis://...")],
) -> None:
    """Copy a stopped run's ledger to another store, compare the copy, and make it the run's ledger."""
    copy_run_ledger(out, _directory(run), to)


@data_app.command("check")
@advises
@takes(OPTIONS)
def check_data(
    path: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A run file, or a file or folder of samples.", readable=False),
    ],
    measure: Annotated[bool, typer.Option("--measure", help="Load the target and time it.")] = False,
    **given: Any,
) -> None:
    """Show what a file is taken for, what in it cannot be used, and what the target sees of it.

    Of a run file, as that run would: with its sources, target, answers and limits.
    """
    check(
        out, path, {name: value for name, value in given.items() if value not in (None, [])}, measure=measure
    )


@data_app.command("export")
@advises
def export_data(
    run: Run,
    to: Annotated[Path | None, typer.Option(help="The file; answers.jsonl in the run's directory.")] = None,
) -> None:
    """Write a run's kept answers as JSON lines that a run can read."""
    run_file = _run_file(run)
    config = load_run_config(run_file)
    local_target(config.target)  # that process does not use the network
    path = to or config.run.directory / "answers.jsonl"
    if not export_answers_of(run_file, config, path):
        say(out, f"Stopped; nothing is written. Again with: paceline data export {run}")
        raise typer.Exit(INTERRUPTED)
    say(out, f"answers: {path}")


def _refuse_another_engine(name: str, run: Path, config: RunConfig) -> None:
    """Raise ConfigError unless `name` is the engine of the run, and has a server."""
    if "url" not in ENGINES.find(name).model_fields:
        raise ConfigError(
            f"The engine {name} has no server of its own.",
            why="It starts and ends with the run.",
            next=f"paceline train {run}, or name an engine with a server: vllm or sglang.",
        )
    if config.engine.name != name:
        raise ConfigError(
            f"The engine of {run} is {config.engine.name}, not {name}.",
            why="The command follows from the run's target, its method and its engine section.",
            next=f"set engine: {{name: {name}, url: http://127.0.0.1:8000}} in the run file.",
        )


def _evaluate(run_file: Path, config: RunConfig, request: EvaluationRequest | None = None) -> None:
    local_target(config.target)  # the evaluator's process does not use the network
    what = "held-out prompts" if request is None else ", ".join(request.suites)
    say(out, f"measuring on {what}, by lossless decoding ...")
    if not evaluate_run(run_file, config, request, MeasuringProgress(out, config).look):
        say(out, "Stopped; nothing is lost. The same command measures the prompts that are left.")
        raise typer.Exit(INTERRUPTED)
    if request is None:
        _print_evaluation(config)
    else:
        show_report(out, request.report)


def _export(run_file: Path, config: RunConfig, request: ExportSection) -> None:
    if not export_checkpoint(out, run_file, config, request):
        say(out, f"Stopped; nothing is lost. Export again with: paceline export {run_file}")
        raise typer.Exit(INTERRUPTED)


def _run_file(run: Path) -> Path:
    """The run file, written from the recorded settings if `run` is a run's directory."""
    if not _is_directory(run):
        return run
    with making_sense(run):
        recorded = dict(open_run(run).facts().get("config", {}))
        if recorded and (place := known(run)) is not None:  # the ledger may have moved since the first start
            recorded = {key: value for key, value in recorded.items() if not key.startswith("ledger.")}
            recorded |= {f"ledger.{key}": value for key, value in place.section.items()}
        text = recorded_config(recorded, run)
    run_file = run / "evaluated-run.yaml"
    replace_file(run_file, text.encode())  # a role that starts may be reading it
    return run_file


def _evaluate_if_possible(run_file: Path, plan: RunPlan) -> PacelineError | None:
    """Evaluate, or say why the draft is not measured. Returns the error with which training is to end.

    There is none if it is impossible, unless the run file asks for that. A draft that was not measured can
    still be exported.
    """
    if plan.evaluation_obstacle:
        _print_trained(plan, plan.evaluation_obstacle)
        return None
    try:
        _evaluate(run_file, plan.config)
    except PacelineError as error:
        _print_trained(plan, error.what)
        skips = error.exit_code == ConfigError.exit_code and plan.config.evaluation.unsupported == "skip"
        return None if skips and isinstance(error, RoleFailedError) else error
    return None


def _run_role(role: str, run_file: Path, *arguments: str) -> None:
    config = load_run_config(run_file)
    local_target(config.target)  # the role's process does not use the network
    machine = config.machine
    threads = machine.producer_threads if role == PRODUCER else machine.consumer_threads
    environment = {**os.environ, **role_environment(threads)}
    # The role replaces this process, so that it receives signals and sets the exit code.
    command = [sys.executable, "-m", f"paceline.roles.{role}", str(run_file), *arguments]
    os.execve(sys.executable, command, environment)  # noqa: S606 (our own module, no shell)


def _print_evaluation(config: RunConfig) -> None:
    snapshot = take_snapshot(config.run.directory, open_run(config.run.directory))
    if not snapshot.evaluation:
        raise ConfigError(
            f"{config.run.directory / 'evaluation.json'} is not what the evaluation wrote.",
            why="It was changed since; the run itself is untouched.",
            next=f"paceline evaluate {config.run.directory}",
        )
    for line in [*evaluation_lines(snapshot), *best_lines(snapshot), final_line(snapshot)]:
        say(out, line)


def _print_trained(plan: RunPlan, why: str) -> None:
    snapshot = take_snapshot(plan.config.run.directory, open_run(plan.config.run.directory))
    say(out, f"not measured: {why} | {trained(snapshot)}")


def _directory(run: Path) -> Path:
    return run if _is_directory(run) else load_run_config(run).run.directory


def _is_directory(run: Path) -> bool:
    """Whether `run` is a directory. Raises ConfigError if nothing is there, OSError if that is unknown."""
    if not os.path.lexists(run):
        raise ConfigError(
            f"There is no {run}, neither a run's directory nor a run file.",
            why="Either names a run; its directory exists from the first start on.",
            next="check the path, or paceline train RUN.yaml",
        )
    return kind_of(run) == "folder"


if __name__ == "__main__":
    main()
