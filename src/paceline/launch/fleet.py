"""Fleet: the hosts of a run, what each needs, and the run file of a host that does not keep the run's folder.

One host, or several ranks' hosts, train; further producers join from anywhere. Settings that cannot work over
several hosts are refused before anything is queued.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from paceline.config.load import load_run_config, read_sections
from paceline.config.run import RunConfig
from paceline.engines.served.settings import ServedSection
from paceline.errors import ConfigError
from paceline.features.settings import MEMORY, SharedMemorySection
from paceline.roles.plan import refuse_unfit_ranks
from paceline.section import without_secrets

WRITERS_MIB = 1024  # of /dev/shm beside the budget: what a server writes before it is stored
CUDA = "cuda:"
LEAST = {"hosts": 1, "producers": 0, "gpus": 0, "memory_gib": 1}


@dataclass(frozen=True)
class Needs:
    """What one host asks for. `memory_mib`: with what lies in its /dev/shm, `shm_mib`."""

    processors: int
    gpus: int
    memory_mib: int
    shm_mib: int


@dataclass(frozen=True)
class Fleet:
    """`hosts` train, with `machine.trainers` ranks each; so many `producers` join them.

    `gpus`: of each host that trains; None: as many as the run file names. `memory_gib`: of each host, besides
    what lies in /dev/shm.
    """

    run_file: Path
    config: RunConfig
    sections: dict[str, Any]
    hosts: int = 1
    producers: int = 0
    gpus: int | None = None
    memory_gib: int = 16

    @classmethod
    def of(cls, run_file: Path, **given: int | None) -> Fleet:
        """`given`: the numbers; None: as by default. Raises ConfigError for settings that cannot work so."""
        numbers = {name: number for name, number in given.items() if number is not None}
        for name, number in numbers.items():
            if number < LEAST[name]:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {number}.",
                    next=f"give at least {LEAST[name]}, or leave it out.",
                )
        fleet = cls(run_file, load_run_config(run_file), read_sections(run_file), **numbers)
        fleet._refuse()
        return fleet

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def is_wide(self) -> bool:
        """Whether processes on several hosts work at the run."""
        return self.hosts > 1 or self.producers > 0

    # -- what each needs ---------------------------------------------------------------------

    @property
    def trainer(self) -> Needs:
        machine = self.config.machine
        captures = machine.producers if self.hosts == 1 else 1
        threads = machine.trainers * machine.consumer_threads + captures * machine.producer_threads
        devices = [self.config.training.device, *self._engine_devices()]
        first = _number(self.config.training.device)
        named = [_number(device) + 1 for device in devices if device.startswith(CUDA)]
        ranks = [first + machine.trainers] if self.config.training.device.startswith(CUDA) else []
        gpus = max([0, *named, *ranks]) if self.gpus is None else self.gpus
        return self._needs(threads, gpus)

    @property
    def producer(self) -> Needs:
        """Of one that joins, on a host of its own."""
        named = [device for device in self._engine_devices() if device.startswith(CUDA)]
        auto = "auto" in self._engine_devices() and self.trainer.gpus > 0
        return self._needs(self.config.machine.producer_threads, len(named) or int(auto))

    def _needs(self, processors: int, gpus: int) -> Needs:
        features = self.config.features
        in_memory = features.in_directory and features.directory.is_relative_to(MEMORY)
        shm = (features.budget_mib if in_memory else 0) + WRITERS_MIB
        given = 0 if features.in_directory else features.host_mib(self.config.machine.producers)
        return Needs(processors, gpus, (self.memory_gib << 10) + shm + given, shm)

    def _engine_devices(self) -> list[str]:
        engine = self.config.engine
        if isinstance(engine, ServedSection):
            return [f"{CUDA}{number}" for number in getattr(engine, "devices", ())]
        return [str(getattr(engine, "device", "cpu"))]

    # -- the run file of the others ----------------------------------------------------------

    def sections_elsewhere(self) -> str:
        """The run file of a host that keeps only its own locks and logs, as YAML, without its section `run`.

        A producer that joins sees its own GPUs alone, counted from 0; another device changes no bit.
        """
        rest = {name: values for name, values in self.sections.items() if name != "run"}
        engine = dict(rest.get("engine") or {})
        if str(engine.get("device", "")).startswith(CUDA):
            engine["device"] = f"{CUDA}0"
        if engine.get("devices"):
            engine["devices"] = list(range(len(engine["devices"])))
        if engine:
            rest["engine"] = engine
        return yaml.safe_dump(rest, sort_keys=False)

    def section_elsewhere(self, folder: str) -> dict[str, Any]:
        """Its section `run`."""
        return {"name": self.name, "seed": self.config.run.seed, "directory": folder}

    # -- what cannot work, and what the user should know -----------------------------------------

    def notes(self) -> Iterator[str]:
        device = "training.device" if self.config.training.device == "auto" else ""
        device = device or ("engine.device" if "auto" in self._engine_devices() else "")
        if device and self.gpus is None and not self.trainer.gpus:
            yield f"{device} is auto, so no GPUs are asked for: add --gpus N, or set it to cuda:0"
        if not self.config.ledger.is_shared:
            yield (
                f"the ledger is a file in {self.config.run.directory}, on a local disk: the job goes "
                "on only on the host that has it. With ledger.store: redis it goes on on any host"
            )
        elif not self.is_wide and not self._outlives_a_host():
            yield "a job that goes on on another host captures again what was not yet in a checkpoint"
        if self.hosts > 1 and self.config.machine.producers > self.producers + 1:
            yield (
                f"machine.producers is {self.config.machine.producers}, and the first of several hosts "
                f"starts one: add --producers {self.config.machine.producers - 1}"
            )
        if self.hosts > 1:
            yield (
                "torchrun, gloo and NCCL open ports without passwords on the network of the hosts that "
                "train: use one that you trust (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
            )

    def _outlives_a_host(self) -> bool:
        """Whether what was captured is there for a job that goes on on another host."""
        features = self.config.features
        return not (isinstance(features, SharedMemorySection) or features.ends_with_producers)

    def _refuse(self) -> None:
        config = self.config
        if (url := getattr(config.ledger, "url", None)) and without_secrets(url) != url:
            raise ConfigError(
                "ledger.url holds a user or a password.",
                why="More users can read a job's script than the run file. Nothing was written.",
                next="take them out of ledger.url and set PACELINE_REDIS_USER and PACELINE_REDIS_PASSWORD.",
            )
        refuse_unfit_ranks(config, self.hosts * config.machine.trainers)
        if not self.is_wide:
            return
        if not config.ledger.is_shared:
            raise ConfigError(
                f"ledger.store is {config.ledger.store}, a file of one host, and the run is to use several.",
                why="Hosts that do not see the ledger cannot work at the run. Nothing was written.",
                next='set ledger: {store: redis, url: "redis://HOST:6379/0"} (docs/operations.md).',
            )
        if not config.features.is_shared:
            raise ConfigError(
                f"features.store is {config.features.store}, the memory of one host, and the run is to use "
                "several.",
                why="A host cannot read the memory of another one. Nothing was written.",
                next="set features: {store: directory, directory: /a/folder/that/all/hosts/mount}.",
            )
        if config.features.in_directory and config.features.directory.is_relative_to(MEMORY):
            raise ConfigError(
                f"features.directory {config.features.directory} lies in the memory of each host.",
                why="The run is to use several hosts, and they would see different folders.",
                next="set features.directory to a folder that all hosts mount.",
            )
        self._refuse_loopback(str(url or ""))
        self.refuse_a_server_nearby()

    def refuse_a_server_nearby(self) -> None:
        """Raise ConfigError if each producer is to find the engine's server on its own host."""
        url = getattr(self.config.engine, "url", None)
        if url and _is_loopback(urlsplit(url).hostname or ""):
            raise ConfigError(
                f"engine.url {url} is an address of one host alone.",
                why="A producer elsewhere looks for the server on its own host; nothing starts one there.",
                next="set engine.managed: true, so that each producer starts a server, or name one that all "
                "hosts reach.",
            )

    def _refuse_loopback(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "unix" and not _is_loopback(parts.hostname or ""):
            return
        raise ConfigError(
            f"ledger.url {url} is an address of one host alone.",
            why="The run is to use several hosts, and each would look for the ledger on itself.",
            next="set ledger.url to redis://HOST:6379/0, with a name that all hosts know.",
        )


def quoted(value: object) -> str:
    """As one word of bash, in printable ASCII, whatever it is: a name of a file may hold any byte but NUL."""
    text = str(value)
    if text.isascii() and text.replace("\n", "").isprintable():
        return shlex.quote(text)
    return "$'" + "".join(_escaped(byte) for byte in os.fsencode(text)) + "'"


def _escaped(byte: int) -> str:
    plain = chr(byte).isprintable() and byte < 0x7F and chr(byte) not in "\\'"
    return chr(byte) if plain else f"\\x{byte:02x}"


def _number(device: str) -> int:
    return int(device.removeprefix(CUDA)) if device.startswith(CUDA) else 0


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
