"""The run file's `ledger` section: where a run's ledger is, and what of it survives power loss. No torch."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PlainSerializer

from paceline.errors import ConfigError
from paceline.ledger import server_url
from paceline.section import Section
from paceline.table import resolve

if TYPE_CHECKING:
    from paceline.ledger.image import Movable
    from paceline.ledger.ledger import Ledger
    from paceline.ledger.view import LedgerView

FILE = "ledger.db"  # of a run whose ledger is a file
ROLES_PATIENCE_S, USERS_PATIENCE_S = 60.0, 10.0  # with a server that does not answer


class LedgerSection(Section):
    """Base of each ledger's section. It opens the ledger of the run `name` in `directory`.

    `durability`, what survives power loss: "head" syncs what durable weights depend on, "full" every change.
    Both survive `kill -9` whole. With "head" the newest commits and leases may vanish in a power loss; their
    prompts are then captured again (docs/guarantees.md).
    """

    changeable: ClassVar[tuple[str, ...]] = ("*",)
    is_shared: ClassVar[bool] = False  # whether run folders on other hosts, or other runs' folders, reach it
    store: str
    durability: Literal["head", "full"] = "head"

    @abstractmethod
    def open(self, directory: Path, name: str) -> Ledger:
        """For a role; a ledger is created if there is none. Raises LedgerError, SchemaError."""

    @abstractmethod
    def view(self, directory: Path, name: str, *, waits: bool = False) -> LedgerView:
        """For reading. `waits`: for a role, which waits longer for a server than a user does.

        Raises LedgerMissingError if there is no ledger, LedgerError, SchemaError.
        """

    @abstractmethod
    def where(self, directory: Path, name: str) -> str:
        """What a message calls the ledger; no secret."""

    @abstractmethod
    def advice(self, directory: Path) -> str:
        """What to do if the ledger is not the run's, or lacks what it had."""

    def examined(self, directory: Path) -> list[str]:  # noqa: ARG002
        """Look whether a ledger may be here, without making one; what could not be verified, in words.

        Raises what a start would raise.
        """
        return []

    def movable(self, directory: Path, name: str) -> Movable:
        """The ledger's place, for copying it. Raises ConfigError if this store cannot do that."""
        raise ConfigError(
            f"{self.where(directory, name)} cannot be copied.",
            why=f"The store {self.store!r} does not offer it.",
            next="use a store that does: sqlite or redis.",
        )

    def told(self) -> dict[str, Any]:
        """The section as JSON values, without a secret, for a reader who has no run file."""
        return self.model_dump(mode="json")


class SqliteSection(LedgerSection):
    """A file in the run's directory, for processes of one host."""

    store: Literal["sqlite"] = "sqlite"

    def open(self, directory: Path, name: str) -> Ledger:  # noqa: ARG002 (the directory is its own)
        ledger: Ledger = resolve("paceline.ledger.stores.sqlite:SQLiteLedger")(
            directory / FILE, durability=self.durability
        )
        return ledger

    def view(self, directory: Path, name: str, *, waits: bool = False) -> LedgerView:  # noqa: ARG002
        view: LedgerView = resolve("paceline.ledger.stores.sqlite.view:SQLiteView")(directory / FILE)
        return view

    def examined(self, directory: Path) -> list[str]:
        resolve("paceline.ledger.stores.sqlite:refuse_place")(directory / FILE)
        return []

    def movable(self, directory: Path, name: str) -> Movable:  # noqa: ARG002
        image: Movable = resolve("paceline.ledger.stores.sqlite.image:FileImage")(directory / FILE)
        return image

    def where(self, directory: Path, name: str) -> str:  # noqa: ARG002
        return str(directory / FILE)

    def advice(self, directory: Path) -> str:
        return (
            f"put back the {FILE} (and {FILE}-wal if there is one) that belongs to {directory}, and run the "
            "same command again; or start a new run."
        )


ServerUrl = Annotated[str, AfterValidator(server_url.checked), PlainSerializer(server_url.told)]


class RedisSection(LedgerSection):
    """A ledger on a Redis or Valkey server, under the run's name, for processes of any host.

    `url`: see server_url.py; None: that of the environment. Wherever a section is shown or recorded, it has
    neither user nor password.
    """

    is_shared: ClassVar[bool] = True
    store: Literal["redis"] = "redis"
    url: ServerUrl | None = Field(default=None, repr=False)

    def open(self, directory: Path, name: str) -> Ledger:  # noqa: ARG002 (the server is the same for all)
        ledger: Ledger = _of_server("RedisLedger")(
            server_url.complete(self.url), name, durability=self.durability, patience_s=ROLES_PATIENCE_S
        )
        return ledger

    def view(self, directory: Path, name: str, *, waits: bool = False) -> LedgerView:  # noqa: ARG002
        view: LedgerView = _of_server("RedisView")(
            server_url.complete(self.url), name, patience_s=ROLES_PATIENCE_S if waits else USERS_PATIENCE_S
        )
        return view

    def examined(self, directory: Path) -> list[str]:  # noqa: ARG002
        told: list[str] = _of_server("examined")(server_url.complete(self.url), self.durability)
        return told

    def movable(self, directory: Path, name: str) -> Movable:  # noqa: ARG002
        image: Movable = _of_server("ServerImage")(server_url.complete(self.url), name)
        return image

    def where(self, directory: Path, name: str) -> str:  # noqa: ARG002
        return f"the ledger {name!r} on {self.told()['url']}"

    def advice(self, directory: Path) -> str:  # noqa: ARG002
        return (
            "check the server's address and the database's number; if the server lost its data, restore "
            "them, and run the same command again; or start a new run."
        )

    def told(self) -> dict[str, Any]:
        return {**super().told(), "url": server_url.told(server_url.complete(self.url))}


def _of_server(name: str) -> Any:
    """Of the adapter, which is imported only where a run asks for it: its library is an optional one."""
    return resolve(f"paceline.ledger.stores.redis:{name}")
