"""Isolation: find the members of a failed batch that fail by themselves, over as many restarts as needed.

The batch is tried in halves, and halves of halves, and the results are thrown away. Each trial is recorded
before it begins, so if the process dies in it, its successor counts the death and continues the isolation.
A death may have another cause, so one member is a culprit only after two; an error counts at once. If
there is no culprit, the batch goes on as planned, and the weights do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paceline.ledger.session import Session

DEATHS_BEFORE_ISOLATION = 3
DEATHS_OF_A_CULPRIT = 2


class Isolation:
    def __init__(self, session: Session, name: str, members: Sequence[str]) -> None:
        """Continues the isolation of this name and these members where an earlier process left it.

        `name` belongs to one producer (it contains the worker's name) or to one step.
        """
        self._session = session
        self._fact = f"isolation.{name}"
        left = session.facts().get(self._fact)
        if left is None or left["members"] != list(members):
            left = {"members": list(members), "queue": _halves(list(members)), "culprits": []}
            left |= {"trying": False, "deaths": 0}
        elif "guilty" in left:  # as it was called when this isolation began
            left["culprits"] = left.pop("guilty")
        self._state: dict[str, Any] = left

    def run(self, is_harmless: Callable[[Sequence[str]], bool]) -> list[str]:
        """The culprits; `is_harmless` tries some members and returns whether they succeeded."""
        state = self._state
        if state["trying"]:
            state["deaths"] += 1
            if len(state["queue"][0]) > 1 or state["deaths"] >= DEATHS_OF_A_CULPRIT:
                self._failed()
        while state["queue"]:
            state["trying"] = True
            self._session.set_facts({self._fact: state})
            if is_harmless(state["queue"][0]):
                self._next()
            else:
                self._failed()
        self._session.set_facts({self._fact: None})
        return list(state["culprits"])

    def _failed(self) -> None:
        tried = self._state["queue"][0]
        self._next()
        if len(tried) == 1:
            self._state["culprits"] += tried
        else:
            self._state["queue"][:0] = _halves(tried)

    def _next(self) -> None:
        del self._state["queue"][0]
        self._state["deaths"] = 0
        self._state["trying"] = False


def _halves(members: list[str]) -> list[list[str]]:
    middle = (len(members) + 1) // 2
    return [half for half in (members[:middle], members[middle:]) if half]
