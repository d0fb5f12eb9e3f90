"""Binds a run to its target, and to the dtype and device of target and draft. Every role checks these facts.

The first start records them. Target facts bind from the first captured sample on, draft facts from the first
checkpoint on. Until then a later start may replace them, so that the user can follow advice to choose another
target, unless a role that read the old facts is live.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.config.run import RunConfig
from paceline.errors import ConfigError
from paceline.ledger.facts import ENGINE
from paceline.ledger.ledger import Ledger
from paceline.ledger.session import write_facts
from paceline.ledger.view import LedgerView
from paceline.roles.binding import others_kept_out
from paceline.roles.snapshot import open_run
from paceline.target.facts import TargetFacts
from paceline.target.version import TargetVersion, files_version

MODEL, TOKENIZER = "model_version", "tokenizer_version"
STARTS = "start_versions"  # of the folders that the draft starts from
REVISION = "target_revision"  # the commit of a target from the hub
TARGET_NUMERICS, DRAFT_NUMERICS = "target_numerics", "draft_numerics"


def bind_target(ledger: Ledger, config: RunConfig, role: str = "") -> TargetVersion:
    """Record the run's target, or raise ConfigError if it is another one than recorded.

    `role`: the caller's role, which does not count as another live role.
    """
    version = TargetVersion.of(config.target.model)
    now = _facts(config, version)
    binds = ledger.snapshot().committed > 0
    recorded = settle(ledger, config, now, binds=binds, role=role)
    _refuse_unequal(config, recorded, now)
    return version


def refuse_other_target(ledger: LedgerView, config: RunConfig) -> TargetVersion:
    """Like `bind_target`, for a role that only reads the run: it records nothing."""
    facts, version = ledger.facts(), TargetVersion.of(config.target.model)
    now = _facts(config, version)
    _refuse_unequal(config, {name: facts.get(name, now[name]) for name in now}, now)
    return version


def _facts(config: RunConfig, version: TargetVersion) -> dict[str, Any]:
    facts: dict[str, Any] = {MODEL: version.model, TOKENIZER: version.tokenizer}
    if config.target.revision is not None:
        facts[REVISION] = config.target.revision
    starts = [files_version(folder) for folder in config.method.folders]
    return {**facts, STARTS: starts} if starts else facts


def refuse_foreign_answers(config: RunConfig, target: TargetVersion) -> None:
    """Raise ConfigError if the run trains on the answers of a run with another target."""
    other = config.data.other_run
    if other is None:
        return
    facts = open_run(other).facts()
    if (facts.get(MODEL), facts.get(TOKENIZER)) != (target.model, target.tokenizer):
        raise ConfigError(
            f"The answers in {other} were written by another target than {config.target.model}.",
            why="A draft learns what its own target says, in its own tokens. Nothing was captured.",
            next="set target.model to the folder that run was started with, or data.answers to target.",
        )


def refuse_changed(config: RunConfig, bound: TargetVersion, loaded: TargetFacts) -> None:
    """Raise ConfigError if the folder was changed between binding and loading."""
    names = {MODEL: loaded.model_version, TOKENIZER: loaded.tokenizer_version}
    _refuse_unequal(config, {MODEL: bound.model, TOKENIZER: bound.tokenizer}, names)


def _refuse_unequal(config: RunConfig, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if recorded.get(STARTS) != now.get(STARTS):
        raise ConfigError(
            f"{', '.join(map(str, config.method.folders))} has changed since this run was started.",
            why="The draft's sizes and first weights come from there. The run is untouched.",
            next="put the old folder back, or set a new run.name and run.directory.",
        )
    parts = {MODEL: "model", TOKENIZER: "tokenizer"}
    other = [name for name in parts if recorded.get(name) != now[name]]
    if not other:
        return
    old = (
        f"set target.revision to {recorded[REVISION]}" if REVISION in recorded else "put the old folder back"
    )
    raise ConfigError(
        f"{config.target.model} holds another {' and '.join(parts[name] for name in other)} than the one "
        f"this run was started with ({', '.join(f'{recorded.get(n)}, now {now[n]}' for n in other)}).",
        why="A draft trained on two targets would imitate neither. The run is untouched.",
        next=f"{old}, or set a new run.name and run.directory.",
    )


def bind_numerics(ledger: Ledger, config: RunConfig, role: str, fact: str, now: Mapping[str, str]) -> None:
    """Record the dtype and kind of device of `role`; raise ConfigError for others, which give other bits.

    The number and the model of devices may change; their kind may not.
    """
    snapshot = ledger.snapshot()
    binds = snapshot.committed > 0 if fact == TARGET_NUMERICS else snapshot.head is not None
    recorded = settle(ledger, config, {fact: dict(now)}, binds=binds, role=role)[fact]
    if recorded != dict(now):
        what = "target" if fact == TARGET_NUMERICS else "draft"
        raise ConfigError(
            f"This run has computed its {what} in {_told(recorded)}, and would now compute in {_told(now)}.",
            why="Repeated work would give other bits, so no single configuration would describe the weights. "
            "The run is untouched.",
            next=f"compute the {what} as before (if the run file says auto, set its dtype or device), or set "
            "a new run.name and run.directory.",
        )


def bind_engine(ledger: Ledger, config: RunConfig, facts: TargetFacts, role: str) -> None:
    """Bind the run to the numerics of its target, and record what its engine promises. For a producer."""
    numerics = {"dtype": facts.dtype, "device": facts.device}
    bind_numerics(ledger, config, role, TARGET_NUMERICS, numerics)
    promise = {"name": config.engine.name, "repeats_bits": facts.repeats_bits}
    if ledger.facts().get(ENGINE) != promise:
        write_facts(ledger, {ENGINE: promise})


def _told(numerics: Mapping[str, str]) -> str:
    return " on ".join(numerics[name] for name in ("dtype", "device") if name in numerics)


def settle(
    ledger: Ledger, config: RunConfig, now: Mapping[str, Any], *, binds: bool, role: str
) -> dict[str, Any]:
    """The recorded facts; `now` is recorded if there are none, or if they do not bind yet."""
    facts = ledger.facts()
    recorded = {name: facts[name] for name in now if name in facts}
    if not recorded:
        recorded = ledger.set_facts(None, now, settle=True)
    if recorded != now and not binds:
        with others_kept_out(config, role or None, ledger) as alone:
            if alone:
                write_facts(ledger, now)
                recorded = dict(now)
    return recorded
