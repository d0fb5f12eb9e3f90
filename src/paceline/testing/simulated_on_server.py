"""Simulated runs whose ledger lies on a server."""

from __future__ import annotations

from collections import Counter

from paceline.testing.simulated_places import OnServer
from paceline.testing.simulation import draw, simulate_world
from paceline.testing.valkey_server import ValkeyServer


def simulate_on(server: ValkeyServer, seed: int) -> Counter[str]:
    """One seed; what happened in it. Raises ViolationError."""
    return simulate_world(seed, draw(seed, OnServer(server)))
