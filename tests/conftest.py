"""One thread per process in all tests: the suite shares two cores, and the bits must repeat.

Tests of the ledger on a server share one real server, and take a name of their own there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from paceline.testing.valkey_server import ValkeyServer

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A server that syncs its append-only file at every change."""
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"), appendfsync="always")
    yield server
    server.stop()
