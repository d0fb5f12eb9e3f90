"""The server that a ledger lies on, without the ledger: workers that write the same rows.

As few commands as the server allows, in transactions of its own: refs, leases, intents, plans and acks, and
the stream that wakes whoever waits. No fence, no operation number, no refusal, no counter, no read before a
write. They use redis-py, or the ledger's own connection, which packs commands several times as fast.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from redis import Redis

from benchmarks.ledger_workers import WAIT_S, refs_of
from benchmarks.together import Counts, ready, timed
from paceline.ledger.stores.redis.address import Address
from paceline.ledger.stores.redis.link import Link
from paceline.types import ref_to_json


class BareServer:
    def __init__(self, path: str, through: str) -> None:
        """`through`: "connection", the ledger's own, or "redis-py"."""
        url, _, self.name = path.partition("#")
        self._link = Link(Address(url)) if through == "connection" else None
        self._redis = Redis.from_url(url)

    def key(self, table: str) -> str:
        return f"{{bare:{self.name}}}:{table}"

    def ask(self, name: str, table: str, *values: Any) -> Any:
        if self._link is None:
            return self._redis.execute_command(name, self.key(table), *values)
        return self._link.ask([_words(name, self.key(table), *values)])[0]

    def write(self, *commands: tuple[Any, ...]) -> None:
        """All of them or none."""
        if self._link is None:
            with self._redis.pipeline(transaction=len(commands) > 1) as pipeline:
                for name, table, *values in commands:
                    pipeline.execute_command(name, self.key(table), *values)
                pipeline.execute()
            return
        words = [_words(name, self.key(table), *values) for name, table, *values in commands]
        self._link.ask([["MULTI"], *words, ["EXEC"]] if len(words) > 1 else words)

    def wait_for_change(self, seen: str) -> str:
        """The newest change; "" if there was none within WAIT_S."""
        found: Any = self._redis.xread({self.key("changes"): seen}, block=int(1000 * WAIT_S))
        return found[0][1][-1][0].decode() if found else ""


def _words(*words: Any) -> list[str]:
    return [word if isinstance(word, str) else str(word) for word in words]


def _flat(pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    return [value for pair in pairs for value in pair]


def bare_produce(
    path: str, batch: int, seconds: float, through: str = "connection", number: int = 0, of: int = 1
) -> Counts:
    """The `number`-th of so many producers: each writes groups of its own."""
    server = BareServer(path, through)
    ready()
    first = number * batch

    def one() -> int:
        nonlocal first
        numbers = range(first, first + batch)
        server.write(("HSET", "lease", *_flat((n, "w") for n in numbers)))
        server.write(("HSET", "intent", *_flat((n, f"w-{n} 100") for n in numbers)))
        refs = refs_of("w", first, batch)
        server.write(
            ("HSET", "ref", *_flat((ref.sample_id, ref_to_json(ref)) for ref in refs)),
            ("ZADD", "log", *_flat((n, ref.sample_id) for n, ref in zip(numbers, refs, strict=True))),
            ("HDEL", "lease", *numbers),
            ("HDEL", "intent", *numbers),
            ("XADD", "changes", "MAXLEN", 1, "*", "n", first),
        )
        first += of * batch
        return batch

    return timed(seconds, one)


def bare_consume(path: str, batch: int, seconds: float, through: str = "connection") -> Counts:
    server = BareServer(path, through)
    ready()
    after, step, seen = 0, 0, "0"

    def one() -> int:
        nonlocal after, step, seen
        while not (ids := server.ask("ZRANGE", "log", after, after + batch - 1)):
            if not (newest := server.wait_for_change(seen)):
                return 0
            seen = newest
        server.ask("HMGET", "ref", *(one.decode() for one in ids))
        after, step = after + len(ids), step + 1
        server.write(("HSET", "plan", step, json.dumps([one.decode() for one in ids])))
        server.write(("HSET", "ack", *_flat((one.decode(), step) for one in ids)))
        return len(ids)

    return timed(seconds, one)
