"""The run folder knows its ledger: an empty, another or an older one is noticed at a start."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest

from paceline.errors import LedgerError
from paceline.ledger.facts import LEDGER
from paceline.ledger.ledger import Ledger
from paceline.ledger.place import FILE, known, note, opened, record, viewed
from paceline.ledger.settings import SqliteSection
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.ledger.view import LedgerView


def start(folder: Path, changes: int = 0) -> tuple[Ledger, list[str]]:
    """The ledger of the run in `folder`, after so many changes; and what its opening told."""
    told: list[str] = []
    ledger = opened(SqliteSection(), folder, "run", tell=told.append)
    for number in range(changes):
        ledger.set_facts(None, {"change": number})
    return ledger, told


def test_a_ledger_has_one_identity_for_all_roles_and_starts(tmp_path: Path) -> None:
    """The fact and the file say the same."""
    identities = set()
    for _ in range(2):
        ledger, told = start(tmp_path)
        identities.add(ledger.facts()[LEDGER]["identity"])
        ledger.close()
        assert told == []
    place = known(tmp_path)
    assert place is not None
    assert identities == {place.identity}


def test_a_run_whose_ledger_is_gone_does_not_begin_anew(tmp_path: Path) -> None:
    """Nor is there a new file in its place, over whose log a backup would be laid."""
    start(tmp_path)[0].close()
    (tmp_path / "ledger.db").unlink()
    with pytest.raises(LedgerError, match=r"not the ledger that .* tells of, but empty: .*ledger\.db"):
        start(tmp_path)
    assert not [name for name in ("ledger.db", "ledger.db-wal") if (tmp_path / name).exists()]


def test_another_ledger_in_its_place_is_refused(tmp_path: Path) -> None:
    """Of a run of the same name and settings, too."""
    start(tmp_path / "one")[0].close()
    start(tmp_path / "two")[0].close()
    shutil.copy(tmp_path / "two" / "ledger.db", tmp_path / "one" / "ledger.db")
    with pytest.raises(LedgerError, match="tells of, but another one"):
        start(tmp_path / "one")


def test_an_older_copy_is_noticed(tmp_path: Path) -> None:
    """Recovery then decides from the checkpoints whether it can go on; the next start tells nothing."""
    start(tmp_path, 1)[0].close()
    shutil.copy(tmp_path / "ledger.db", tmp_path / "backup.db")
    ledger, _ = start(tmp_path, 3)
    note(tmp_path, ledger.position())
    older, newer = ledger.lsn() - 3, ledger.lsn()
    ledger.close()
    (tmp_path / "backup.db").rename(tmp_path / "ledger.db")
    ledger, [told] = start(tmp_path)
    assert f"has {older} changes, and had {newer}" in told
    ledger.close()
    assert start(tmp_path)[1] == []


def test_changes_that_no_disk_has_for_certain_are_not_missed(tmp_path: Path) -> None:
    """A power failure may take them: only what was noted counts."""
    start(tmp_path)[0].close()
    shutil.copy(tmp_path / "ledger.db", tmp_path / "backup.db")
    start(tmp_path, 5)[0].close()
    (tmp_path / "backup.db").rename(tmp_path / "ledger.db")
    assert start(tmp_path)[1] == []


def test_a_whole_copy_becomes_the_run_folders_ledger(tmp_path: Path) -> None:
    """Its log is its own; from now on it is compared with itself."""
    ledger, _ = start(tmp_path, 5)
    note(tmp_path, ledger.position())
    with pytest.raises(LedgerError, match="another one"):
        opened(SqliteSection(), moved(tmp_path), "run")
    copy = SQLiteLedger(tmp_path / "copy" / "ledger.db")
    copy.set_facts(None, ledger.facts())
    record(SqliteSection(), tmp_path, "run", copy)
    place = known(tmp_path)
    assert place is not None
    assert place.position == str(copy.lsn())
    assert copy.lsn() < ledger.lsn()


def moved(folder: Path) -> Path:
    """A folder that knows this run's ledger, and has another one."""
    other = folder / "other"
    start(other)[0].close()
    shutil.copy(folder / FILE, other / FILE)
    return other


class SharedSection(SqliteSection):
    """A ledger that every run folder reaches, as one on a server."""

    is_shared: ClassVar[bool] = True

    def open(self, directory: Path, name: str) -> Ledger:
        return super().open(directory.parent / "server", name)

    waited: ClassVar[list[bool]] = []

    def view(self, directory: Path, name: str, *, waits: bool = False) -> LedgerView:
        self.waited.append(waits)
        return super().view(directory.parent / "server", name)


def test_two_runs_of_one_name_do_not_share_a_ledger_by_accident(tmp_path: Path) -> None:
    """A producer may join from another folder, and a run may be moved with its file."""
    opened(SharedSection(), tmp_path / "first", "run").close()  # and is about to bind its settings
    with pytest.raises(LedgerError, match=r"is that of the run in .*first, and .*second knows nothing of it"):
        opened(SharedSection(), tmp_path / "second", "run")
    opened(SharedSection(), tmp_path / "joined", "run", joins=True).close()
    (tmp_path / "first").rename(tmp_path / "moved")
    opened(SharedSection(), tmp_path / "moved", "run").close()


def test_of_two_runs_of_one_name_that_begin_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw a new ledger. Only the one that gave it its identity goes on."""
    opened(SharedSection(), tmp_path / "first", "run").close()
    facts, before = SQLiteLedger.facts, [dict[str, Any]()]
    monkeypatch.setattr(SQLiteLedger, "facts", lambda ledger: before.pop() if before else facts(ledger))
    with pytest.raises(LedgerError, match=r"is that of the run in .*first, and .*second knows nothing of it"):
        opened(SharedSection(), tmp_path / "second", "run")
    assert known(tmp_path / "second") is None
    opened(SharedSection(), tmp_path / "third", "run", joins=True).close()


def test_a_role_waits_longer_for_a_server_than_a_user_does(tmp_path: Path) -> None:
    """A restarted role must survive the server's restart as a running one does; a user wants an answer."""
    SharedSection.waited.clear()
    for _ in range(2):
        opened(SharedSection(), tmp_path / "run", "run").close()
    viewed(SharedSection(), tmp_path / "run", "run")
    assert SharedSection.waited == [True, False]


def test_a_run_file_that_names_another_store_is_refused(tmp_path: Path) -> None:
    """After a copy to a server the old file is still there, and it is the older one."""
    start(tmp_path)[0].close()
    place = known(tmp_path)
    assert place is not None
    moved = {**asdict(place), "section": {"store": "redis", "url": "redis://cave:6379/0"}}
    (tmp_path / FILE).write_text(json.dumps(moved))
    with pytest.raises(LedgerError, match=r"store redis; the run file says sqlite.*store to redis"):
        start(tmp_path)


def test_what_a_server_does_not_say_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on, and its user knows what was not verified."""
    monkeypatch.setattr(SQLiteLedger, "unverified", ("appendfsync",))
    assert start(tmp_path)[1] == ["not verified: appendfsync"]


def test_a_damaged_position_is_told(tmp_path: Path) -> None:
    """It is text that only the ledger understands."""
    start(tmp_path)[0].close()
    note(tmp_path, "far")
    with pytest.raises(LedgerError, match=r"ledger\.json cannot be read \(.*'far'"):
        start(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"section": 1, "name": "r", "identity": "i"}', "[" * 10000]
)
def test_a_damaged_file_is_not_taken_for_a_first_start(tmp_path: Path, content: str) -> None:
    """Else an empty ledger would do."""
    start(tmp_path)[0].close()
    (tmp_path / FILE).write_text(content)
    with pytest.raises(LedgerError, match=r"ledger\.json cannot be read"):
        start(tmp_path)
