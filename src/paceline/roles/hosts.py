"""The file of `paceline plan RUN --hosts FILE`: which hosts there are, and what each does. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from paceline.config.load import read_sections
from paceline.errors import ConfigError
from paceline.section import Count, Section, problems

Positive = Annotated[float, Field(gt=0.0, le=1e9)]
Processes = Annotated[int, Field(ge=0, le=4096)]


class HostSection(Section):
    """`count` hosts of one kind, each with so many `producers` and `trainers` (ranks).

    `gpu`: the name of a data sheet, from which the rates of one producer and one rank are estimated, unless
    they are given: `capture_tokens_per_s`, `train_tokens_per_s`, as in the run file's `costs`. Without both,
    the run file's own figures count. `network_gbit_per_s`: of one host, in each direction.
    """

    name: Annotated[str, Field(min_length=1, max_length=64)]
    count: Count = 1
    producers: Processes = 0
    trainers: Processes = 0
    gpu: str = ""
    gpus: Processes = 0
    memory_gib: Positive | None = None
    network_gbit_per_s: Positive = 10.0
    capture_tokens_per_s: Positive | None = None
    train_tokens_per_s: Positive | None = None


class HostsSection(Section):
    """`storage_gbit_per_s`: of the folder that all hosts share, read and written together; None: its hosts'
    networks are what limits it. `ledger_samples_per_s`: what the ledger's host can do, if it was measured."""

    hosts: Annotated[tuple[HostSection, ...], Field(min_length=1)]
    storage_gbit_per_s: Positive | None = None
    ledger_samples_per_s: Positive | None = None

    @model_validator(mode="after")
    def _somebody_works(self) -> HostsSection:
        for role in ("producers", "trainers"):
            if not any(getattr(host, role) for host in self.hosts):
                raise ValueError(f"no host has {role}")
        return self

    @property
    def num_hosts(self) -> int:
        return sum(host.count for host in self.hosts)

    @property
    def producers(self) -> int:
        return sum(host.count * host.producers for host in self.hosts)

    @property
    def trainers(self) -> int:
        return sum(host.count * host.trainers for host in self.hosts)


def read_hosts(path: Path) -> HostsSection:
    """Raises ConfigError."""
    try:
        return HostsSection.model_validate(read_sections(path))
    except (ConfigError, ValidationError) as error:
        told = (
            problems(error, HostsSection) if isinstance(error, ValidationError) else [error.what.rstrip(".")]
        )
        raise ConfigError(
            f"{path} describes no hosts: {'; '.join(told)}.",
            next="docs/at-scale.md has an example; mend the file and run the same command again.",
        ) from error
