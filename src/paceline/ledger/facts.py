"""The keys of the facts: small values that the roles record in the ledger for each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RUN_ID = "run_id"
CONFIG = "config"
LEDGER = "ledger"  # its identity, those of ledgers that it replaced, and the run folder that it began for
PROMPTS = "prompts"  # sizes of the set at the start and after each extension, and digests of its blocks
RENDERING = "rendering"  # digest of the first group's token ids
RENDERING_DATE = "rendering_date"  # the date that a chat template writes
TARGET_PROBE = "target_probe"  # numbers of the states of a fixed prompt
TARGET_VARIES = "target_varies"  # the producers' targets differ in rounding
ENGINE = "engine"  # its name, and whether it repeats its bits
CHECKPOINT_WANTED = "checkpoint_wanted"
COMPLETED_STEP = "completed_step"
STOPPED_FLAT = "stopped_flat"  # why training ends, or ended, before the stream does
FLAT_AFTER = "flat_after"  # the step after which a curve counts as flat: training went on there
BUILDS_BEGUN = "builds_begun"
DAMAGED_CHECKPOINTS = "given_up"  # identities of recorded checkpoints that were damaged
PROBES_BEGUN = "probes_begun"
QUARANTINED_IN_A_ROW = "quarantined_in_a_row"
# Lists of [step, ranks] or [step, ranks, "sharded"]: after that step so many trained; nothing if always one.
RANKS = "ranks"
PRODUCERS_STARTED = "producers_started"  # how many `paceline train` started last
FEATURES_LIE = "features_lie"  # where the producer's feature store is
FEATURES_NAME = "features_name"  # of its folder, if another user took the usual name

_PRODUCER = "producer."  # and a worker's name: where that producer is, and what it holds


def producer_fact(worker: str) -> str:
    return f"{_PRODUCER}{worker}"


def producers_in(facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each producer said last that has neither left in good order nor was taken for dead, by worker."""
    found = {key.removeprefix(_PRODUCER): told for key, told in facts.items() if key.startswith(_PRODUCER)}
    return {worker: told for worker, told in sorted(found.items()) if isinstance(told, dict)}
