"""Seeded plays of the ledger machine's moves."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from paceline.ledger.records import Order
from paceline.testing.ledger_machine import LedgerTwins, small_blocks
from paceline.testing.ledger_moves import PICKS, WEIGHTS, LedgerMoves, Picks


def random_script(rng: random.Random, length: int) -> list[tuple[str, bytes]]:
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    return [(name, rng.randbytes(PICKS)) for name in rng.choices(names, weights, k=length)]


def play(
    folder: Path, script: Sequence[tuple[str, bytes]], *, block: int, archive_from: int, order: Order
) -> Counter[str]:
    """Make these moves on a new pair of ledgers; how often each call was made, and what was met."""
    with small_blocks(block):
        twins = LedgerTwins(folder / "ledger.db", archive_from=archive_from)
        try:
            moves = LedgerMoves(twins, order)
            for name, picks in script:
                getattr(moves, name)(Picks(picks))
        finally:
            twins.close()
    return twins.counts


def play_at_random(folder: Path, seed: int, length: int) -> Counter[str]:
    """One seeded run of `length` moves."""
    rng = random.Random(seed)
    block, archive_from = rng.choice([2, 3, 4096]), rng.choice([1, 1, 2])
    order = rng.choice([Order.ORDINAL, Order.ORDINAL, Order.ARRIVAL])
    script = random_script(rng, length)
    return play(folder, script, block=block, archive_from=archive_from, order=order)
