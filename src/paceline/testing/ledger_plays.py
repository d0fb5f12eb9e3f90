"""Seeded plays of the ledger machine's moves."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from paceline.ledger.records import Order
from paceline.testing.ledger_machine import LedgerTwins
from paceline.testing.ledger_moves import PICKS, WEIGHTS, LedgerMoves, Picks
from paceline.testing.ledger_subjects import Subject


def random_script(rng: random.Random, length: int) -> list[tuple[str, bytes]]:
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    return [(name, rng.randbytes(PICKS)) for name in rng.choices(names, weights, k=length)]


def play(subject: Subject, script: Sequence[tuple[str, bytes]], order: Order) -> Counter[str]:
    """Make these moves on both ledgers; how often each call was made, and what was met."""
    twins = LedgerTwins(subject)
    try:
        moves = LedgerMoves(twins, order)
        for name, picks in script:
            getattr(moves, name)(Picks(picks))
    finally:
        twins.close()
    return twins.counts


def play_at_random(subject: Subject, seed: int, length: int) -> Counter[str]:
    """One seeded run of `length` moves."""
    rng = random.Random(seed)
    subject.block_size, subject.archive_from = rng.choice([2, 3, 4096]), rng.choice([1, 1, 2])
    order = rng.choice([Order.ORDINAL, Order.ORDINAL, Order.ARRIVAL])
    return play(subject, random_script(rng, length), order)
