"""One thread per process in all tests: the suite shares two cores, and the bits must repeat.

Folders lie in memory: to wait for a disk's syncs shows nothing, and what a missing one loses is tested on
recorded files (tests/model). Tests of the ledger on a server share one real server, and take a name of their
own there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from paceline.testing.forked_commands import ForkedCommands
from paceline.testing.forked_templates import ForkedTemplates
from paceline.testing.valkey_server import ValkeyServer

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MEMORY = Path("/dev/shm")
ROOM = 4 << 30  # bytes; the suite has some hundred MiB there


def has_room(folder: Path) -> bool:
    """In some containers that memory is small, or nothing in it may be executed."""
    if not os.access(folder, os.W_OK):
        return False
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize > ROOM and not facts.f_flag & os.ST_NOEXEC


if has_room(MEMORY):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_configure() -> None:
    """Screens are as wide as COLUMNS says when they draw, unless it was set when they were made."""
    os.environ.pop("COLUMNS", None)
    import_module("paceline.cli.plain")


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A server that syncs its append-only file at every change."""
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


@pytest.fixture(scope="session", autouse=True)
def forked_templates() -> Iterator[ForkedTemplates]:
    """One process whose forks render all chat templates; it starts with the first of them."""
    with ForkedTemplates() as templates:
        yield templates


@pytest.fixture(scope="session")
def forked_commands(forked_templates: ForkedTemplates) -> Iterator[ForkedCommands]:
    """One process whose forks are all commands and scripts that tests start; it starts with the first."""
    with ForkedCommands(forked_templates) as commands:
        yield commands
