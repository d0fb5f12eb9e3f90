"""An error of one rank, as a record that another rank raises again.

Isolation must act alike whichever rank a sample fails on: so the class and the text stay what they were. Of a
library's own class the nearest of Python's classes is raised.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator

import msgspec

from paceline import errors
from paceline.errors import PacelineError

TEXT_MAX = 4000


class ToldError(msgspec.Struct, omit_defaults=True):
    """`kinds`: the names of its classes, nearest first. A PacelineError has its three parts."""

    kinds: list[str]
    what: str
    why: str = ""
    next: str = ""


def told(error: Exception) -> ToldError:
    kinds = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, Exception)]
    if isinstance(error, PacelineError):
        return ToldError(kinds, error.what[:TEXT_MAX], error.why[:TEXT_MAX], error.next[:TEXT_MAX])
    [said] = error.args if len(error.args) == 1 and isinstance(error.args[0], str) else [str(error)]
    return ToldError(kinds, said[:TEXT_MAX])


def raised_again(record: ToldError, rank: int) -> Exception:
    """The error, with a note on the rank that it comes from."""
    error = _built(record)
    error.add_note(f"on rank {rank}")
    return error


def _built(record: ToldError) -> Exception:
    for kind in _known(record.kinds):
        try:
            if issubclass(kind, PacelineError):
                return kind(record.what, why=record.why, next=record.next)
            return kind(record.what)
        except TypeError:  # a class whose errors are not made from a text
            continue
    return RuntimeError(record.what)


def _known(names: list[str]) -> Iterator[type[Exception]]:
    for name in names:
        for module in (errors, builtins):
            kind = getattr(module, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                yield kind
