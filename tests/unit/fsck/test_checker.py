"""The checker: every broken promise is found, by the rule that names it."""

from __future__ import annotations

import json
import lzma
import random
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import apsw
import pytest

from paceline.fsck.checker import check
from paceline.testing.harm import head_file, one, sql, sql_unchecked, statement
from paceline.testing.light_run import LightRun, RunShape

SHAPE = RunShape(prompts=20, group=4, batch=3, passes=2, interval=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run: most of its history folded, two checkpoints kept."""
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
    """Everything is counted, folded history included."""
    report = check(finished)
    assert report.errors == []
    assert (report.counts["samples"], report.counts["steps"], report.counts["head_step"]) == (20, 14, 14)
    assert report.counts["folded_samples"] > 0


LIVE = "(SELECT max(seq) FROM sample)"


def harm_folded(kind: str, change: Callable[[list[object]], object]) -> Callable[[Path], None]:
    """Rewrite the first folded block of a kind, digest and all."""

    def harm(run: Path) -> None:
        db = apsw.Connection(str(run / "ledger.db"))
        first, content = next(
            iter(db.execute("SELECT first, content FROM folded WHERE kind = ? ORDER BY first", (kind,)))
        )
        block = json.loads(lzma.decompress(content))
        change(block)
        data = json.dumps(block).encode()
        db.execute(
            "UPDATE folded SET content = ?, digest = ? WHERE kind = ? AND first = ?",
            (lzma.compress(data), sha256(data).hexdigest(), kind, first),
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
    "a commit is lost": ("C8", statement(f"DELETE FROM sample WHERE seq = {LIVE}")),
    "a step's plan changed": ("C3", plan_without_its_last),
    "a step was trained twice": (
        "C2",
        harm_folded("steps", lambda block: block[1].__setitem__(3, block[0][3])),  # type: ignore[index]
    ),
    "a folded step is gone": ("C4", harm_folded("steps", lambda block: block.pop(1))),
    "steps were swapped": (
        "C3",
        harm_folded("steps", lambda b: (b[0].__setitem__(3, b[1][3]), b[1].__setitem__(3, b[0][3]))),  # type: ignore[index]
    ),
    "a durable ack is gone": ("C1", statement("DELETE FROM ack WHERE step = (SELECT max(step) FROM ack)")),
    "an ack is of another step": ("C2", statement("UPDATE ack SET step = step - 1 WHERE step = 14")),
    "an ack is of nobody": ("C1", statement("INSERT INTO ack VALUES ('light:99', 3, 1)")),
    "an ack is durable beyond the head": ("C1", statement("UPDATE ack SET step = 99 WHERE step = 14")),
    "features freed too early": (
        "C1",
        statement(f"DELETE FROM ack WHERE sample_id = (SELECT sample_id FROM sample WHERE seq = {LIVE})"),
    ),
    "a trained sample is waited for": (
        "C1",
        statement(f"UPDATE sample SET state = 'lost' WHERE seq = {LIVE}"),
    ),
    "quarantine without a reason": (
        "C1",
        statement(f"UPDATE sample SET state = 'quarantined' WHERE seq = {LIVE}"),
    ),
    "a chain was edited": ("C3", statement("UPDATE checkpoint SET chain = 'f00' || chain")),
    "a head of another manifest": ("C5", statement("UPDATE checkpoint SET manifest_digest = 'f00'")),
    "a weight's bit flipped": ("C5", lambda run: flip(run, "weights.bin")),
    "a manifest's bit flipped": ("C5", lambda run: flip(run, "manifest.json")),
    "a checkpoint's file is gone": ("C5", lambda run: head_file(run, "weights.bin").unlink()),
    "the head's folder is gone": ("C5", lambda run: shutil.rmtree(head_file(run, "weights.bin").parent)),
    "a folded block's bit flipped": (
        "C8 the folded tasks 0 to 19 are damaged",
        statement(
            "UPDATE folded SET content = CAST(substr(content, 1, 70) || x'00' || substr(content, 72) AS BLOB)"
        ),
    ),
    "the log's counter is off": ("C8", statement("UPDATE run SET last_seq = last_seq + 1")),
    "the prompts' counter is off": ("C8", statement("UPDATE run SET num_tasks = num_tasks + 1")),
    "a generation will be used again": ("C9", statement("UPDATE run SET next_generation = 3")),
    "committed bytes are promised": (
        "C9",
        statement(f"INSERT INTO intent SELECT generation, sample_id, 1 FROM sample WHERE seq = {LIVE}"),
    ),
    "a step is acked that was never planned": ("C4", statement("UPDATE run SET trained_step = 77")),
    "an ack went missing from two steps": ("C2", statement("UPDATE ack SET step = 13")),
    "a folded sample is live again": (
        "C8",
        statement(
            "INSERT INTO sample (seq, sample_id, state, resident, bytes, ref) "
            "VALUES (1, 'light:0', 'released', 0, 0, '{\"sample_id\": \"light:0\", \"estimated_bytes\": 0}')"
        ),
    ),
    "a sample has two places": (
        "C2 samples have two places in the log: light:0",
        harm_folded("samples", lambda b: b["sample_id"].__setitem__(1, "light:0")),
    ),  # type: ignore[call-overload,index]
    "a folded block of steps is gone": ("C4", statement("DELETE FROM folded WHERE kind = 'steps'")),
    "a folded block of samples is gone": ("C8", statement("DELETE FROM folded WHERE kind = 'samples'")),
    "a folded block has another place": (
        "C8",
        statement("UPDATE folded SET last = last + 1 WHERE kind = 'samples'"),
    ),
    "a folded sample was never acked there": (
        "C2",
        harm_folded("samples", lambda b: b["step"].__setitem__(0, 9)),
    ),  # type: ignore[call-overload,index]
    "a folded step has another revision": ("C3", harm_folded("steps", lambda b: b[0].__setitem__(1, 1))),  # type: ignore[index]
    "a block of prompts is gone": ("C8", statement("DELETE FROM folded WHERE kind = 'tasks'")),
    "history is folded beyond a checkpoint": ("C8", statement("UPDATE run SET folded_step = 14")),
    "folded history is counted short": ("C8", statement("UPDATE run SET folded_seq = 1")),
    "the next prompt is none of the run's": ("C8", statement("UPDATE run SET next_ordinal = 21")),
    "the log went back": ("C8", statement("UPDATE run SET lsn = 1")),
    "the acked step fell behind the head": ("C4", statement("UPDATE run SET trained_step = 3")),
    "a checkpoint is of another place in the log": (
        "C5",
        statement("UPDATE checkpoint SET last_seq = last_seq - 1 WHERE step = 14"),
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
    "freed bytes are still counted": ("C9", statement(f"UPDATE sample SET resident = 1 WHERE seq = {LIVE}")),
    "a ref is another sample's": (
        "C9",
        statement(f"UPDATE sample SET ref = replace(ref, 'light:', 'other:') WHERE seq = {LIVE}"),
    ),
    "an intent is of the future": ("C9", statement("INSERT INTO intent VALUES (999, 'light:99', 1)")),
    "a block of samples is there twice": (
        "C8 seq 1 is folded twice: light:0",
        statement(
            "INSERT INTO folded SELECT kind, first + 99, last + 99, digest, content FROM folded "
            "WHERE kind = 'samples'"
        ),
    ),
    "a row is none that the schema allows": (
        "C1 in a state that there is not: light:19",
        lambda run: sql_unchecked(run, f"UPDATE sample SET state = 'odd' WHERE seq = {LIVE}"),
    ),
    "pages belong to nothing": (
        "C8 the database is damaged: *** in database main *** Page",
        lambda run: sql_unchecked(run, "DELETE FROM sqlite_schema WHERE name = 'sample_resident'"),
    ),
    "a table is gone": ("C8", lambda run: sql_unchecked(run, "DROP TABLE ack")),
    "no database": ("C8", lambda run: (run / "ledger.db").write_bytes(b"x" * 5000) and None),
}


@pytest.mark.parametrize("harm", HARMS)
def test_every_harm_is_found(run: Path, harm: str) -> None:
    """By the rule that names it; others may speak up as well."""
    rule, do = HARMS[harm]
    do(run)
    errors = check(run).errors
    assert any(error.startswith(rule) for error in errors), errors


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
