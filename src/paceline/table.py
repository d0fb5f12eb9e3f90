"""Tables of components by name: our own, and those that installed packages offer as entry points.

Each kind of component has one table, beside its contract. A component is imported on its first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from paceline.errors import ConfigError
from paceline.section import nearest


class Table:
    """`own`: "module:attribute" by name. An entry point of `group` adds a name, but replaces none of ours."""

    def __init__(self, kind: str, group: str, own: Mapping[str, str]) -> None:
        self.kind, self.group, self.own = kind, group, own

    def names(self) -> list[str]:
        """All names, ours first."""
        return [*self.own, *sorted(self._offered())]

    def find(self, name: str) -> Any:
        """The component `name`. Raises ConfigError if there is none, or if it cannot be imported."""
        if name in self.own:
            return resolve(self.own[name])
        offered = self._offered()
        if name not in offered:
            raise ConfigError(
                f"There is no {self.kind} {name!r} ({nearest(name, self.names())}).",
                why=f"A name is one of ours, or an entry point {self.group!r} of an installed package.",
                next=f"choose one of: {', '.join(self.names()) or 'none yet'}; or install its package.",
            )
        entry = offered[name]
        try:
            return entry.load()
        except Exception as error:  # another package's code may raise anything
            package = entry.dist.name if entry.dist else entry.value
            raise ConfigError(
                f"The {self.kind} {name!r} of {package} cannot be loaded ({type(error).__name__}: {error}).",
                why=f"The package declares it as {entry.value}.",
                next=f"repair or remove the package {package}.",
            ) from error

    def _offered(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group) if entry.name not in self.own}


def resolve(where: str) -> Any:
    """The attribute that "module:attribute" names."""
    module, _, attribute = where.partition(":")
    return getattr(import_module(module), attribute)
