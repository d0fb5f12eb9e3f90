"""The run file's `ledger` section: where a run's ledger is, and what of it survives power loss. No torch."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from paceline.section import Section
from paceline.table import resolve

if TYPE_CHECKING:
    from paceline.ledger.ledger import Ledger
    from paceline.ledger.view import LedgerView

FILE = "ledger.db"  # of a run whose ledger is a file


class LedgerSection(Section):
    """Base of each ledger's section. It opens the ledger of the run `name` in `directory`.

    `durability`, what survives power loss: "head" syncs what durable weights depend on, "full" every change.
    Both survive `kill -9` whole. With "head" the newest commits and leases may vanish in a power loss; their
    prompts are then captured again (docs/guarantees.md).
    """

    changeable: ClassVar[tuple[str, ...]] = ("*",)
    store: str
    durability: Literal["head", "full"] = "head"

    @abstractmethod
    def open(self, directory: Path, name: str) -> Ledger:
        """For a role; a ledger is created if there is none. Raises LedgerError, SchemaError."""

    @abstractmethod
    def view(self, directory: Path, name: str) -> LedgerView:
        """For reading. Raises ConfigError if there is no ledger, LedgerError, SchemaError."""


class SqliteSection(LedgerSection):
    """A file in the run's directory, for processes of one host."""

    store: Literal["sqlite"] = "sqlite"

    def open(self, directory: Path, name: str) -> Ledger:  # noqa: ARG002 (the directory is its own)
        ledger: Ledger = resolve("paceline.ledger.stores.sqlite:SQLiteLedger")(
            directory / FILE, durability=self.durability
        )
        return ledger

    def view(self, directory: Path, name: str) -> LedgerView:  # noqa: ARG002
        view: LedgerView = resolve("paceline.ledger.stores.sqlite.view:SQLiteView")(directory / FILE)
        return view
