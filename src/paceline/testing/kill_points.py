"""Kill points before and after every changing call of a run's parts, added from outside.

    ledger = pointed(SQLiteLedger(path), "ledger")
    arm("ledger.commit.before:2")  # this process dies when it commits for the second time

A point is called `part.method.before`, `.after`, or `.failed` if the call raised. It needs no hook in the
part, so new methods have points, too. The few points inside a call, in a transaction or a half-written
checkpoint, are marked in the product (paceline/crashpoints.py).
"""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

from paceline.crashpoints import reach, watch

# They change nothing, and some are asked again and again while a role waits: a kill before the next
# change finds the same as a kill at one of these.
QUESTIONS = frozenset(
    (
        *("facts", "failed", "find", "history", "lsn", "ownership", "read"),
        *("snapshot", "source_blocks", "step_plan", "usage", "wait"),
        *("close", "describe", "encode", "gathered", "num_tokens", "opened", "written"),
    )
)


class _Calls(threading.local):
    """What the thread that reaches a point is doing."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.answer: Any = None


_calls = _Calls()


def pointed(part: Any, name: str) -> Any:
    """`part`, with kill points around its changing calls; in all else it is the part itself."""
    return _Pointed(part, name)


def open_call() -> str:
    """The innermost call between whose points this thread is, as `part.method`; "?" if there is none."""
    return _calls.open[-1] if _calls.open else "?"


def answer() -> Any:
    """At a point `.after`: what the call returned."""
    return _calls.answer


class _Pointed:
    def __init__(self, part: Any, name: str) -> None:
        vars(self).update(_part=part, _name=name)

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._part, attribute)
        if attribute.startswith("_") or attribute in QUESTIONS or not inspect.isroutine(value):
            return value
        return _with_points(value, f"{self._name}.{attribute}")

    def __setattr__(self, attribute: str, value: Any) -> None:
        setattr(self._part, attribute, value)


def _with_points(call: Callable[..., Any], method: str) -> Callable[..., Any]:
    @wraps(call)
    def called(*args: Any, **kwargs: Any) -> Any:
        named = method + _kind_of_fact(args) if method.endswith("_facts") else method
        reach(f"{named}.before")
        _calls.open.append(named)
        try:
            found = call(*args, **kwargs)
        except Exception:
            reach(f"{named}.failed")
            raise
        finally:
            _calls.open.pop()
        _calls.answer = found
        reach(f"{named}.after")
        return found

    return called


def _kind_of_fact(args: tuple[Any, ...]) -> str:
    """A role's facts are places of their own: `ledger.set_facts(isolation).before`."""
    facts = next((value for value in args if isinstance(value, dict) and value), {})
    return f"({next(iter(facts)).partition('.')[0]})" if facts else ""


class Armed:
    """A watcher that sends this process `number` when it reaches `name` for the `turn`-th time (from 1).

    SIGKILL ends it there; SIGSTOP holds it there until it is sent SIGCONT.
    """

    def __init__(self, name: str, turn: int = 1, number: signal.Signals = signal.SIGKILL) -> None:
        self._name, self._turn, self._number = name, turn, number
        self._reached: Counter[str] = Counter()

    def __call__(self, name: str) -> None:
        if name == self._name:
            self._reached[name] += 1
            if self._reached[name] == self._turn:
                os.kill(os.getpid(), self._number)


def arm(where: str) -> None:
    """Kill this process at the point `name`, or `name:n` for the n-th time; "" for never."""
    name, _, turn = where.partition(":")
    watch(Armed(name, int(turn or 1)) if name else None)
