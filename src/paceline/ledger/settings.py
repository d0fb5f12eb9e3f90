"""The run file's `ledger` section."""

from __future__ import annotations

from typing import ClassVar, Literal

from paceline.section import Section


class LedgerSection(Section):
    """What survives power loss: "head" syncs what durable weights depend on, "full" every change.

    Both survive `kill -9` whole. With "head" the newest commits and leases may vanish in a power loss;
    their prompts are then captured again (docs/guarantees.md).
    """

    changeable: ClassVar[tuple[str, ...]] = ("*",)
    durability: Literal["head", "full"] = "head"
