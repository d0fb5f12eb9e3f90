"""Groups: which prompts the ledger knows of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paceline.capture.groups import Groups
from paceline.data.source import PromptList
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.stores.sqlite import SQLiteLedger


def test_a_source_is_registered_once_and_again_when_it_has_grown(tmp_path: Path) -> None:
    """A producer that waits asks again and again. To register nothing is a change of the ledger, which would
    end its wait, and everybody else's, at once."""
    session = ProducerSession(SQLiteLedger(tmp_path / "ledger.db"), "run", "0")
    session.acquire()
    prompts = ["a", "b", "c"]
    no_encoding: Any = None
    groups = Groups(session, PromptList(prompts), no_encoding, 2)
    assert groups.make_known()
    mark = session.lsn()
    assert not groups.make_known()
    assert session.lsn() == mark
    prompts.append("d")
    assert groups.make_known()
    assert session.snapshot().prompts.known == 4
    session.ledger.close()
