"""The ranks that train: the consumer is rank 0, `consumer-1` rank 1, with lock, events and log of that name.

Rank 0 alone is the run's consumer: it has the ledger's session and writes the checkpoints. The supervisor
starts all ranks of this host together, and sees them as one child: if one of them ends, all do.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from pathlib import Path

from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.roles.workers import CONSUMER
from paceline.training.link import Place

LISTENS = "PACELINE_RANKS_FD"  # the descriptor of the socket at which rank 0 waits for the others
RANK, RANKS = "RANK", "WORLD_SIZE"  # these and the following are torchrun's names
ON_HOST, RANKS_ON_HOST, ADDRESS, PORT = "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
# Of launchers that leave LOCAL_RANK out: the number on the host, and of which rank among how many.
OF_OTHERS = (
    ("SLURM_LOCALID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
LOOPBACK = "127.0.0.1"


def role_of_rank(rank: int) -> str:
    return f"{CONSUMER}-{rank}" if rank else CONSUMER


def trainer_roles(config: RunConfig) -> list[str]:
    """The ranks that `paceline train` starts."""
    return [role_of_rank(rank) for rank in range(config.machine.trainers)]


def known_ranks(directory: Path) -> list[str]:
    """Every rank but 0 that ever was on this host: each has left its lock."""
    numbers = [path.stem.removeprefix(f"{CONSUMER}-") for path in directory.glob(f"{CONSUMER}-*.lock")]
    return [role_of_rank(rank) for rank in sorted(int(number) for number in numbers if number.isdecimal())]


def place_in(environment: Mapping[str, str]) -> Place | None:
    """This process's place among the ranks; None if it trains alone. Raises ConfigError."""
    if RANK not in environment or environment.get(RANKS, "1") == "1":
        return None
    names = (RANK, RANKS, PORT)
    try:
        rank, ranks, port = (int(environment[name]) for name in names)
        meet_here = _is_loopback(environment.get(ADDRESS, LOOPBACK))
        on_host = _number_on_host(environment, rank, ranks)
        if meet_here and on_host is None:
            on_host = rank
        told = environment.get(RANKS_ON_HOST, str(ranks) if meet_here else None)
        ranks_on_host = None if told is None else int(told)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"The environment names a rank, but not where the ranks meet ({error}).",
            why=f"Each rank needs {', '.join(names)} and {ADDRESS}, as torchrun sets them.",
            next="torchrun --nproc-per-node 2 -m paceline consume RUN.yaml; or unset RANK to train alone.",
        ) from error
    listens = environment.get(LISTENS)
    return Place(
        rank,
        ranks,
        environment.get(ADDRESS, LOOPBACK),
        port,
        on_host,
        ranks_on_host,
        None if listens is None else int(listens),
    )


def _number_on_host(environment: Mapping[str, str], rank: int, ranks: int) -> int | None:
    """What the launcher of this rank says; None if it says nothing.

    Ranks that somebody starts by hand in a job's shell all have the shell's number.
    """
    if ON_HOST in environment:
        return int(environment[ON_HOST])
    for name, of, among in OF_OTHERS:
        if (environment.get(of), environment.get(among)) == (str(rank), str(ranks)) and name in environment:
            return int(environment[name])
    return None


def _is_loopback(address: str) -> bool:
    """Whether ranks that meet there must all be on one host."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def without_place(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is no rank, whatever its parent is."""
    names = (RANK, RANKS, ON_HOST, RANKS_ON_HOST, ADDRESS, PORT, LISTENS)
    return {
        name: value
        for name, value in environment.items()
        if name not in names and not name.startswith("TORCHELASTIC_")
    }


class MeetingPoint:
    """Where the ranks of one attempt on this host meet: a port of the loopback address that the kernel chose.

    Rank 0 inherits the socket, which listens already, so no other process can have taken the port meanwhile.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._socket = socket.create_server((LOOPBACK, 0), backlog=ranks)

    def environment(self, rank: int) -> dict[str, str]:
        told: dict[str, str | int] = {
            RANK: rank,
            RANKS: self._ranks,
            ON_HOST: rank,
            RANKS_ON_HOST: self._ranks,
            ADDRESS: LOOPBACK,
            PORT: self._socket.getsockname()[1],
        }
        if rank == 0:
            told[LISTENS] = self._socket.fileno()
        return {name: str(value) for name, value in told.items()}

    def descriptors(self, rank: int) -> list[int]:
        """What that rank's process inherits."""
        return [] if rank else [self._socket.fileno()]

    def close(self) -> None:
        self._socket.close()
