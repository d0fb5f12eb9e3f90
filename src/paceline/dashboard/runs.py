"""The runs that a dashboard shows, each read at most once in a moment, however many look."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from msgspec import Struct
from msgspec.json import encode

from paceline.errors import ConfigError, StoreError, explained
from paceline.ledger.view import LedgerView
from paceline.monitoring.history import HistoryReader, RunHistory
from paceline.monitoring.lineage import SampleLineage, StepLineage, sample_lives, step_lineage
from paceline.monitoring.schema import RunStatus
from paceline.monitoring.status import read_status
from paceline.monitoring.texts import AnswerTexts, RunTexts, Text
from paceline.roles.snapshot import has_ledger, making_sense, open_run

LIVE_S, RESTING_S, LIST_S = 1.0, 10.0, 5.0  # for how long what was read is fresh
SHOWN_MAX = 200  # runs


class RunShown(Struct, frozen=True, kw_only=True):
    """`run`: its id in addresses. `problem`: why its status is not of now, or is null."""

    run: str
    folder: str
    status: RunStatus | None = None
    problem: str = ""


class SampleShown(Struct, frozen=True, kw_only=True):
    """`problem`: why the text cannot be read; empty if it can, or if none is kept."""

    lineage: SampleLineage
    text: Text | None = None
    problem: str = ""


class _Run:
    """One run. Its readers take turns."""

    def __init__(self, directory: Path, folder: str) -> None:
        self.id = hashlib.sha256(str(directory).encode(errors="surrogateescape")).hexdigest()[:12]
        self.directory = directory
        self._folder = _plain(folder)
        self._shown = RunShown(run=self.id, folder=self._folder, problem="it was not read yet")
        self._read_at = -RESTING_S
        self._history = HistoryReader(directory)
        self._texts = RunTexts(directory)
        self._lock = Lock()

    def shown(self, *, is_open: bool) -> RunShown:
        with self._lock:
            status = self._shown.status
            is_moving = status is None or status.state == "live" or is_open
            if time.monotonic() - self._read_at >= (LIVE_S if is_moving else RESTING_S):
                self._shown = self._read()
                self._read_at = time.monotonic()
            return self._shown

    def _read(self) -> RunShown:
        try:
            if not has_ledger(self.directory):
                return RunShown(run=self.id, folder=self._folder, problem="waiting for the run to begin")
            with making_sense(self.directory):
                status = read_status(self.directory)
                encode(status)  # a foreign ledger may hold numbers and text that JSON cannot
        except Exception as error:  # noqa: BLE001 (it is shown)
            problem = _plain(f"it cannot be read now: {explained(error).what}")
            return RunShown(run=self.id, folder=self._folder, status=self._shown.status, problem=problem)
        return RunShown(run=self.id, folder=self._folder, status=status)

    @contextmanager
    def _ledger(self) -> Iterator[LedgerView]:
        with self._lock, making_sense(self.directory):
            view = open_run(self.directory)
            try:
                yield view
            finally:
                view.close()

    def history(self) -> RunHistory:
        with self._ledger() as view:
            return self._history.read(view.facts())

    def step(self, number: int) -> StepLineage:
        with self._ledger() as view:
            return step_lineage(view, number)

    def answers(self) -> AnswerTexts | None:
        with self._ledger() as view:
            return self._texts.of_measured(view.facts())

    def samples(self, sample_id: str) -> list[SampleShown]:
        with self._ledger() as view:
            facts, lives = view.facts(), sample_lives(view, sample_id)
            return [self._with_text(life, facts) for life in lives]

    def _with_text(self, life: SampleLineage, facts: Mapping[str, Any]) -> SampleShown:
        try:
            text = None if life.ordinal is None else self._texts.of_sample(life.ordinal, facts)
        except (StoreError, OSError) as error:
            return SampleShown(lineage=life, problem=_plain(explained(error).what))
        return SampleShown(lineage=life, text=text)


class Runs:
    def __init__(self, base: Path, find: Callable[[], Iterable[Path]]) -> None:
        """`find`: the directories of the runs to show. `base`: what they are named in relation to."""
        self._base, self._find = base, find
        self._known: dict[str, _Run] = {}
        self._listed_at = -LIST_S
        self._lock = Lock()

    def shown(self, opened: str = "") -> list[RunShown]:
        """All runs. `opened`: the id of the one that a browser looks at."""
        return [run.shown(is_open=run.id == opened) for run in self._listed()]

    def find(self, run: str) -> _Run:
        """Raises ConfigError if no run has this id."""
        self._listed()
        if run not in self._known:
            raise ConfigError("There is no such run here.", next="go back to the list of runs")
        return self._known[run]

    def _listed(self) -> list[_Run]:
        with self._lock:
            if time.monotonic() - self._listed_at >= LIST_S:
                known = {}
                for directory in list(self._find())[:SHOWN_MAX]:
                    run = _Run(directory, self._name(directory))
                    known[run.id] = self._known.get(run.id, run)
                self._known, self._listed_at = known, time.monotonic()
            return list(self._known.values())

    def _name(self, directory: Path) -> str:
        is_below = directory.is_relative_to(self._base)
        return str(directory.relative_to(self._base) if is_below else directory)


def _plain(text: str) -> str:
    """Without what UTF-8 cannot say, as in odd names of folders."""
    return text.encode(errors="replace").decode()
