"""The supervisor: it starts again what dies, as long as anything moves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from paceline import InMemoryMetadataStore
from paceline.errors import PacelineError
from paceline.ledger.trial import Trial
from paceline.roles.supervisor import Supervisor
from paceline.testing.samples import sample_ref


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Supervisor:
    """Of a run that allows two restarts; starting a role only counts."""
    supervised = object.__new__(Supervisor)
    supervised._store = InMemoryMetadataStore()  # type: ignore[assignment]
    supervised._config = SimpleNamespace(  # type: ignore[assignment]
        machine=SimpleNamespace(restarts_max=2), run=SimpleNamespace(directory=tmp_path)
    )
    supervised._restarts, supervised._progress_before = 0, None
    monkeypatch.setattr(supervised, "_start", lambda _: None)
    return supervised


def test_restarts_without_progress_come_to_an_end(supervisor: Supervisor) -> None:
    """What kills the role again and again at the same place is not waited out for ever."""
    for _ in range(2):
        supervisor._restart("consumer", -9)
    with pytest.raises(PacelineError, match=r"3 times .* without any progress"):
        supervisor._restart("consumer", -9)


def test_restarts_do_not_count_while_the_run_moves(supervisor: Supervisor) -> None:
    """A week of training may meet many kills; each with progress behind it starts the count anew."""
    for number in range(9):
        supervisor._store.commit_sample(sample_ref(number))
        supervisor._restart("producer", -9)


def test_the_search_for_a_deadly_sample_is_progress(supervisor: Supervisor) -> None:
    """It takes a death a halving; every halving brings the run closer to going on without the sample."""
    store = supervisor._store

    def dies(_: object) -> bool:
        raise KeyboardInterrupt

    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            Trial(store, "capture", list("abcdefgh")).run(dies)
        supervisor._restart("producer", -9)
