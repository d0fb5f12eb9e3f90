"""Which members of a batch kill whoever works on it: found over as many restarts as it takes.

A batch that failed is tried in halves, and halves of halves, with the result thrown away. What is
about to be tried is written down first, so a process that dies of it convicts it: its successor finds
the trial where it stood. A death may be chance (somebody killed the process), so it takes two to
convict a single member. An error is no chance and counts at once. Nothing is decided about who is not
found guilty: the batch then goes on as planned, and its weights are those it always had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paceline.ledger.records import Fence
from paceline.ledger.store import MetadataStore

DEATHS_BEFORE_TRIAL = 3
DEATHS_TO_CONVICT = 2


class Trial:
    def __init__(
        self, store: MetadataStore, name: str, members: Sequence[str], *, fence: Fence | None = None
    ) -> None:
        """Takes up the trial of this name and these members where an earlier process left it."""
        self._store = store
        self._fact = f"trial.{name}"
        self._fence = fence
        left = store.facts().get(self._fact)
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
            self._store.set_facts({self._fact: state}, fence=self._fence)
            try:
                harmless = is_harmless(state["queue"][0])
            except Exception:
                state["trying"] = False  # no death, and no verdict
                self._store.set_facts({self._fact: state}, fence=self._fence)
                raise
            if harmless:
                self._next()
            else:
                self._failed()
        self._store.set_facts({self._fact: None}, fence=self._fence)
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
