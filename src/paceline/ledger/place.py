"""Opens a run's ledger, and refuses one that is not the run folder's: `ledger.json`.

The file says where the ledger is, which one it is, and how far it was when the last head was recorded. A
ledger gets its identity when it is first opened, as a fact. So a ledger that is empty, another one, or older
than the folder is noticed at a start, also where nothing of an earlier process is left. An older one of the
same identity goes on: recovery rolls it forward from the checkpoints, or refuses it (training/recovery.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from paceline.durable_files import make_folder, sync_folder, write_file
from paceline.errors import LedgerError, LedgerMissingError
from paceline.ledger.facts import LEDGER
from paceline.ledger.ledger import Ledger
from paceline.ledger.locks import advising
from paceline.ledger.settings import LedgerSection, SqliteSection
from paceline.ledger.table import LEDGERS
from paceline.ledger.view import LedgerView
from paceline.regular_files import read_regular

FILE = "ledger.json"
BYTES_MAX = 1 << 16


@dataclass(frozen=True)
class Known:
    """`section`: of the run file, without user and password. `position`: a durable one; "" for none."""

    section: dict[str, Any]
    name: str
    identity: str
    position: str = ""

    @property
    def is_file(self) -> bool:
        """Whether the ledger is a file of the run's folder."""
        return self.section.get("store") == SqliteSection().store

    def where(self, directory: Path) -> str:
        """What a message calls the ledger; no secret."""
        return self._section().where(directory, self.name)

    def view(self, directory: Path) -> LedgerView:
        """The ledger, for reading. Raises ConfigError, LedgerError, also if it is another ledger."""
        return self.looked_at(self._section(), directory)

    def _section(self) -> LedgerSection:
        found: LedgerSection = LEDGERS.find(str(self.section.get("store"))).parse(self.section)
        return found

    def looked_at(self, section: LedgerSection, directory: Path, *, waits: bool = False) -> LedgerView:
        """The ledger where the section says. Raises LedgerError unless the run folder knows it."""
        if (store := self.section.get("store")) != section.store:
            raise LedgerError(
                f"{directory / FILE} names the ledger's store {store}; the run file says {section.store}.",
                why="A ledger that is left in another store is older than the run's. Nothing was changed.",
                next=f"set ledger.store to {store} in the run file.",
            )
        view, facts = None, dict[str, Any]()
        with suppress(LedgerMissingError):
            view = section.view(directory, self.name, waits=waits)
            facts = view.facts()
        found = facts.get(LEDGER)
        if found is None or self.identity not in (found["identity"], *found["replaces"]):
            where, what = section.where(directory, self.name), "empty" if found is None else "another one"
            if view is not None:
                view.close()
            raise LedgerError(
                f"This is not the ledger that {directory / FILE} tells of, but {what}: {where}.",
                why="A run that goes on with another ledger trains samples again. Nothing was changed.",
                next=section.advice(directory),
            )
        assert view is not None, "it has facts"
        return view


def known(directory: Path) -> Known | None:
    """What the run folder knows of its ledger; None if nothing. Raises LedgerError, OSError."""
    path = directory / FILE
    try:
        return msgspec.json.decode(read_regular(path, BYTES_MAX), type=Known)
    except FileNotFoundError:
        return None
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> LedgerError:
    return LedgerError(
        f"{path} cannot be read ({error}).",
        why="It says which ledger is the run's. Nothing was changed.",
        next="put the file back from a backup of the run's folder.",
    )


def viewed(section: LedgerSection, directory: Path, name: str) -> LedgerView:
    """The run's ledger, for reading. Raises as `Known.looked_at` does."""
    place = known(directory)
    return section.view(directory, name) if place is None else place.looked_at(section, directory)


def opened(
    section: LedgerSection,
    directory: Path,
    name: str,
    *,
    joins: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Ledger:
    """The run's ledger, for a role. `joins`: the run may have begun in another folder.

    Raises LedgerError if it is not the ledger that the folder knows, or that of a run in another folder.
    """
    with advising(str(directory)):
        make_folder(directory)
    with _alone(directory):
        before = known(directory)
        if before is not None:  # before a ledger is created where there was one
            before.looked_at(section, directory, waits=True).close()
        ledger = section.open(directory, name)
        try:
            found = _identified(ledger, section, directory, joins=joins or before is not None)
            now = Known(section.told(), name, found["identity"], "" if before is None else before.position)
            for what in ledger.unverified:
                tell(f"not verified: {what}")
            if missing := _missing(ledger, now.position, directory):
                now = replace(now, position="")
                tell(
                    f"{missing.removesuffix('.')}. The run goes on from its newest checkpoint if the ledger "
                    "can be rolled forward to it; what was captured, failed or quarantined since is captured "
                    "and judged again"
                )
            if now != before:
                _write(directory, now)
        except BaseException:
            ledger.close()
            raise
    return ledger


def _missing(ledger: Ledger, position: str, directory: Path) -> str:
    try:
        return ledger.missing_since(position) if position else ""
    except ValueError as error:
        raise _damaged(directory / FILE, error) from error


def record(section: LedgerSection, directory: Path, name: str, ledger: Ledger) -> None:
    """Make `ledger`, a whole copy of the run's ledger, the one that the run folder knows."""
    with _alone(directory):
        found = _identified(ledger, section, directory, joins=True)
        _write(directory, Known(section.told(), name, found["identity"], ledger.position()))


def note(directory: Path, position: str) -> None:
    """The ledger has durably reached this position. A note that cannot be written is one check less."""
    with suppress(LedgerError, OSError), _alone(directory):
        before = known(directory)
        if before is not None:
            _write(directory, replace(before, position=position))


def _identified(ledger: Ledger, section: LedgerSection, directory: Path, *, joins: bool) -> dict[str, Any]:
    """The ledger's fact about itself; it is given one if it has none."""
    here = f"{socket.gethostname()}:{directory.absolute()}"
    found: dict[str, Any] | None = ledger.facts().get(LEDGER)
    if found is None:
        own = {"identity": secrets.token_hex(16), "replaces": [], "folder": here}
        found = ledger.set_facts(None, {LEDGER: own}, settle=True)[LEDGER]  # one of two starts at this moment
    if section.is_shared and not joins and found["folder"] != here:
        raise LedgerError(
            f"The ledger is that of the run in {found['folder']}, and {directory} knows nothing of it.",
            why="Two runs of one name on one server would take each other's place. Nothing was changed.",
            next="if it is one run, add a producer to it with `paceline produce RUN.yaml --join`; else set "
            f"another run.name. If the run was moved here (or begun there in vain), move its {FILE} with it.",
        )
    return found


def _write(directory: Path, now: Known) -> None:
    path = directory / FILE
    aside = path.with_name(FILE + ".new")
    with advising(str(path)):
        write_file(aside, (json.dumps(asdict(now), indent=1) + "\n").encode())
        aside.rename(path)
        sync_folder(directory)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Both roles of a run may start, or note, at the same time."""
    with advising(str(directory)):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except BaseException:
            os.close(fd)
            raise
    try:
        yield
    finally:
        os.close(fd)
