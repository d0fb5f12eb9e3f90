"""A real Mooncake master and client answer as the stand-in does: `make test-mooncake` runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mooncake.store import MooncakeDistributedStore, ReplicateConfig

from paceline.testing.mooncake_master import MooncakeMaster, is_alone
from paceline.testing.mooncake_suite import SEGMENT_MIB, SIZE, MooncakeSuite

pytestmark = pytest.mark.timeout(120)
LONG_S = 60.0

# A client that puts an object into its own memory, says so, and waits for its death.
PUTS = f"""
import ctypes, sys, time
from mooncake.store import MooncakeDistributedStore, ReplicateConfig
client, config, memory = MooncakeDistributedStore(), ReplicateConfig(), ctypes.create_string_buffer({SIZE})
config.with_hard_pin = True
assert not client.setup("127.0.0.1", "P2PHANDSHAKE", {SEGMENT_MIB} << 20, 0, "tcp", "", sys.argv[1])
client.register_buffer(ctypes.addressof(memory), {SIZE})
assert not client.upsert_from(sys.argv[2], ctypes.addressof(memory), {SIZE}, config)
print("put", flush=True)
time.sleep(600)
"""


class TestMooncakeClient(MooncakeSuite):
    @pytest.fixture(autouse=True)
    def _master(self, tmp_path: Path) -> Iterator[None]:
        assert is_alone(), "Mooncake's clients listen on all addresses: run this by `make test-mooncake`"
        self.master, self.clients = MooncakeMaster(tmp_path), list[Any]()
        yield
        for client in self.clients:
            client.close()
        self.master.kill()

    def client(self, segment_mib: int = 0) -> Any:
        client = MooncakeDistributedStore()
        given = ("127.0.0.1", "P2PHANDSHAKE", segment_mib << 20, 0, "tcp", "", self.master.address)
        assert client.setup(*given) == 0
        self.clients.append(client)
        return client

    def pinned(self) -> Any:
        config = ReplicateConfig()
        config.with_hard_pin = True
        return config

    def half(self, client: Any, key: str) -> None:
        assert client.batch_put_session_start([key], [SIZE], self.pinned()) == [0]

    def kill_master(self) -> None:
        self.master.kill()

    def start_master(self) -> None:
        self.master.start()

    def killed_client_with(self, key: str) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", PUTS, self.master.address, key], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "put\n"
            os.kill(process.pid, signal.SIGKILL)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LONG_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.1)
