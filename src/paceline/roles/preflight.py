"""Preflight: checks before a run starts. Each finding is one line, a note or a refusal.

A check is a function of the plan that yields findings, listed in CHECKS. It starts nothing, loads no torch,
and is fast enough for a command line.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from paceline.c_compiler import OF_GCC, OF_PYTHON, c_compiler, has_compiled_before, missing_for_triton
from paceline.config.run import RunConfig
from paceline.engines.served.settings import ServedSection
from paceline.engines.vllm.settings import VllmSection
from paceline.errors import ConfigError
from paceline.exports.drafted_methods import TAKEN
from paceline.exports.drafted_targets import RELEASES, SAYS, architectures_of, refusals, refused_class
from paceline.features.ownership import bytes_of
from paceline.features.settings import MooncakeSection
from paceline.roles.footprint import engine_device, target_bytes_at_least
from paceline.roles.machine import this_machine
from paceline.roles.plan import RunPlan
from paceline.target.folder import read_config
from paceline.target.shape import read_shape

KNOWN = {method for taken in TAKEN.values() for method in taken}  # another package may export its own
STATES_MAX, STATE_BYTES = 8, 4  # of each token: more layers than a method asks for, in float32
MASTER_S = 3.0
OPEN_FILES_MIN = 256  # for the ledger, locks, checkpoints, and the files of libraries


@dataclass(frozen=True)
class Finding:
    """`next`: what the user can do about it; `refuses`: the run must not start."""

    what: str
    next: str
    refuses: bool = False


Check = Callable[[RunPlan], Iterator[Finding]]


def preflight(plan: RunPlan) -> list[str]:
    """The notes, one line each. Raises ConfigError with all refusals, if there are any."""
    found = [finding for check in CHECKS for finding in check(plan)]
    refused = [finding for finding in found if finding.refuses]
    if refused:
        raise ConfigError(
            "\n".join(finding.what for finding in refused),
            why="Nothing was started and nothing was changed.",
            next="\n".join(dict.fromkeys(finding.next for finding in refused)),
        )
    return [f"note: {finding.what} {finding.next}" for finding in found]


def an_early_stop_is_measured(plan: RunPlan) -> Iterator[Finding]:
    """Compare training.stop_when_flat with what is measured beside training."""
    config = plan.config
    if config.training.stop_when_flat is not None and not config.evaluation.every_steps:
        yield Finding(
            "training.stop_when_flat needs measurements beside training, and evaluation.every_steps is 0.",
            "Set evaluation.every_steps to some multiple of checkpoint.interval_steps, or remove "
            "training.stop_when_flat.",
            refuses=True,
        )
    if config.evaluation.every_steps and plan.evaluation_obstacle:
        yield Finding(
            "evaluation.every_steps has no effect: the evaluation cannot decode with this target.",
            "The newest checkpoint counts as the best.",
        )


def the_features_find_room(plan: RunPlan) -> Iterator[Finding]:
    """Compare the budget with the space: a container's /dev/shm has 64 MiB by default."""
    features = plan.config.features
    if not features.in_directory:
        return
    try:
        space = os.statvfs(features.directory)
    except OSError as error:
        yield Finding(
            f"features.directory {features.directory} cannot be used ({error.strerror}).",
            "Mount it, or create it."
            if features.is_shared
            else "Set features.directory to a folder in memory, such as /dev/shm.",
            refuses=True,
        )
        return
    total = space.f_blocks * space.f_frsize  # 0 where there is no limit
    other = f"Give more (`docker run --shm-size={features.budget_mib + 64}m`), set features.directory to a "
    other += "folder on a disk, or lower features.budget_mib to"
    if features.is_shared:
        other = "Free some, or lower features.budget_mib to"
    if 0 < total < features.budget_mib << 20:
        yield Finding(
            f"{features.directory} holds {total >> 20} MiB in all, and features.budget_mib is "
            f"{features.budget_mib}.",
            f"{other} {max(1, total * 9 // 10 >> 20)}.",
            refuses=True,
        )
        return
    # The run reuses what an earlier start has left there.
    room = space.f_bavail * space.f_frsize + bytes_of(plan.config.feature_folder)
    if room < features.budget_mib << 20:
        yield Finding(
            f"{features.directory} has room for {room >> 20} MiB, and features.budget_mib is "
            f"{features.budget_mib}: the producer will stop when it is full.",
            f"{other} {max(1, room >> 20)}.",
        )


def the_target_finds_memory(plan: RunPlan) -> Iterator[Finding]:
    """Compare the sizes in the target's config with the memory where it is loaded: a system without enough
    would kill processes long before the load fails."""
    config = plan.config
    if isinstance(config.engine, ServedSection):
        return
    try:
        shape = read_shape(config.target.model)
    except ConfigError:
        return  # the model library alone knows this family's sizes
    machine = this_machine()
    device = engine_device(config, machine)
    there, where = machine.memory_bytes, "this machine"
    if device != "cpu":  # CUDA may number unlike GPUs by their speed, and the driver by their places
        there, where = max((gpu.memory_bytes for gpu in machine.gpus), default=0), "the largest GPU here"
    needed = target_bytes_at_least(shape, config, machine)
    if needed > there > 0:
        yield Finding(
            f"The target has {shape.sizes.num_hidden_layers} layers and takes at least "
            f"{needed / 2**30:.1f} GiB, and {where} has {there / 2**30:.1f} GiB of memory.",
            "Choose a smaller target, a smaller target.dtype, another device, or an engine with a server.",
            refuses=True,
        )


def the_mooncake_master_answers(plan: RunPlan) -> Iterator[Finding]:
    """Connect to the master, and look for Mooncake's package."""
    features = plan.config.features
    if not isinstance(features, MooncakeSection):
        return
    if find_spec("mooncake") is None:
        yield Finding(
            "Mooncake is not installed, and features.store is mooncake.",
            "pip install 'paceline[mooncake]'; docs/operations.md has the rest.",
            refuses=True,
        )
    host, _, port = features.master.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=MASTER_S).close()
    except OSError as error:
        yield Finding(
            f"No Mooncake master takes connections at {features.master} ({error.strerror or error}).",
            f"Start one there: `mooncake_master --rpc_port={port}`; or correct features.master.",
            refuses=True,
        )


def kernels_can_be_compiled(plan: RunPlan) -> Iterator[Finding]:
    """Try the C compiler that Triton will ask for in the first step, hours after the start perhaps."""
    config, given = plan.config, plan.config.training.device
    if given == "cpu" or not config.method.compiles or find_spec("triton") is None:
        return  # torch's build for processors brings no Triton, and trains on none of the GPUs here
    device = this_machine().device(given)  # asks the driver, which may take seconds
    if device == "cpu":
        return
    missing = missing_for_triton()
    if missing is not None:
        yield Finding(
            f"{missing.what} On {device} the method {config.method.name} trains with a kernel that Triton "
            "compiles in the first step.",
            f"{missing.mend} Or set method.attention: tiles, which compiles nothing and is slower.",
            refuses=not has_compiled_before(),
        )


def enough_files_can_be_open(_: RunPlan) -> Iterator[Finding]:
    """Check the limit of open files, which the roles inherit."""
    limit = files_that_can_be_open()
    if isinstance(limit, Finding):
        yield limit


def files_that_can_be_open() -> int | Finding:
    """How many; a finding if they are too few. Negative: no limit."""
    limit, _most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limit < OPEN_FILES_MIN:
        return Finding(
            f"Only {limit} files can be open at once, and a role needs up to {OPEN_FILES_MIN}.",
            "Raise the limit: `ulimit -n 1024`.",
        )
    return limit


def a_server_can_be_started(plan: RunPlan) -> Iterator[Finding]:
    """Look for the program of an engine that starts a server of its own."""
    engine = plan.config.engine
    if not isinstance(engine, VllmSection) or not engine.managed:
        return
    if shutil.which(engine.program[0]) is None:
        yield Finding(
            f"There is no program {engine.program[0]}, and engine.managed is true.",
            "Install vLLM, set engine.program, or start a server and set engine.url.",
            refuses=True,
        )
    elif c_compiler() is None:
        yield Finding(
            "There is no C compiler here, and vLLM compiles kernels when it starts.",
            f"Install one (Debian and Ubuntu: `apt-get install {OF_GCC} {OF_PYTHON}`), unless engine.program "
            "brings its own.",
        )


def states_on_their_way_find_room(plan: RunPlan) -> Iterator[Finding]:
    """A server writes states to files before they are stored: they need room beside the budget."""
    engine, features = plan.config.engine, plan.config.features
    if not isinstance(engine, ServedSection) or not (engine.directory or isinstance(engine, VllmSection)):
        return
    place = engine.directory or features.memory
    budget = features.budget_mib << 20 if features.in_directory and place == features.directory else 0
    needed = _bytes_on_their_way(plan.config, engine)
    try:
        space = os.statvfs(place)
    except OSError:
        return  # the server makes the folder, and that of the features has a check of its own
    room = space.f_bavail * space.f_frsize + bytes_of(plan.config.feature_folder)
    if room < budget + needed:
        yield Finding(
            f"{place} has room for {room >> 20} MiB; the states of requests in flight may need "
            f"{(needed >> 20) + 1} MiB beside features.budget_mib.",
            "Give more room, or lower features.budget_mib or engine.requests_in_flight.",
        )


def servers_draft_for_the_target(plan: RunPlan) -> Iterator[Finding]:
    """Look whether the servers of the exports that end the run are known to refuse the target."""
    config = plan.config
    classes = architectures_of(config.target.model)
    told = [note for name in config.export.formats for note in refusals(name, config.method.name, classes)]
    for note in dict.fromkeys(told):
        yield Finding(note, "The export is written and checked all the same.")


def exports_take_the_draft(plan: RunPlan) -> Iterator[Finding]:
    """Look whether an export that ends the run takes drafts of another kind alone."""
    method, formats = plan.config.method.name, plan.config.export.formats
    for name in dict.fromkeys(formats):
        taken = TAKEN.get(name)
        if taken is not None and method in KNOWN and method not in taken:
            yield Finding(
                f"The export {name} takes no draft of the method {method} (it takes {', '.join(taken)}): the "
                "run would end with an error after training.",
                f"Remove {name} from export.formats.",
            )


def the_server_gives_states_of_the_target(plan: RunPlan) -> Iterator[Finding]:
    """Look whether vLLM is known to give no states of the target's inner layers."""
    config = plan.config
    name = refused_class("vllm", config.method.name, architectures_of(config.target.model))
    if isinstance(config.engine, VllmSection) and name:
        yield Finding(
            f"{RELEASES['vllm']} gives no states of {name}: its server ends at once ({SAYS['vllm']!r}).",
            "Set engine: {name: transformers}, or use a release that gives them.",
        )


def the_method_knows_where_it_starts(plan: RunPlan) -> Iterator[Finding]:
    """Pass on what the method's section says of the folders that it names."""
    for what, advice in plan.config.method.notes:
        yield Finding(what, advice)


def _bytes_on_their_way(config: RunConfig, engine: ServedSection) -> int:
    target = read_config(config.target.model)
    capture, data = config.capture, config.data
    requests = min(engine.requests_in_flight, capture.group_size * capture.groups_in_flight)
    width = STATES_MAX * int(target.get("hidden_size") or 0) * STATE_BYTES
    return requests * (data.max_prompt_tokens + data.max_answer_tokens) * width


CHECKS: list[Check] = [
    an_early_stop_is_measured,
    the_features_find_room,
    the_target_finds_memory,
    the_mooncake_master_answers,
    kernels_can_be_compiled,
    enough_files_can_be_open,
    a_server_can_be_started,
    states_on_their_way_find_room,
    exports_take_the_draft,
    servers_draft_for_the_target,
    the_server_gives_states_of_the_target,
    the_method_knows_where_it_starts,
]

# What these look at is this machine's; the others look at the run file and the target alone.
ON_THIS_MACHINE: frozenset[Check] = frozenset(
    [
        the_features_find_room,
        the_target_finds_memory,
        the_mooncake_master_answers,
        kernels_can_be_compiled,
        enough_files_can_be_open,
        a_server_can_be_started,
        states_on_their_way_find_room,
    ]
)
