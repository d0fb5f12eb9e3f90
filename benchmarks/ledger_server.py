"""The ledger on a server against the bare server, in processes of their own, over a Unix socket.

    python -m benchmarks.ledger_server [--quick]

The server syncs its append-only file every second. In a round the ledger and the bare server (bare_server.py)
are measured one after the other; the ratio is the median over rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

from benchmarks.bare_server import bare_consume, bare_produce
from benchmarks.control_plane import PROMPTS, rounds
from benchmarks.ledger_workers import consume, opened, produce
from benchmarks.rows import Row, against
from benchmarks.together import Counts, rate, together
from paceline.ledger.records import SourceBlock
from paceline.testing.valkey_server import ValkeyServer


class Measured:
    """Fresh ledgers, one after another, on the server that is measured."""

    def __init__(self, server: ValkeyServer, seconds: float) -> None:
        self._server, self.seconds, self._number = server, seconds, count()
        self.told = ""  # of the last measurement: processor time and bytes of each ref

    def path(self) -> str:
        """Of an empty ledger, on a server that holds nothing else."""
        with self._server.client() as client:
            client.flushall()
        return f"{self._server.url}#{next(self._number)}"

    def ledger(self) -> str:
        """Of a ledger that knows its prompts."""
        path = self.path()
        ledger = opened(path, "head")
        ledger.extend(None, [SourceBlock(0, PROMPTS, "0" * 16)])
        ledger.close()
        return path

    def ours(self, batch: int, producers: int = 1) -> list[Counts]:
        """The producers' counts, then the consumer's."""
        options = {"path": self.ledger(), "batch": batch, "seconds": self.seconds}
        makers = [(produce, {**options, "worker": f"w{number}"}) for number in range(producers)]
        return self._written(lambda: together(*makers, (consume, options)))

    def bare(self, batch: int, producers: int = 1, through: str = "connection") -> list[Counts]:
        options = {"path": self.path(), "batch": batch, "seconds": self.seconds, "through": through}
        makers = [(bare_produce, {**options, "number": n, "of": producers}) for n in range(producers)]
        return self._written(lambda: together(*makers, (bare_consume, options)))

    def _written(self, work: Callable[[], list[Counts]]) -> list[Counts]:
        before = self._server.append_only_file.stat().st_size, self._processor_seconds()
        counts = work()
        num_bytes = self._server.append_only_file.stat().st_size - before[0]
        refs = sum(one["refs"] for one in counts[:-1])
        clients = sum(one["processor_seconds"] for one in counts)
        server = self._processor_seconds() - before[1]
        self.told = f"{1e6 * clients / refs:.0f} + {1e6 * server / refs:.0f} us, {num_bytes / refs:.0f} bytes"
        return counts

    def _processor_seconds(self) -> float:
        with self._server.client() as client:
            spent = client.info("cpu")
        return float(spent["used_cpu_user_main_thread"] + spent["used_cpu_sys_main_thread"])


def mixed(measured: Measured, repeats: int, batch: int) -> Row:
    """Refs committed and refs acked, of both processes together."""
    told_of: dict[str, str] = {}

    def told(name: str, counts: list[Counts]) -> float:
        told_of[name] = measured.told
        return rate(counts)

    values, limits, usual = rounds(
        repeats,
        lambda: told("ours", measured.ours(batch)),
        lambda: told("bare", measured.bare(batch)),
        lambda: rate(measured.bare(batch, through="redis-py")),
    )
    return against(
        f"Valkey, everysec, producer + consumer, batch {batch}",
        values,
        limits,
        "refs/s",
        limit_name="bare server, same rows and connection",
        goal=0.6,
        note=f"goal 20,000 refs/s; bare server through redis-py {statistics.median(usual):,.0f} refs/s; "
        f"a ref takes (clients + server, append-only file) {told_of['ours']}; bare {told_of['bare']}",
    )


def run(quick: bool) -> list[Row]:
    with (
        tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")) as folder,
        ValkeyServer(Path(folder), appendfsync="everysec", auto_aof_rewrite_percentage="0") as server,
    ):
        measured = Measured(server, 0.6 if quick else 2.0)
        return [mixed(measured, 3 if quick else 9, batch) for batch in (32, 256)]


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
