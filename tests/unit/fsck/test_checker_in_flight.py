"""The checker on runs in flight: every broken promise is found and named, also where nothing is archived."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from paceline.fsck.checker import check
from paceline.testing.harm import head_file, sql, statement
from paceline.testing.run_by_hand import RunByHand


def in_flight(by_hand: RunByHand) -> list[str]:
    """Three checkpoints, then one step acked and one begun; four more samples wait."""
    ids = by_hand.capture(10)
    for at in (0, 1, 2):
        by_hand.train(ids[at : at + 1])
        by_hand.checkpoint(keep=3)
    by_hand.train(ids[3:5])
    by_hand.begin(ids[5:6])
    return ids


def rewrite_manifest(run: Path, change: Callable[[Any], None]) -> None:
    """Change the head's manifest, and have the ledger record the changed one."""
    manifest = json.loads(head_file(run, "manifest.json").read_text())
    change(manifest)
    data = json.dumps(manifest)
    head_file(run, "manifest.json").write_text(data)
    digest = sha256(data.encode()).hexdigest()
    sql(run, f"UPDATE checkpoint SET manifest_digest = '{digest}' WHERE step = 3")


def plan(step: int, *sample_ids: str) -> str:
    return f"UPDATE plan SET sample_ids = '{json.dumps(sample_ids)}' WHERE step = {step}"


HARMS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a commit is lost, and the counter with it": (
        "C1 10 prompts are done, but 9 of their samples are known",
        statement("DELETE FROM sample WHERE place = 9", "UPDATE run SET committed = 9"),
    ),
    "a sample is lost, and nobody knows": (
        "C1 lost, and no producer will capture it again: run0:s9",
        statement("UPDATE sample SET state = 'lost', resident = 0 WHERE place = 9"),
    ),
    "a provisional ack became durable": (
        "C1 durable by step 4, but the head is 3: run0:s3",
        statement("UPDATE sample SET acked = 2 WHERE sample_id = 'run0:s3'"),
    ),
    "a durable ack became provisional": (
        "C1 acked by step 3, which the head covers, but not durable: run0:s2",
        statement("UPDATE sample SET acked = 1 WHERE sample_id = 'run0:s2'"),
    ),
    "an ack is of a sample that no step trained": (
        "C1 durable, but in no step of the head's lineage: run0:s9",
        statement("UPDATE sample SET acked = 2, step = 3 WHERE sample_id = 'run0:s9'"),
    ),
    "what the head contains is as if it were not": (
        "C1 fully trained in the head's weights, and yet to be trained again: run0:s2",
        statement(
            "UPDATE sample SET acked = 0, step = NULL, state = 'present', resident = 1 WHERE place = 2",
        ),
    ),
    "features were freed with a provisional ack": (
        "C1 its features were freed before a checkpoint covered it: run0:s3",
        statement("UPDATE sample SET state = 'released', resident = 0 WHERE place = 3"),
    ),
    "a sample will be trained twice": (
        "C2 planned to be visited more than 1 times: run0:s4",
        statement(plan(5, "run0:s4", "run0:s5")),
    ),
    "what the head contains will be trained again": (
        "C2 step 5 trains it after its last visit: run0:s1",
        statement(plan(5, "run0:s1")),
    ),
    "a step will train one sample twice": ("C2 planned to be", statement(plan(5, "run0:s5", "run0:s5"))),
    "a plan is out of order": (
        "C4 step 5 visits out of log order: run0:s5",
        statement(plan(5, "run0:s6", "run0:s5")),
    ),
    "a plan names a stranger": ("C4 step 5 trains what was never committed: x", statement(plan(5, "x"))),
    "a plan in between is gone": ("C4 steps are missing", statement("DELETE FROM plan WHERE step = 4")),
    "the acked step's plan is gone": ("C4 step 4 is acked", statement("DELETE FROM plan WHERE step > 3")),
    "a checkpoint in between is forgotten": (
        "C3 checkpoint step-",
        statement("DELETE FROM checkpoint WHERE step = 2"),
    ),
    "a chain in between was edited": (
        "C3 the checkpoint of step 2 does not cover the steps on record",
        statement("UPDATE checkpoint SET chain = 'f00' WHERE step = 2"),
    ),
    "the head's manifest tells of another step": (
        "C4 checkpoint step-",
        lambda run: rewrite_manifest(run, lambda m: m["lineage"][0][2][0].__setitem__(1, "run0:s9")),
    ),
    "the head's manifest tells of another place": (
        "C1 checkpoint step-",
        lambda run: rewrite_manifest(run, lambda m: m["lineage"][0][2][0].__setitem__(0, 9)),
    ),
    "the head's manifest tells of a visit still to come": (
        "C2 checkpoint step-",
        lambda run: rewrite_manifest(run, lambda m: m["lineage"][0][2][0].__setitem__(3, False)),
    ),
    "the head's manifest lacks its lineage": (
        "C4 checkpoint step-",
        lambda run: rewrite_manifest(run, lambda m: m.update(lineage=[])),
    ),
    "the head follows another checkpoint": (
        "C3 checkpoint step-",
        lambda run: rewrite_manifest(run, lambda m: m.update(previous="step-1")),
    ),
    "a generation was given twice": (
        "C9 generation 9 has two owners: run0:s8, run0:s9",
        statement("UPDATE sample SET generation = 9, ref = replace(ref, ':10,', ':9,') WHERE place = 9"),
    ),
    "a present sample's bytes are not kept": (
        "C9 present, yet the feature store should not hold its bytes: run0:s9",
        statement("UPDATE sample SET resident = 0 WHERE place = 9"),
    ),
    "a sample is of another prompt": (
        "C8 places that are not the ordinals of the prompts: run0:s9",
        statement("UPDATE sample SET ordinal = 11 WHERE place = 9"),
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_every_harm_in_flight_is_found_and_named(by_hand: RunByHand, harm: str) -> None:
    """With the ids it concerns; nothing was folded yet, and nothing hides behind a checkpoint."""
    in_flight(by_hand)
    assert check(by_hand.folder).errors == []
    by_hand.ledger.close()
    told, do = HARMS[harm]
    do(by_hand.folder)
    errors = check(by_hand.folder).errors
    assert any(error.startswith(told) for error in errors), errors
