"""A real Mooncake master for tests: its program, on loopback, in the network namespace of the caller.

Mooncake's clients listen on every address of their host, whatever they are told, so tests with real ones run
in a namespace of their own (`make test-mooncake`).
"""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import time
from pathlib import Path

from paceline.features.stores.mooncake.link import refusal_of

START_S = 20.0


class MooncakeMaster:
    """Running from the start; it is killed and started again under the same address."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder, self._options = folder, options
        folder.mkdir(parents=True, exist_ok=True)
        self.address = f"127.0.0.1:{_free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        spec = importlib.util.find_spec("mooncake")
        assert spec is not None, "Mooncake is installed"
        assert spec.origin is not None
        program = Path(spec.origin).with_name("mooncake_master")
        host, _, port = self.address.partition(":")
        arguments = [
            str(program),
            *(f"--rpc_address={host}", f"--rpc_port={port}", "--rpc_thread_num=2", "--max_threads=2"),
            *(f"--metrics_host={host}", f"--metrics_port={_free_port()}", "--enable_metric_reporting=false"),
            *self._options,
        ]
        with (self._folder / "master.log").open("ab") as log:
            self._process = subprocess.Popen(arguments, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while refusal_of(self.address) is not None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._folder / "master.log").read_text()[-2000:])
            time.sleep(0.02)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid


def is_alone() -> bool:
    """Whether this process is in a network namespace without a way out."""
    return [name for _, name in socket.if_nameindex()] == ["lo"]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
