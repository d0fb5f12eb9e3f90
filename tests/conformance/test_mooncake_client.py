"""The stand-in answers as Mooncake does: `make test-mooncake` gives a real master the same suite."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from paceline.testing.mooncake_stand_in import Object, ReplicateConfig, StandInClient, StandInMaster
from paceline.testing.mooncake_suite import SIZE, MooncakeSuite


class TestStandInClient(MooncakeSuite):
    @pytest.fixture(autouse=True)
    def _master(self) -> None:
        self.master, self.made = StandInMaster(), 0

    def client(self, segment_mib: int = 0) -> Any:
        self.made += 1
        return StandInClient(self.master, f"client-{self.made}", segment_mib << 20)

    def pinned(self) -> Any:
        return ReplicateConfig(with_hard_pin=True)

    def half(self, client: Any, key: str) -> None:
        self.master.objects[key] = Object(bytearray(SIZE), client.name, whole=False)

    def kill_master(self) -> None:
        self.master.kill()

    def start_master(self) -> None:
        self.master.start()

    def killed_client_with(self, key: str) -> None:
        killed, memory = self.client(16), ctypes.create_string_buffer(SIZE)
        assert killed.upsert_from(key, ctypes.addressof(memory), SIZE, self.pinned()) == 0
        killed.kill()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        self.master.expire()
        assert condition()
