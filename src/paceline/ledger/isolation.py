"""Which members of a batch kill the process that works on it: found over as many restarts as it takes.

A batch that failed is tried in halves, and halves of halves, with the result thrown away. What is
about to be tried is written down first, so a process that dies of it convicts it: its successor finds
the isolation where it stood. A death may be chance (the process was killed), so it takes two to
convict a single member. An error is no chance and counts at once. Nothing is decided about members that
are not found guilty: the batch then goes on as planned, and its weights are those it always had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paceline.ledger.session import Session

DEATHS_BEFORE_ISOLATION = 3
DEATHS_TO_CONVICT = 2


class Isolation:
    def __init__(self, session: Session, name: str, members: Sequence[str]) -> None:
        """Takes up the isolation of this name and these members where an earlier process left it.

        `name` is a producer's own (it carries the worker's name), or of one step.
        """
        self._session = session
        self._fact = f"isolation.{name}"
        left = session.facts().get(self._fact)
        if left is None or left["members"] != list(members):
            left = {"members": list(members), "queue": _halves(list(members)), "guilty": [], "trying": False}
            left["deaths"] = 0
        self._state: dict[str, Any] = left

    def run(self, is_harmless: Callable[[Sequence[str]], bool]) -> list[str]:
        """The guilty members; `is_harmless` works on some members and says whether that went well."""
        state = self._state
        if state["trying"]:
            state["deaths"] += 1
            if len(state["queue"][0]) > 1 or state["deaths"] >= DEATHS_TO_CONVICT:
                self._failed()
        while state["queue"]:
            state["trying"] = True
            self._session.set_facts({self._fact: state})
            if is_harmless(state["queue"][0]):
                self._next()
            else:
                self._failed()
        self._session.set_facts({self._fact: None})
        return list(state["guilty"])

    def _failed(self) -> None:
        tried = self._state["queue"][0]
        self._next()
        if len(tried) == 1:
            self._state["guilty"] += tried
        else:
            self._state["queue"][:0] = _halves(tried)

    def _next(self) -> None:
        del self._state["queue"][0]
        self._state["deaths"] = 0
        self._state["trying"] = False


def _halves(members: list[str]) -> list[list[str]]:
    middle = (len(members) + 1) // 2
    return [half for half in (members[:middle], members[middle:]) if half]
