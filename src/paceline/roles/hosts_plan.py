"""HostsPlan: what a run will take on hosts that a file describes: the roles of each, what binds, how long.

`paceline plan RUN.yaml --hosts FILE` shows it (docs/at-scale.md). No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from paceline.config.run import RunConfig
from paceline.engines.vllm.settings import VllmSection
from paceline.errors import ConfigError
from paceline.features.settings import MEMORY
from paceline.roles.at_scale import Crew, Limit, Work, budget_for, limits, marks_of, samples_for
from paceline.roles.cost_plan import Told, machine_with
from paceline.roles.fit import SERVER_SHARE, budget
from paceline.roles.footprint import SampleSizes, facts_of, processes_of, sample_sizes
from paceline.roles.forecast import samples_per_step
from paceline.roles.hosts import HostSection, HostsSection
from paceline.roles.lengths import Lengths, mean_lengths
from paceline.roles.machine import Machine, this_machine
from paceline.roles.plan import plan_run, refuse_unfit_ranks
from paceline.roles.preflight import Finding
from paceline.roles.rates import Rates, data_sheet, estimated_rates, named_data_sheet, rates_of
from paceline.roles.target_at_hand import finder
from paceline.section import Section
from paceline.target.shape import TargetShape, read_shape

ROOM = 0.9  # of what binds: others that are below it by less wait for the same things


class HostTold(Section):
    """The hosts of one kind: what each does, and what goes through its network at the run's speed."""

    name: str
    count: int
    producers: int
    trainers: int
    capture_tokens_per_s: float | None
    train_tokens_per_s: float | None
    source: str
    written_mib_per_s: float
    read_mib_per_s: float


class LimitTold(Section):
    """What would limit the run alone. `share`: of it that is used at the run's speed."""

    what: str
    name: str
    samples_per_s: float
    share: float


class HostsPlan(Section):
    """Sizes in bytes, times in seconds. `network_bytes`: written and read over the whole run.

    `producers_at_once`: as many as the budget lets capture at the same time; `budget_for_all_bytes`: with
    which all of them do.
    """

    version: int = 1
    run: str
    samples: int
    passes: int
    sample_bytes_about: int
    producers: int
    trainers: int
    hosts: list[HostTold]
    limits: list[LimitTold]
    binds: str
    samples_per_s: float
    total_s: float
    network_bytes: int
    producers_at_once: int
    budget_bytes: int
    budget_for_all_bytes: int
    findings: list[Told]

    @property
    def fits(self) -> bool:
        return not any(finding.refuses for finding in self.findings)


def hosts_plan(config: RunConfig, hosts: HostsSection, *, target_config: Path | None = None) -> HostsPlan:
    """Raises ConfigError for a run file that no machine can run, or if a host's rates are unknown."""
    plan = plan_run(config, finder(target_config))
    machine = _machine_of(hosts)
    shape = read_shape(plan.config.target.model)
    lengths = mean_lengths(plan.prompts, config.data, plan.config.target.model)
    sizes = sample_sizes(plan, facts_of(plan.config, shape, machine), lengths)
    trained = config.method.num_parameters(shape.sizes)
    batch = samples_per_step(config.training, lengths)
    work = Work.of(config, plan.num_samples or 0, lengths, sizes, batch, trained)
    crews = [Crew(host, _rates(host, config, shape, lengths, trained)) for host in hosts.hosts]
    marks = marks_of(config, sizes)
    found = sorted(limits(work, hosts, crews, marks, config.ledger.store), key=lambda one: one.samples_per_s)
    speed = found[0].samples_per_s
    first_s = min(work.samples, config.method.first_samples) / sum(crew.captured(work) for crew in crews)
    moved = work.samples * work.bytes_about * (1 + work.passes) if hosts.num_hosts > 1 else 0
    return HostsPlan(
        run=config.run.name,
        samples=work.samples,
        passes=work.passes,
        sample_bytes_about=round(work.bytes_about),
        producers=hosts.producers,
        trainers=hosts.trainers,
        hosts=[_told(crew, crews, work, speed) for crew in crews],
        limits=[
            LimitTold(
                what=one.what, name=one.name, samples_per_s=one.samples_per_s, share=speed / one.samples_per_s
            )
            for one in found
        ],
        binds=found[0].what,
        samples_per_s=speed,
        total_s=first_s + work.samples / speed,
        network_bytes=round(moved),
        producers_at_once=min(hosts.producers, marks.groups_ahead),
        budget_bytes=marks.budget_bytes,
        budget_for_all_bytes=budget_for(hosts.producers, marks),
        findings=[
            Told(what=one.what, next=one.next, refuses=one.refuses)
            for one in [
                *budget(config, sizes),
                *_shared(config, hosts),
                *_ranks(config, hosts),
                *_devices(config, hosts, shape, machine, trained),
                *_advice(found, hosts, sizes, config),
            ]
        ],
    )


def _machine_of(hosts: HostsSection) -> Machine:
    """For the dtype that "auto" stands for there."""
    named = next((host.gpu for host in hosts.hosts if host.gpu), "")
    return machine_with(named) if named else this_machine()


def _rates(
    host: HostSection, config: RunConfig, shape: TargetShape, lengths: Lengths, trained: int | None
) -> Rates:
    """The host's own figures, then those of its GPU's data sheet or, where it names none, of the run file."""
    if host.gpu:
        known = estimated_rates(config, shape, lengths, named_data_sheet(host.gpu), trained)
    else:
        known = rates_of(config, shape, lengths, None, trained)
    own = host.capture_tokens_per_s, host.train_tokens_per_s
    source = "the file of hosts" if any(own) else known.source
    found = Rates(own[0] or known.capture_tokens_per_s, own[1] or known.train_tokens_per_s, None, source)
    missing = [
        name
        for name, count, rate in (
            ("capture_tokens_per_s", host.producers, found.capture_tokens_per_s),
            ("train_tokens_per_s", host.trainers, found.train_tokens_per_s),
        )
        if count and not rate
    ]
    if missing:
        raise ConfigError(
            f"How fast host {host.name} is, is unknown: {' and '.join(missing)}.",
            why="No data sheet predicts what processors do; nothing was planned.",
            next="run paceline bench RUN.yaml on such a host, and write its figures into the file of hosts; "
            "or name its gpu.",
        )
    return found


def _told(crew: Crew, crews: Sequence[Crew], work: Work, speed: float) -> HostTold:
    host = crew.host
    captured = crew.captured(work) / sum(one.captured(work) for one in crews) / host.count
    ranks = sum(one.host.count * one.host.trainers for one in crews)
    moved = speed * work.bytes_about / 2**20
    return HostTold(
        name=host.name,
        count=host.count,
        producers=host.producers,
        trainers=host.trainers,
        capture_tokens_per_s=crew.rates.capture_tokens_per_s if host.producers else None,
        train_tokens_per_s=crew.rates.train_tokens_per_s if host.trainers else None,
        source=crew.rates.source,
        written_mib_per_s=moved * captured,
        read_mib_per_s=moved * work.passes * host.trainers / ranks,
    )


def _shared(config: RunConfig, hosts: HostsSection) -> Iterator[Finding]:
    if hosts.num_hosts == 1:
        return
    for section, name, instead in (
        (config.ledger, "ledger", 'ledger: {store: redis, url: "redis://HOST:6379/0"}'),
        (config.features, "features", "features: {store: directory, directory: /a/shared/folder}"),
    ):
        if not section.is_shared:
            yield Finding(
                f"{name}.store is {section.store}, which one host has for itself, and there are "
                f"{hosts.num_hosts}.",
                f"Set {instead}.",
                refuses=True,
            )


def _ranks(config: RunConfig, hosts: HostsSection) -> Iterator[Finding]:
    try:
        refuse_unfit_ranks(config, hosts.trainers)
    except ConfigError as error:
        yield Finding(error.what, f"{error.next[:1].upper()}{error.next[1:]}", refuses=True)
    shares = {host.trainers for host in hosts.hosts if host.trainers}
    if len(shares) > 1:
        yield Finding(
            f"Hosts have {' and '.join(map(str, sorted(shares)))} ranks; torchrun starts as many on each.",
            "Give every kind of hosts that trains the same number of trainers.",
            refuses=True,
        )


def _devices(
    config: RunConfig, hosts: HostsSection, shape: TargetShape, machine: Machine, trained: int | None
) -> Iterator[Finding]:
    """Whether each host has the GPUs and the memory, and each GPU its own."""
    engine = config.engine
    of_a_producer = max(1, len(engine.devices)) if isinstance(engine, VllmSection) and engine.managed else 1
    processes = processes_of(config, shape, machine, trained)
    needed = {one.role: one.memory_bytes or 0 for one in processes}
    on_host = {one.role: one.memory_bytes or 0 for one in processes if one.device == "cpu"}
    features = config.features
    in_memory = features.in_directory and features.directory.is_relative_to(MEMORY)
    trains = needed["consumer"]
    captures = max(size for role, size in needed.items() if role != "consumer")
    for host in hosts.hosts:
        wanted = host.producers * of_a_producer + host.trainers
        if host.gpus and wanted > host.gpus:
            yield Finding(
                f"Host {host.name} has {host.gpus} GPUs, and its producers and ranks take {wanted}.",
                "Give it fewer producers or trainers.",
                refuses=True,
            )
        given = 0 if features.in_directory or not host.producers else features.host_mib(host.producers)
        shared = (features.budget_mib if in_memory else given) << 20
        taken = host.producers * on_host.get("producer", 0) + host.trainers * on_host.get("consumer", 0)
        if host.memory_gib is not None and taken + shared > host.memory_gib * 2**30:
            yield Finding(
                f"Host {host.name} has {host.memory_gib:g} GiB of memory; weights, optimizer and features in "
                f"memory take {(taken + shared) / 2**30:.1f} GiB.",
                "Give it fewer producers or trainers, or lower features.budget_mib.",
                refuses=True,
            )
        sheet = data_sheet(host.gpu) if host.gpu else None
        most = max(captures if host.producers else 0, trains if host.trainers else 0)
        if sheet and most > sheet.gigabytes * 1e9 * SERVER_SHARE:
            yield Finding(
                f"A {sheet.name} of host {host.name} has {sheet.gigabytes:g} GB, and weights and optimizer "
                f"on one take {most / 1e9:.0f} GB without activations and caches.",
                "Give the engine more devices (engine.devices), or choose a smaller or quantised target.",
                refuses=True,
            )


def _advice(
    found: Sequence[Limit], hosts: HostsSection, sizes: SampleSizes, config: RunConfig
) -> Iterator[Finding]:
    """What would make the run faster."""
    least, second = found[0], next((one for one in found[1:] if one.what != found[0].what), None)
    marks = marks_of(config, sizes)
    enough = f"features.budget_mib to {-(-budget_for(hosts.producers, marks) >> 20)}"
    if marks.budget_samples is not None:
        enough += f" and features.budget_samples to {samples_for(hosts.producers, marks)}"
    advice = {
        "capture": "Add producers; until then the trainers wait.",
        "training": "Add trainers, or lower training.passes; until then the producers wait.",
        "window": f"Set {enough}: with less, not all producers may capture at once.",
        "network": f"Spread the work of host {least.name} over more hosts, or give it a faster network.",
        "storage": "Give the shared folder more bandwidth, or lower training.passes.",
        "ledger": "Raise capture.group_size and training.batch_size: fewer calls for as many samples.",
    }[least.what]
    more = ""
    if second is not None and least.samples_per_s < ROOM * second.samples_per_s:
        more = f" Next to bind, at {second.samples_per_s:,.0f} samples/s: {second.what}."
    yield Finding(f"{least.what} binds, at {least.samples_per_s:,.0f} samples/s.{more}", advice)
