"""Whole runs whose processes and ledger are on hosts of their own, while the network between them fails.

The hosts are network namespaces, and packets pass through this process. A machine that allows neither says
so; what a client does with a broken connection is proven without them, in test_ledger_over_a_broken_link.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.testing.hosts_run import CONSUMER, HOSTS, PRODUCERS, SERVER, HostsRun, Trouble
from paceline.testing.network import Network, NoNetworkError


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        made = Network(HOSTS)
    except NoNetworkError as refused:
        pytest.skip(f"this machine makes no network namespaces for this user: {refused}")
    yield made
    made.close()


def run_through(
    network: Network, folder: Path, *troubles: Trouble, jumping: frozenset[str] = frozenset()
) -> HostsRun:
    """The run, driven to its end and checked: all troubles struck."""
    run = HostsRun(network, folder, troubles, jumping=jumping)
    try:
        run.drive()
        run.check()
    finally:
        run.close()
    assert run.counts["troubles that struck"] == len(troubles)
    return run


def test_whoever_is_cut_off_goes_on_when_the_network_is_back(network: Network, memory: Path) -> None:
    """The server, everybody, the trainer, a producer; for longer than a client waits, and for less.

    In this order, for without one producer the others end a short run before the next trouble comes.
    """
    server, trainer, producer = (frozenset({name}) for name in (SERVER, CONSUMER, PRODUCERS[0]))
    parts = [server, frozenset(HOSTS), trainer, producer]
    troubles = [Trouble(15 + 12 * n, 0.3 if n % 2 else 3.0, apart) for n, apart in enumerate(parts)]
    run = run_through(network, memory, *troubles)
    assert network.counts["packets between parted hosts"]
    assert run.counts["gave up, and was started again"]


def test_packets_may_be_lost_doubled_and_late(network: Network, memory: Path) -> None:
    """And overtake each other, while the server is killed and one host's clock is hours off and jumps."""
    bad = Trouble(5, 4.0, lost=0.04, doubled=0.1, delay_s=0.03)
    run_through(network, memory, bad, Trouble(60, 0.5, killed=True), jumping=frozenset({PRODUCERS[1]}))
    assert min(network.counts["packets lost"], network.counts["packets doubled"]) > 0
