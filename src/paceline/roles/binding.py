"""Binds a run to its settings and its prompts (target_binding.py: to its target).

The first start records settings and prompts. They bind once a sample was captured or a prompt has failed
under them. Until then a later start may replace them if no other role is live, so that the user can follow
advice. Later, a longer prompt file with the same beginning extends a complete run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import Any

from paceline.config.load import flat, refuse_changes
from paceline.config.run import RunConfig
from paceline.data.source import Stretch
from paceline.errors import ConfigError, RunBusyError
from paceline.ledger.facts import (
    COMPLETED_STEP,
    CONFIG,
    FLAT_AFTER,
    PROMPTS,
    RENDERING_DATE,
    STOPPED_FLAT,
)
from paceline.ledger.ledger import Ledger
from paceline.ledger.locks import RoleLock
from paceline.ledger.records import CONSUMER
from paceline.ledger.session import repeated, write_facts
from paceline.roles.plan import RunPlan
from paceline.roles.workers import JOINING, elsewhere, known_roles, started_roles, take_from


def bind_run(plan: RunPlan, ledger: Ledger, *, role: str | None = None) -> tuple[Stretch, ...]:
    """Bind the run, or raise ConfigError if settings or prompts differ from what it is bound to.

    Returns the stretches of its prompts (data/source.py). `role`: the role whose lock the caller holds.
    """
    facts = ledger.facts()
    if CONFIG not in facts:  # another process may settle it at the same time
        facts = ledger.set_facts(None, _now(plan), settle=True)
    if not _is_bound(plan, ledger) and facts != facts | _now(plan):
        facts = _rebind(plan, ledger, role)
    refuse_changes(facts[CONFIG], plan.given)
    stretches = facts[PROMPTS]["stretches"]
    if facts[PROMPTS] != _prompts(plan, stretches):
        raise _other_prompts(plan, facts[PROMPTS])
    *_, before, now = plan.ordered([*stretches, plan.stretch])[1]
    if now > before:
        return _extend(plan, ledger, role, stretches)
    return tuple(stretches)


def _now(plan: RunPlan) -> dict[str, Any]:
    return {CONFIG: flat(plan.given), PROMPTS: _prompts(plan, [plan.stretch])}


def _prompts(plan: RunPlan, stretches: Sequence[Stretch]) -> dict[str, Any]:
    prompts, sizes = plan.ordered(stretches)
    return {"stretches": list(stretches), "digests": prompts.digests(sizes[-1])}


def _is_bound(plan: RunPlan, ledger: Ledger) -> bool:
    """Whether a sample was captured, a prompt has failed, or a checkpoint was written.

    A ledger that lost its newest changes may know less than the checkpoints' folder does.
    """
    now = ledger.snapshot()
    written = (path for path in plan.config.checkpoint_folder.glob("step-*") if path.suffix != ".new")
    return now.committed > 0 or now.prompts.failed > 0 or any(written)


def _rebind(plan: RunPlan, ledger: Ledger, role: str | None) -> dict[str, Any]:
    """Record new settings and prompts, unless the old ones bind or another role is live; what is recorded.

    The prompts that an earlier start registered are forgotten first, and the search among them for one that
    kills the engine. If this start is killed in between, the next one does all of it again.
    """
    with others_kept_out(plan.config, role, ledger) as alone:
        if alone and not _is_bound(plan, ledger):
            for name in ledger.snapshot().epochs.keys() - {CONSUMER}:
                ledger.acquire(name, "a start with other settings")  # ends a dead one's leases
            if repeated(ledger.forget_prompts, None):
                searches = dict.fromkeys(key for key in ledger.facts() if key.startswith("isolation."))
                write_facts(ledger, {**searches, **_now(plan)})
    return ledger.facts()


def _extend(
    plan: RunPlan, ledger: Ledger, role: str | None, stretches: Sequence[Stretch]
) -> tuple[Stretch, ...]:
    """The sources are longer than before: extend the run by the added prompts, if it is complete.

    An incomplete run is refused, because weights must not depend on when prompts were added.
    """
    longer = [*stretches, plan.stretch]
    *_, before, now = plan.ordered(longer)[1]
    if ledger.facts().get(COMPLETED_STEP) is None:
        raise ConfigError(
            f"{plan.prompts.name} now has {now} prompts, and this run of {before} is not complete.",
            why="A run can be extended only when everything that it has was trained.",
            next="put the data back until the run is complete, or set a new run.name and run.directory.",
        )
    with others_kept_out(plan.config, role, ledger) as alone:
        if alone:
            write_facts(ledger, {PROMPTS: _prompts(plan, longer), **_going_on(ledger)})
            repeated(ledger.end_stream, None, False)
            return tuple(longer)
    raise ConfigError(
        f"{plan.prompts.name} is longer than when this run started, and another role of the run is live.",
        why="Both roles must know the same prompts.",
        next="stop the run first, then run the same command again.",
    )


def _going_on(ledger: Ledger) -> dict[str, Any]:
    """The facts of a complete run that goes on: it stops early only for what is measured from now on."""
    facts = ledger.facts()
    flat = {FLAT_AFTER: facts[COMPLETED_STEP], STOPPED_FLAT: None} if facts.get(STOPPED_FLAT) else {}
    return {COMPLETED_STEP: None, **flat}


def go_on_if_flat_no_more(config: RunConfig, ledger: Ledger) -> None:
    """Reopen a run that stopped early, if its run file asks for that no more (training.stop_when_flat)."""
    facts = ledger.facts()
    if facts.get(STOPPED_FLAT) is None or config.training.stop_when_flat is not None:
        return
    with others_kept_out(config, None, ledger) as alone:
        if alone:
            going_on = _going_on(ledger) if facts.get(COMPLETED_STEP) is not None else {}
            write_facts(ledger, {STOPPED_FLAT: None, **going_on})


@contextmanager
def others_kept_out(config: RunConfig, role: str | None, ledger: Ledger) -> Iterator[bool]:
    """Yields whether no other role is live, and keeps others on this host from starting meanwhile.

    A role reads its settings while it holds its lock. A producer on another host is refused from then on, and
    reads the settings anew when it joins again.
    """
    directory = config.run.directory
    with ExitStack() as held:
        try:
            held.callback(RoleLock(directory, JOINING).release)
            for other in dict.fromkeys([*known_roles(directory), *started_roles(config)]):
                if other != role:
                    held.callback(RoleLock(directory, other).release)
        except RunBusyError:
            yield False
        else:
            take_from(ledger, elsewhere(ledger.facts(), directory), "a start that changes what binds the run")
            yield True


def _other_prompts(plan: RunPlan, recorded: dict[str, Any]) -> ConfigError:
    prompts, sizes = plan.ordered(recorded["stretches"])
    where = prompts.difference(recorded["digests"], sizes[-1])
    return ConfigError(
        f"The prompts in {plan.prompts.name} are not those that this run was started with: {where}.",
        why="Samples are identified by their place among the prompts; the run is untouched.",
        next="restore what was read (prompts may be added at the end of any source, and sources at the end "
        "of a mixture), or set a new run.name and run.directory.",
    )


def bind_date(ledger: Ledger) -> str:
    """The date of the run's first start, which a chat template may write into every prompt."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    date: str = ledger.set_facts(None, {RENDERING_DATE: now}, settle=True)[RENDERING_DATE]
    return date
