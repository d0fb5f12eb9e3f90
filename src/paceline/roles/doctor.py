"""Whether this machine, and a run on it, have what they need: each finding with its mend. No torch.

What a start checks is asked of the start's own code (preflight, plan, ledger); libraries that load torch, and
the engine's probe, are asked in processes of their own. Nothing is changed but files of a moment.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile

from packaging.requirements import Requirement

from paceline.c_compiler import c_compiler, missing_for_triton
from paceline.config.run import RunConfig
from paceline.errors import explained
from paceline.ledger.settings import SqliteSection
from paceline.roles.cost_plan import cost_plan
from paceline.roles.examined import Examined, State
from paceline.roles.examined_mooncake import the_mooncake_master_works
from paceline.roles.examined_server import ports_can_be_opened, the_servers_program_starts
from paceline.roles.machine import gpus_of_the_driver
from paceline.roles.preflight import files_that_can_be_open
from paceline.roles.question import ask
from paceline.section import Section

PYTHON_FLOOR = (3, 11)
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (the default of features.directory)
SHARED_MEMORY_MIN = 1 << 30
FREE_MIN = 2 << 30
SYNCS, SLOW_SYNC_S = 15, 0.02


class Diagnosis(Section):
    version: int = 1
    run: str = ""
    findings: list[Examined]

    @property
    def healthy(self) -> bool:
        return all(finding.state != "bad" for finding in self.findings)


Examination = Callable[[RunConfig | None], Iterator[Examined]]


def examine(config: RunConfig | None, run_file: Path | None, *, probe: bool = False) -> Iterator[Examined]:
    """Every finding, as it is made. `probe`: load the target, and compare its captured states."""
    for topic, look in EXAMINATIONS.items():
        yield from _safely(topic, look, config)
    if config is not None:
        of_run = list(_safely("run", the_run_fits, config))
        yield from of_run
        # What is wrong with a config is told once; sizes that fit no memory would take for ever to be built.
        if run_file is not None and all(finding.state != "bad" for finding in of_run):
            yield from _safely("target", lambda _: the_target_can_be_read(run_file), config)
        if probe and run_file is not None:
            yield from _safely("probe", lambda _: the_engine_is_exact(run_file), config)


def _safely(topic: str, look: Examination, config: RunConfig | None) -> Iterator[Examined]:
    """What cannot be examined is a finding, too."""
    try:
        yield from look(config)
    except Exception as error:  # noqa: BLE001 (the others are still examined)
        told = explained(error)
        what = f"{told.what} {told.why}".strip()
        yield Examined(topic=topic, state="bad", what=what, mend=_sentence(told.next))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


# -- the machine --------------------------------------------------------------------------------


def python_is_new_enough(_: RunConfig | None) -> Iterator[Examined]:
    """And every package that Paceline asks for is there, in a version that it takes."""
    now = sys.version_info
    told = f"Python {now.major}.{now.minor}.{now.micro}"
    if now[:2] < PYTHON_FLOOR:
        yield Examined(topic="python", state="bad", what=told, mend="Install Python 3.11 or newer.")
        return
    wrong = list(_unmet())
    if wrong:
        yield Examined(
            topic="python",
            state="bad",
            what=f"{told}; {', '.join(what for what, _ in wrong)}",
            mend=f"pip install {shlex.join(wanted for _, wanted in wrong)}",
        )
    else:
        yield Examined(topic="python", state="good", what=f"{told}, with all packages")


def _unmet() -> Iterator[tuple[str, str]]:
    """What is wrong with a package, and what to ask pip for."""
    try:
        asked = requires("paceline") or []
    except PackageNotFoundError:  # a checkout that was not installed
        return
    for line in asked:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(wanted.name)
        except PackageNotFoundError:
            yield f"{wanted.name} is missing", f"{wanted.name}{wanted.specifier}"
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            yield f"{wanted.name} is {there}, not {wanted.specifier}", f"{wanted.name}{wanted.specifier}"


def torch_fits_the_gpus(_: RunConfig | None) -> Iterator[Examined]:
    """Compare what the driver shows with what torch can use."""
    told = json.loads(ask("paceline.roles.libraries", "", "import of torch and transformers", threads=1))
    names = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    yield Examined(topic="libraries", state="good", what=names)
    gpus, devices, cuda = gpus_of_the_driver(), told["devices"], told["cuda"]
    build = f"torch for CUDA {cuda}" if cuda else "torch for CPUs"
    if not gpus and not devices:
        yield Examined(topic="gpu", state="good", what=f"none, and {build}: roles run on processors")
    elif not devices:
        driver = gpus[0].driver or "unknown"
        said = f" ({'; '.join(told['warnings'])})" if told["warnings"] else ""
        yield Examined(
            topic="gpu",
            state="bad",
            what=f"{len(gpus)} x {gpus[0].name}, driver {driver}, and {build} can use none{said}",
            mend="Install the torch build for the driver's CUDA (https://pytorch.org/get-started), or "
            "upgrade the driver; look at CUDA_VISIBLE_DEVICES.",
        )
    else:
        yield Examined(topic="gpu", state="good", what=f"{len(devices)} x {devices[0]}, {build}")


def kernels_could_be_compiled(config: RunConfig | None) -> Iterator[Examined]:
    """Of a machine with GPUs; the plan says it of a run that compiles some."""
    gpus = gpus_of_the_driver()
    if not gpus or config is not None:
        return
    missing = missing_for_triton()
    if missing is None:
        yield Examined(topic="compiler", state="good", what=f"{c_compiler()}, with Python's header files")
    else:
        what = f"{missing.what} Block drafts train with a compiled kernel, and vLLM compiles some"
        yield Examined(topic="compiler", state="note", what=what, mend=missing.mend)


def the_ledger_can_be_kept(config: RunConfig | None) -> Iterator[Examined]:
    """Ask the run's ledger for what its start would refuse."""
    section = SqliteSection() if config is None else config.ledger
    directory = Path() if config is None else config.run.directory
    name = "" if config is None else config.run.name
    notes = section.examined(directory)
    yield Examined(topic="ledger", state="good", what=f"{section.store}: {section.where(directory, name)}")
    for note in notes:
        yield Examined(topic="ledger", state="note", what=f"not verified: {note}")


def shared_memory_is_there(config: RunConfig | None) -> Iterator[Examined]:
    """Of a run, the plan compares it with the budget."""
    place = SHARED_MEMORY if config is None else config.features.directory
    space = os.statvfs(place)
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    told = f"{place} has {_gib(total)}, {_gib(free)} free"
    if config is None and 0 < total < SHARED_MEMORY_MIN:
        yield Examined(
            topic="memory",
            state="note",
            what=f"{told}: features wait there",
            mend="Give a container more: docker run --shm-size=8g, or set features.directory to a disk.",
        )
    else:
        yield Examined(topic="memory", state="good", what=told)


def files_are_enough(_: RunConfig | None) -> Iterator[Examined]:
    limit = files_that_can_be_open()
    if isinstance(limit, int):
        yield Examined(topic="files", state="good", what=f"{limit} can be open at once")
    else:
        yield Examined(topic="files", state="note", what=limit.what, mend=limit.next)


def the_disk_is_fast_enough(config: RunConfig | None) -> Iterator[Examined]:
    """Time the sync of a small file where checkpoints and ledger will lie; nothing of it stays."""
    place = _existing(Path() if config is None else config.run.directory)
    free = shutil.disk_usage(place).free
    took = [_sync_s(place) for _ in range(SYNCS)]
    told = f"{place}: a sync takes {1000 * median(took):.1f} ms, {_gib(free)} free"
    if median(took) > SLOW_SYNC_S:
        yield Examined(
            topic="disk",
            state="note",
            what=f"{told}; every checkpoint waits for some",
            mend="Set run.directory to a local SSD; leave ledger.durability at head.",
        )
    elif free < FREE_MIN:
        yield Examined(topic="disk", state="note", what=told, mend="Free space: checkpoints lie there.")
    else:
        yield Examined(topic="disk", state="good", what=told)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _sync_s(folder: Path) -> float:
    """Of a file without a name, which is gone whatever happens. Raises OSError if the folder takes none."""
    with TemporaryFile(dir=folder) as file:
        began = time.monotonic()
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())
        return time.monotonic() - began


# -- the run ------------------------------------------------------------------------------------


def the_run_fits(config: RunConfig | None) -> Iterator[Examined]:
    """What `paceline plan` and the start find of it."""
    assert config is not None
    plan = cost_plan(config)
    for finding in plan.findings:
        state: State = "bad" if finding.refuses else "note"
        yield Examined(topic="run", state=state, what=finding.what, mend=finding.next)
    if plan.fits:
        yield Examined(topic="run", state="good", what=f"{config.run.name} fits this machine")


def the_target_can_be_read(run_file: Path) -> Iterator[Examined]:
    """Read the target's files in a process of its own, as the start does before it loads any weights."""
    told = json.loads(ask("paceline.roles.target_checker", str(run_file.absolute()), "check of the target"))
    yield Examined(topic="target", state="good", what=f"as a start reads it: {told}")


def the_engine_is_exact(run_file: Path) -> Iterator[Examined]:
    """Load the target in a process of its own, and compare captured states with the model's own."""
    told = json.loads(ask("paceline.roles.engine_prober", str(run_file.absolute()), "probe of the engine"))
    yield Examined(
        topic="probe",
        state="good",
        what=f"captured states are the model's own, in {told['dtype']} on {told['device']}",
    )
    for note in told["notes"]:
        yield Examined(topic="probe", state="note", what=note)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


EXAMINATIONS: dict[str, Examination] = {
    "python": python_is_new_enough,
    "libraries": torch_fits_the_gpus,
    "compiler": kernels_could_be_compiled,
    "ledger": the_ledger_can_be_kept,
    "memory": shared_memory_is_there,
    "files": files_are_enough,
    "disk": the_disk_is_fast_enough,
    "ports": ports_can_be_opened,
    "server": the_servers_program_starts,
    "features": the_mooncake_master_works,
}
