"""What `paceline init` does: looks at target and data, sets prompts aside, writes a run file that plans.

Nothing that exists is replaced unless that is asked for. The run file is written last, so a start that is
interrupted leaves no run file. No torch.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from paceline.config.load import parse_run_config
from paceline.config.run import RunConfig
from paceline.data.opening import open_file, open_held_out
from paceline.data.setting_aside import SetAside, set_aside
from paceline.errors import ConfigError
from paceline.methods.table import DEFAULT_METHOD, METHODS
from paceline.regular_files import read_regular
from paceline.roles.cost_plan import cost_plan
from paceline.roles.machine import this_machine
from paceline.roles.new_run import Wishes, run_file, servers
from paceline.roles.target_at_hand import finder
from paceline.target.settings import TargetSection
from paceline.target.shape import TargetShape, read_shape
from paceline.terminal import one_line

NONE = "none"  # no server: the target runs in the producer's process
TEMPLATE_BYTES_MAX = 8 << 20
GPUS_MAX = 64  # of one host
DATA_BYTES_MAX = 4 << 30  # of a file that is copied
BUDGET_STEP_MIB, BUDGET_SHARE = 256, 1.5  # of the least budget
ROOMY_MIB = 1 << 40


@dataclass(frozen=True)
class Given:
    """The command's options; None: to be chosen. `target_config`: where the target's files are, if the target
    is not at hand."""

    target: str
    data: Path
    output: Path
    heldout: Path | None = None
    method: str = DEFAULT_METHOD
    gpus: int | None = None
    serve: str | None = None
    name: str | None = None
    target_config: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Started:
    """`files`: written, the run file last. `aside`: what was set aside; None: a held-out file was named."""

    config: RunConfig
    files: list[Path]
    aside: SetAside | None
    wishes: Wishes


def start_run(given: Given, tell: Callable[[str], None] = lambda _: None) -> Started:
    """Raises ConfigError, also for a file that is there already; then nothing was written."""
    METHODS.find(given.method)  # a typing error is told before anything is fetched
    if given.gpus is not None and not 0 <= given.gpus <= GPUS_MAX:
        raise ConfigError(f"--gpus is {given.gpus}.", next=f"a number from 0 to {GPUS_MAX}.")
    name = given.name or _name(given)
    _refuse_folder(given.output)
    _refuse_existing(given, [given.output])
    folder = target_folder(given)
    shape = read_shape(folder)
    gpus = len(this_machine().gpus) if given.gpus is None else given.gpus
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".paceline-init-", dir=given.output.parent) as aside:
        prompts = _prompts(given, name, Path(aside), tell)
        wishes = Wishes(
            name=name,
            target=given.target,
            data=prompts.data,
            heldout=prompts.heldout,
            method=given.method,
            gpus=gpus,
            serve=_server(given, shape, gpus),
            samples=open_file(prompts.data_now, format="auto").size,
            processors=this_machine().processors,
            thinks=_thinks(folder, given.target, shape),
            command=_command(given, name),
        )
        here = replace(wishes, data=prompts.data_now, heldout=prompts.heldout_now)
        text = run_file(wishes, shape, _budget_mib(given, here, shape))
        config = _parsed(text)
        written = Path(aside) / "run.yaml"
        written.write_bytes(text.encode())  # as it is read, whatever the locale
        _publish(given, [*prompts.moves, (written, given.output)])
    files = [*(final for _, final in prompts.moves), given.output]
    return Started(config, files, prompts.aside, wishes)


def target_folder(given: Given) -> Path:
    """Where the target's config.json is. Raises ConfigError."""
    return finder(given.target_config)(TargetSection(model=Path(given.target))).model


def _budget_mib(given: Given, wishes: Wishes, shape: TargetShape) -> int:
    """What the plan of such a run needs, and some more. Raises what the plan raises."""
    roomy = _parsed(run_file(wishes, shape, ROOMY_MIB))
    least = cost_plan(roomy, target_config=given.target_config).window.needed_bytes / 2**20
    return max(1024, -int(-least * BUDGET_SHARE // BUDGET_STEP_MIB) * BUDGET_STEP_MIB)


def _parsed(text: str) -> RunConfig:
    try:
        return parse_run_config(yaml.safe_load(text), source="The run file")
    except ConfigError as error:
        raise ConfigError(
            error.what, why="It was not written.", next="give other options: paceline init --help."
        ) from error


def _name(given: Given) -> str:
    """The run file's, or the target's and the method's."""
    stem = given.output.stem
    told = f"{Path(given.target).name}-{given.method}" if stem in ("run", "") else stem
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", told).strip("-._")[:64].lower()
    return slug or "draft"


def _refuse_existing(given: Given, paths: list[Path]) -> None:
    there = [path for path in paths if path.exists() or path.is_symlink()]
    if there and not given.overwrite:
        raise _exists(there[0])


def _exists(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} exists.",
        why="It may be the only copy of something; nothing was written.",
        next="name another file with -o, or add --overwrite.",
    )


def _publish(given: Given, moves: list[tuple[Path, Path]]) -> None:
    """Give the files their names: all of them, or none if one appeared since it was looked for.

    Raises ConfigError, OSError.
    """
    made = list[Path]()
    try:
        for path, final in moves:
            if not given.overwrite:
                final.touch(exist_ok=False)
                made.append(final)
            path.replace(final)
    except BaseException as error:
        for one in made:
            one.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise _exists(final) from error
        raise


def _refuse_folder(output: Path) -> None:
    if output.is_dir():
        raise ConfigError(f"{output} is a folder.", next=f"name a file: -o {output / 'run.yaml'}")


@dataclass(frozen=True)
class _Prompts:
    """Data and held-out prompts: where they will lie, and where they lie until the run file is written."""

    data: Path
    heldout: Path
    data_now: Path
    heldout_now: Path
    aside: SetAside | None = None

    @property
    def moves(self) -> list[tuple[Path, Path]]:
        pairs = [(self.data_now, self.data), (self.heldout_now, self.heldout)]
        return [(now, later) for now, later in pairs if now != later]


def _prompts(given: Given, name: str, folder: Path, tell: Callable[[str], None]) -> _Prompts:
    """Data and held-out file: those that are given, or two new ones in `folder` that share no question."""
    if given.heldout is not None:
        open_held_out(given.heldout)
        _refuse_own(given, [given.output])
        return _Prompts(given.data, given.heldout, given.data, given.heldout)
    base = given.output.parent
    final = base / f"{name}.train.jsonl", base / f"{name}.heldout.jsonl"
    _refuse_existing(given, list(final))
    _refuse_own(given, [given.output, *final])
    with suppress(OSError):
        if given.data.stat().st_size > DATA_BYTES_MAX:
            raise ConfigError(
                f"{given.data} has {given.data.stat().st_size >> 30} GiB.",
                why="Without held-out prompts it would be copied, some of its prompts set aside.",
                next="give prompts to measure on that are not in it: --heldout FILE.",
            )
    tell(f"reading {given.data}, and setting prompts aside to measure the draft on ...")
    now = folder / "train.jsonl", folder / "heldout.jsonl"
    return _Prompts(*final, *now, aside=set_aside(given.data, *now))


def _refuse_own(given: Given, written: list[Path]) -> None:
    """Raise ConfigError if a file that is read would be written, whatever it is called."""
    for source in filter(None, (given.data, given.heldout)):
        for path in written:
            if source.exists() and path.exists() and source.samefile(path):
                raise ConfigError(
                    f"{source} would be read and replaced.",
                    why="The data would be lost. Nothing was written.",
                    next="name another run file with -o, or another run with --name.",
                )


def _server(given: Given, shape: TargetShape, gpus: int) -> str:
    """The server that is asked for; of itself, vLLM where it is installed or the target needs one."""
    if given.serve is None:
        wanted = bool(shape.quantised) or (gpus > 0 and shutil.which("vllm") is not None)
        return "vllm" if wanted else ""
    known = [*servers(), NONE]
    if given.serve not in known:
        raise ConfigError(
            f"--serve is {given.serve!r}.",
            why="A server runs the target, or the producer does.",
            next=f"choose one of: {', '.join(known)}.",
        )
    return "" if given.serve == NONE else given.serve


def _thinks(folder: Path, target: str, shape: TargetShape) -> bool:
    """Whether the target's chat template can leave a chain of thought out.

    Without the template, by the family's name: the variable changes nothing where a template ignores it.
    """
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        with suppress(OSError):
            text = read_regular(folder / name, TEMPLATE_BYTES_MAX)
            if b"chat_template" in text or name.endswith(".jinja"):
                return b"enable_thinking" in text
    return shape.model_type.startswith("qwen3") and "2507" not in target


def _command(given: Given, name: str) -> str:
    """The command with what decides the file, for its head."""
    words = ["paceline", "init", "--target", given.target, "--data", str(given.data)]
    options = {
        "--heldout": given.heldout,
        "--method": given.method if given.method != DEFAULT_METHOD else None,
        "--gpus": given.gpus,
        "--serve": given.serve,
        "--name": name if given.name else None,
    }
    for option, value in options.items():
        if value is not None:
            words += [option, str(value)]
    return one_line(shlex.join([*words, "-o", str(given.output)]))
