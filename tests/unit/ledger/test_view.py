"""SQLiteView: it reads whatever can be read, and writes nothing at all."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.errors import ConfigError, LedgerError, PacelineError, SchemaError
from paceline.ledger.records import State
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.ledger.stores.sqlite.view import SQLiteView
from paceline.testing.ledger_calls import Training, capture, consumer_of, id_of, producer_of

DIE_WITH_IT_OPEN = """
import os, sys
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.ledger_calls import capture, producer_of
ledger = SQLiteLedger(sys.argv[1], durability="head")
capture(producer_of(ledger), 0, 1)
os.kill(os.getpid(), 9)
"""


def crashed(folder: Path) -> Path:
    """A ledger whose only process was killed: its log lies beside it."""
    path = folder / "ledger.db"
    died = subprocess.run([sys.executable, "-c", DIE_WITH_IT_OPEN, str(path)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert path.with_name("ledger.db-wal").stat().st_size > 0
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_live_ledger_is_read_beside_its_writer(tmp_path: Path) -> None:
    """Also in the middle of a change, which it does not see and does not hold up."""
    ledger = SQLiteLedger(tmp_path / "ledger.db")
    producer = producer_of(ledger)
    capture(producer, 0, 1)
    view = SQLiteView(tmp_path / "ledger.db")
    with ledger._mutation(None):
        assert view.snapshot().committed == 2
        ledger._change("UPDATE run SET committed = 99")
        assert view.snapshot().committed == 2
    capture(producer, 2)
    assert view.snapshot() == ledger.snapshot()


def test_a_ledger_at_rest_is_read_and_nothing_is_written(tmp_path: Path) -> None:
    """No log, no index and no lock file is made."""
    ledger = SQLiteLedger(tmp_path / "ledger.db")
    capture(producer_of(ledger), 0, 1)
    training = Training(consumer_of(ledger))
    trained = training.step(0)
    training.consumer.quarantine([id_of(1)], step=None, reason="bad")
    ledger.close()
    before = contents(tmp_path)
    view = SQLiteView(tmp_path / "ledger.db")
    assert view.snapshot().usage.resident_samples == 2
    assert view.facts()["run_id"] == "run0"
    assert [r.reason for r in view.find(state=State.QUARANTINED).values()] == ["bad"]
    assert view.failed() == {}
    assert view.history(step=1) == view.history(sample_id=id_of(0)) == [trained]
    found = view.find([id_of(0)]).get(id_of(0))
    assert found is not None
    assert found.step == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize("index", ["kept", "gone"])
def test_a_crashed_ledger_is_read_with_its_log_and_nothing_is_written(tmp_path: Path, index: str) -> None:
    """What was committed is in the log alone; the next writer recovers it, not the view."""
    path = crashed(tmp_path)
    if index == "gone":  # copied without it, for instance
        path.with_name("ledger.db-shm").unlink()
    before = contents(tmp_path)
    assert SQLiteView(path).snapshot().committed == 2
    assert contents(tmp_path) == before
    assert SQLiteLedger(path).snapshot().committed == 2


LOOK = """
import os, sys
from pathlib import Path
from paceline.ledger.stores.sqlite.view import SQLiteView
os.setgid(65534), os.setuid(65534)
print(SQLiteView(Path(sys.argv[1])).snapshot().committed)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("state", ["at rest", "crashed", "live"])
def test_another_user_who_may_read_can_look(tmp_path: Path, state: str) -> None:
    """The folder is not theirs: nothing can be made in it, and nothing need be."""
    folder = Path("/tmp") / f"paceline-view-test-{os.getpid()}-{state.replace(' ', '-')}"
    folder.mkdir(mode=0o755)
    try:
        path = crashed(folder)
        ledger = None if state == "crashed" else SQLiteLedger(path)
        if ledger is not None and state == "at rest":
            ledger.close()
        for file in folder.iterdir():
            file.chmod(0o644)
        before = sorted(contents(folder))
        told = subprocess.run(
            [sys.executable, "-c", LOOK, str(path)], capture_output=True, text=True, check=False
        )
        assert told.stdout == "2\n", told.stderr
        assert sorted(contents(folder)) == before
        if ledger is not None:
            ledger.close()
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["nothing", "empty", "fifo", "folder", "loop", "text", "other", "dangling"])
def test_what_is_no_ledger_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """With advice, without waiting, and without making a file."""
    path = tmp_path / "ledger.db"
    if kind == "empty":
        path.touch()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "text":
        path.write_text("not a database at all, but long enough to be looked at " * 100)
    elif kind == "other":
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE precious (x)")
        connection.close()
    before = sorted(p.name for p in tmp_path.iterdir())
    kinds = (ConfigError, SchemaError, LedgerError)
    with pytest.raises(PacelineError) as refused:
        SQLiteView(path)
    assert isinstance(refused.value, kinds)
    assert refused.value.next
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_another_program_that_reads_a_crashed_ledger_locks_nobody_out(tmp_path: Path) -> None:
    """sqlite3 empties the log when it closes; the owner goes on with what was in it."""
    path = crashed(tmp_path)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM sample").fetchone() == (2,)
    connection.close()
    ledger = SQLiteLedger(path)
    assert [entry.place for entry in ledger.read(0, 9).entries] == [0, 1]
    capture(producer_of(ledger), 2)
    assert SQLiteView(path).snapshot().committed == 3


def test_a_view_follows_a_ledger_that_comes_to_life_and_rests_again(tmp_path: Path) -> None:
    """Each question opens the file as it finds it."""
    path = tmp_path / "ledger.db"
    SQLiteLedger(path).close()
    view = SQLiteView(path)
    ledger = SQLiteLedger(path)
    capture(producer_of(ledger), 0)
    assert view.snapshot().committed == 1
    ledger.close()
    assert view.snapshot().committed == 1
