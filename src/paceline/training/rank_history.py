"""Which steps of a run were trained by how many ranks: a fact of its ledger, for people.

The number of ranks decides no sample and no batch, only the order in which gradients are summed.
"""

from __future__ import annotations

from typing import Any

from paceline.ledger.consumer_session import ConsumerSession
from paceline.ledger.facts import RANKS

SHARDED = "sharded"


def record_ranks(session: ConsumerSession, step: int, ranks: int, *, sharded: bool = False) -> int:
    """From the step after `step` on there are so many ranks; returns how many there were before, 0 if none.

    A run that never had more than one rank records nothing. `sharded`: they divide the weights among them,
    and sum the norm of the gradients in another order.
    """
    known: list[list[Any]] = session.facts().get(RANKS) or []
    kept = [change for change in known if change[0] < step]
    before = kept[-1][1] if kept else int(step > 0)
    now = [ranks, SHARDED] if sharded else [ranks]
    changed = [*kept, [step, *now]] if now != (kept[-1][1:] if kept else [1]) else kept
    if changed != known:
        session.set_facts({RANKS: changed})
    return before
