"""The ledger on a server against the bare server, in processes of their own, over a Unix socket.

    python -m benchmarks.ledger_server [--quick]

The server syncs its append-only file every second. In a round the ledger and the bare server are measured one
after the other; the ratio is the median over rounds. The bare server gets the rows of refs, leases, intents,
plans and acks, and nothing else: no fence, no operation number, no refusal, no counter.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import count
from pathlib import Path

from benchmarks.control_plane import PROMPTS, rate, rounds
from benchmarks.ledger_workers import Counts, opened, together
from benchmarks.rows import Row, against
from paceline.ledger.records import SourceBlock
from paceline.testing.valkey_server import ValkeyServer


class Measured:
    def __init__(self, server: ValkeyServer, seconds: float) -> None:
        self._server, self._seconds, self._number = server, seconds, count()

    def _options(self, batch: int) -> dict[str, object]:
        with self._server.client() as client:
            client.flushall()
        return {"path": f"{self._server.url}#{next(self._number)}", "batch": batch, "seconds": self._seconds}

    def ours(self, batch: int) -> list[Counts]:
        options = self._options(batch)
        ledger = opened(str(options["path"]), "head")
        ledger.extend(None, [SourceBlock(0, PROMPTS, "0" * 16)])
        ledger.close()
        return together(("produce", {**options, "worker": "w"}), ("consume", options))

    def bare(self, batch: int) -> list[Counts]:
        options = self._options(batch)
        return together(("bare_produce", options), ("bare_consume", options))


def mixed(measured: Measured, repeats: int, batch: int) -> Row:
    """Refs committed and refs acked, of both processes together."""
    values, limits = rounds(repeats, lambda: rate(measured.ours(batch)), lambda: rate(measured.bare(batch)))
    return against(
        f"Valkey, everysec, producer + consumer, batch {batch}",
        values,
        limits,
        "refs/s",
        limit_name="bare server, same rows",
        goal=0.6,
        note="goal 20,000 refs/s",
    )


def run(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("PACELINE_BENCH_DIR")) as folder:
        server = ValkeyServer(Path(folder))
        try:
            measured = Measured(server, 0.6 if quick else 2.0)
            return [mixed(measured, 3 if quick else 9, batch) for batch in (32, 256)]
        finally:
            server.stop()


if __name__ == "__main__":
    print(json.dumps(run("--quick" in sys.argv), indent=1))
