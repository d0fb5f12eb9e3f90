"""The ledger on a server while connections break, servers die and networks part; simulated runs on it."""

from __future__ import annotations

import random
import tempfile
import uuid
from collections import Counter
from functools import partial
from pathlib import Path

from paceline.ledger.stores.redis import RedisLedger
from paceline.testing.broken_link import BrokenLink, Moment
from paceline.testing.hosts_run import CONSUMER, HOSTS, PRODUCERS, SERVER, HostsRun, Trouble
from paceline.testing.ledger_under_faults import Strikes, compare
from paceline.testing.network import Network, NoNetworkError
from paceline.testing.simulated_on_server import simulate_on
from paceline.testing.valkey_server import ValkeyServer

HISTORIES, CALLS, EACH = 40, 900, 6
DEATHS = (Moment.BEFORE, Moment.MIDWAY, Moment.AFTER)
SIMULATED, OFFSET = 600, 2_000_000
NETWORKS = 8
REPLY_S = 0.1
MEMORY = "/dev/shm"  # noqa: S108 (private folders in it)


def run(scale: float, seed: int) -> dict[str, int]:
    """Raises at the first violation, naming its seed."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for number in range(max(1, round(HISTORIES * scale))):
            one = 1000 * seed + number
            counts += strike(Path(folder), one, tuple(Moment))
            counts += strike(Path(folder), one + 500, DEATHS, kills=True)
        with ValkeyServer(Path(folder)) as server:
            first = OFFSET + seed * 10_000_000
            for number in range(first, first + max(1, round(SIMULATED * scale))):
                happened = simulate_on(server, number)
                counts["simulated runs"] += 1
                counts["simulated faults"] += sum(n for name, n in happened.items() if "fault" in name)
                with server.client() as client:
                    client.flushall()  # it is in memory, and so is everything before
    for number in range(max(1, round(NETWORKS * scale))):
        counts += part(1000 * seed + number)
    return dict(counts)


def strike(folder: Path, seed: int, moments: tuple[Moment, ...], *, kills: bool = False) -> Counter[str]:
    """One history on a server of its own, struck at every kind of call; with `kills` the server dies, too."""
    place = folder / uuid.uuid4().hex[:8]
    place.mkdir()
    with ValkeyServer(place) as server:
        link, name = BrokenLink(place / "link.sock", server.socket), uuid.uuid4().hex
        then = partial(restart, server) if kills else int
        strikes = Strikes(link, seed, moments, then=then, each=EACH)
        direct = RedisLedger(server.url, name, durability="head")
        ledger = RedisLedger(link.url(30.0 if kills else REPLY_S), name, durability="head")
        compare(ledger, seed, CALLS, strikes, direct)
        ledger.close()
        direct.close()
        link.close()
    return Counter(
        {"calls struck, the server killed" if kills else "calls struck": sum(strikes.counts.values())}
    )


def restart(server: ValkeyServer) -> None:
    server.kill()
    server.start()


def part(seed: int) -> Counter[str]:
    """One run on hosts of its own, with three troubles of the network and its server."""
    rng = random.Random(seed)
    troubles = [random_trouble(rng, 20 + 40 * number) for number in range(3)]
    try:
        network = Network(HOSTS, seed)
    except NoNetworkError:
        return Counter({"networks that this machine refused": 1})
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        run = HostsRun(network, Path(folder), troubles, jumping=frozenset({rng.choice(HOSTS[1:])}))
        try:
            run.drive()
            run.check()
        except AssertionError as violation:
            raise AssertionError(f"ledger_on_a_server.part({seed}): {violation}\n{troubles}") from violation
        finally:
            run.close()
            network.close()
    return Counter({"runs on hosts of their own": 1}) + run.counts + network.counts


def random_trouble(rng: random.Random, after: int) -> Trouble:
    lasts_s = rng.choice((0.3, 1.5, 5.0))
    if rng.random() < 0.5:
        parted = rng.choice(({PRODUCERS[1]}, {CONSUMER}, {SERVER}, {*PRODUCERS[:2]}, set(HOSTS)))
        return Trouble(after, lasts_s, frozenset(parted))
    killed = rng.random() < 0.4
    return Trouble(after, lasts_s, lost=0.05, doubled=0.1, delay_s=rng.choice((0.0, 0.05)), killed=killed)
