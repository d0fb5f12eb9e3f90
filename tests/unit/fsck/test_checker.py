"""The checker: every broken promise is found, by the rule that names it."""

from __future__ import annotations

import json
import lzma
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import apsw
import pytest

from paceline.fsck.checker import check, check_view
from paceline.ledger.stores.sqlite.view import SQLiteView
from paceline.testing.harm import head_file, one, sql, sql_unchecked, statement
from paceline.testing.light_run import LightRun, RunShape

SHAPE = RunShape(prompts=20, group=4, batch=3, passes=2, interval=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run: most of its history archived, two checkpoints kept."""
    run = LightRun(tmp_path_factory.mktemp("finished"), SHAPE)
    run.produce()
    run.consume()
    return run.folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to be harmed."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_sound(finished: Path) -> None:
    """Everything is counted, archived history included."""
    report = check(finished)
    assert report.errors == []
    assert (report.counts["samples"], report.counts["steps"], report.counts["head_step"]) == (20, 14, 14)
    assert report.counts["archived_samples"] > 0


LIVE = "(SELECT max(place) FROM sample)"


def harm_archive(change: Callable[[list[Any]], object]) -> Callable[[Path], None]:
    """Rewrite the first archived block of steps, digest and all."""

    def harm(run: Path) -> None:
        db = apsw.Connection(str(run / "ledger.db"))
        [(first, content)] = db.execute("SELECT first, content FROM archive ORDER BY first LIMIT 1")
        block = json.loads(lzma.decompress(content))
        change(block)
        data = json.dumps(block).encode()
        db.execute(
            "UPDATE archive SET content = ?, digest = ? WHERE first = ?",
            (lzma.compress(data), sha256(data).hexdigest(), first),
        )
        db.close()

    return harm


def flip(run: Path, name: str) -> None:
    path = head_file(run, name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def plan_without_its_last(run: Path) -> None:
    ids = json.loads(str(one(run, "SELECT sample_ids FROM plan ORDER BY step DESC")))
    sql(
        run,
        f"UPDATE plan SET sample_ids = '{json.dumps(ids[:-1])}' WHERE step = (SELECT max(step) FROM plan)",
    )


HARMS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a commit is lost": ("C8", statement(f"DELETE FROM sample WHERE place = {LIVE}")),
    "a step's plan changed": ("C3", plan_without_its_last),
    "a step was trained twice": ("C2", harm_archive(lambda block: block[1].__setitem__(2, block[0][2]))),
    "an archived step is gone": ("C4", harm_archive(lambda block: block.pop(1))),
    "steps were swapped": (
        "C3",
        harm_archive(lambda b: (b[0].__setitem__(2, b[1][2]), b[1].__setitem__(2, b[0][2]))),
    ),
    "a durable ack is gone": (
        "C1",
        statement("UPDATE sample SET acked = 0, step = NULL WHERE step = (SELECT max(step) FROM sample)"),
    ),
    "an ack is of another step": ("C2", statement("UPDATE sample SET step = step - 1 WHERE step = 14")),
    "an ack is durable beyond the head": ("C1", statement("UPDATE sample SET step = 99 WHERE step = 14")),
    "features freed too early": ("C1", statement(f"UPDATE sample SET acked = 0 WHERE place = {LIVE}")),
    "a trained sample is waited for": (
        "C1",
        statement(f"UPDATE sample SET state = 'lost', acked = 0 WHERE place = {LIVE}"),
    ),
    "quarantine without a reason": (
        "C1",
        statement(f"UPDATE sample SET state = 'quarantined' WHERE place = {LIVE}"),
    ),
    "a prompt failed without a reason": (
        "C1 failed without a reason: prompt 3",
        statement("INSERT INTO prompt (ordinal, state) VALUES (3, 'failed')"),
    ),
    "a chain was edited": ("C3", statement("UPDATE checkpoint SET chain = 'f00' || chain")),
    "a head of another manifest": ("C5", statement("UPDATE checkpoint SET manifest_digest = 'f00'")),
    "a weight's bit flipped": ("C5", lambda run: flip(run, "weights.bin")),
    "a manifest's bit flipped": ("C5", lambda run: flip(run, "manifest.json")),
    "a checkpoint's file is gone": ("C5", lambda run: head_file(run, "weights.bin").unlink()),
    "the head's folder is gone": ("C5", lambda run: shutil.rmtree(head_file(run, "weights.bin").parent)),
    "an archived block's bit flipped": (
        "C8 the archived steps",
        statement(
            "UPDATE archive SET "
            "content = CAST(substr(content, 1, 70) || x'00' || substr(content, 72) AS BLOB)"
        ),
    ),
    "the log's counter is off": ("C8", statement("UPDATE run SET committed = committed + 1")),
    "the prompts' counter is off": ("C8", statement("UPDATE run SET num_prompts = num_prompts + 1")),
    "a block of the source is gone": ("C8", statement("DELETE FROM source")),
    "a generation will be used again": ("C9", statement("UPDATE run SET next_generation = 3")),
    "committed bytes are promised": (
        "C9",
        statement(
            "INSERT INTO intent (generation, sample_id, bytes) "
            f"SELECT generation, sample_id, 1 FROM sample WHERE place = {LIVE}"
        ),
    ),
    "a step is acked that was never planned": ("C4", statement("UPDATE run SET trained_step = 77")),
    "an archived sample is live again": (
        "C8",
        statement(
            "INSERT INTO sample (place, ordinal, sample_id, state, resident, acked, step, ref) VALUES "
            "(0, 0, 'light:0', 'released', 0, 2, 2, '{\"sample_id\": \"light:0\", \"estimated_bytes\": 0}')"
        ),
    ),
    "an archived block of steps is gone": ("C4", statement("DELETE FROM archive")),
    "an archived block has another place": ("C8", statement("UPDATE archive SET last = last + 1")),
    "an archived block finishes fewer samples": (
        "C8",
        statement("UPDATE archive SET finished = finished - 1"),
    ),
    "an archived sample is finished twice": ("C2", harm_archive(lambda b: b[0][2][0].__setitem__(3, 1))),
    "an archived sample has another place": ("C4", harm_archive(lambda b: b[0][2][0].__setitem__(0, 9))),
    "an archived step has another revision": ("C3", harm_archive(lambda b: b[0].__setitem__(1, 1))),
    "history is archived beyond a checkpoint": ("C8", statement("UPDATE run SET archived_step = 14")),
    "archived history is counted short": ("C8", statement("UPDATE run SET archived = 1")),
    "the next prompt is none of the run's": ("C8", statement("UPDATE run SET next_ordinal = 21")),
    "the log went back": ("C8", statement("UPDATE run SET lsn = 1")),
    "the acked step fell behind the head": ("C4", statement("UPDATE run SET trained_step = 3")),
    "a checkpoint is of another place in the log": (
        "C5",
        statement("UPDATE checkpoint SET first_place = first_place - 1 WHERE step = 14"),
    ),
    "a checkpoint's chain was emptied": ("C5", statement("UPDATE checkpoint SET chain = ''")),
    "fewer passes were configured": (
        "C2",
        statement("INSERT OR REPLACE INTO fact VALUES ('config', '{\"training.passes\": 1}')"),
    ),
    "more passes were configured": (
        "C2",
        statement("INSERT OR REPLACE INTO fact VALUES ('config', '{\"training.passes\": 3}')"),
    ),
    "freed bytes are still counted": (
        "C9",
        statement(f"UPDATE sample SET resident = 1 WHERE place = {LIVE}"),
    ),
    "a ref is another sample's": (
        "C9",
        statement(f"UPDATE sample SET ref = replace(ref, 'light:', 'other:') WHERE place = {LIVE}"),
    ),
    "an intent is of the future": (
        "C9",
        statement("INSERT INTO intent (generation, sample_id, bytes) VALUES (999, 'light:99', 1)"),
    ),
    "a sample is of another prompt": (
        "C8 places that are not the ordinals of the prompts",
        statement(f"UPDATE sample SET ordinal = 3 WHERE place = {LIVE}"),
    ),
    "a row is none that the schema allows": (
        "C1 in an unknown state: light:19",
        lambda run: sql_unchecked(run, f"UPDATE sample SET state = 'odd' WHERE place = {LIVE}"),
    ),
    "pages belong to nothing": (
        "C8 the database is damaged: *** in database main *** Page",
        lambda run: sql_unchecked(run, "DELETE FROM sqlite_schema WHERE name = 'prompt_pending'"),
    ),
    "a table is gone": ("C8", lambda run: sql_unchecked(run, "DROP TABLE plan")),
    "no database": ("C8", lambda run: (run / "ledger.db").write_bytes(b"x" * 5000) and None),
}


@pytest.mark.parametrize("harm", HARMS)
def test_every_harm_is_found(run: Path, harm: str) -> None:
    """By the rule that names it; others may speak up as well."""
    rule, do = HARMS[harm]
    do(run)
    errors = check(run).errors
    assert any(error.startswith(rule) for error in errors), errors


# What a view does not tell: rows of prompts, intents, blocks of the archive, and the database's own state.
NOT_VIEWED = {
    *("a commit is lost", "the log's counter is off", "the prompts' counter is off"),
    *("a block of the source is gone", "the next prompt is none of the run's"),
    *("committed bytes are promised", "an intent is of the future", "a sample is of another prompt"),
    *("an archived sample is live again", "an archived block has another place"),
    *("an archived block finishes fewer samples", "an archived block's bit flipped"),
    *("history is archived beyond a checkpoint", "archived history is counted short"),
    *("a row is none that the schema allows", "pages belong to nothing", "a table is gone", "no database"),
}


@pytest.mark.parametrize("harm", [name for name in HARMS if name not in NOT_VIEWED])
def test_harm_to_a_ledger_that_is_no_file_is_found_through_a_view(run: Path, harm: str) -> None:
    """Samples, steps, checkpoints, generations and counters: by the same rules."""
    rule, do = HARMS[harm]
    do(run)
    errors = check_view(SQLiteView(run / "ledger.db"), run).errors
    assert any(error.startswith(rule) for error in errors), errors


def test_through_a_view_the_counters_are_held_against_what_they_count(finished: Path) -> None:
    """A server's functions keep each of them on their own; a ledger that never rests is not judged."""
    view = SQLiteView(finished / "ledger.db")
    told = view.snapshot()
    assert check_view(view, finished).errors == []
    usage = replace(told.usage, resident_samples=3, provisional_samples=2, resident_bytes=5)
    prompts = replace(told.prompts, failed=7)
    off = replace(told, usage=usage, prompts=prompts, lost=1, quarantined=4, committed=0)
    view.snapshot = lambda: off  # type: ignore[method-assign]
    found = "\n".join(check_view(view, finished).errors)
    for counter in ("3 resident", "5 resident bytes", "2 provisional", "1 lost", "4 samples in", "7 failed"):
        assert f"C8 the ledger counts {counter}" in found
    lsns = count()
    view.snapshot = lambda: replace(told, lsn=next(lsns))  # type: ignore[method-assign]
    assert "keeps changing" in check_view(view, finished).unchecked


def test_any_bit_of_the_ledger_may_flip_and_the_checker_says_so_or_stays_right(run: Path) -> None:
    """It never raises; what it calls sound still has every sample, step and checkpoint."""
    whole, path = check(run).counts, run / "ledger.db"
    data = path.read_bytes()
    rng = random.Random(0)
    found = 0
    for _ in range(150):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        report = check(run)
        assert report.errors or report.unchecked or report.counts == whole
        found += bool(report.errors or report.unchecked)
    assert found > 5, "some of them hit what matters"


def test_it_never_writes(run: Path) -> None:
    """No file changes by being looked at, and none appears, however the verdict."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    check(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    flip(run, "weights.bin")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert check(run).errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
