"""No sample of another target is planned or read for the first weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.errors import ConfigError
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.loader.loader import StepLoader
from paceline.loader.settings import LoaderSettings
from paceline.target.version import TargetVersion
from paceline.testing.ledger_calls import consumer_of, producer_of, refs_of

OURS, THEIRS = TargetVersion("ours", "tokens"), TargetVersion("theirs", "tokens")


def loader_of(target: TargetVersion | None, captured: TargetVersion) -> StepLoader:
    """Over a log of one sample that has ended."""
    ledger = SQLiteLedger()
    producer = producer_of(ledger, prompts=1)
    producer.lease(1)
    [ref] = refs_of(producer, 0)
    versions = {"target_model_version": captured.model, "tokenizer_version": captured.tokenizer}
    producer.commit([replace(ref, **versions)])
    producer.end_stream()
    return StepLoader(consumer_of(ledger), LoaderSettings(1, block_size=1, target=target))


@pytest.mark.parametrize("captured", [THEIRS, TargetVersion("ours", "other tokens")])
def test_a_sample_of_another_target_is_refused(captured: TargetVersion) -> None:
    """By its model or by its tokenizer: an error of the run, and nothing is planned or captured again."""
    for use in (lambda loader: loader.first_refs(1), lambda loader: loader.next_step(1)):
        with pytest.raises(ConfigError, match="was captured from another target"):
            use(loader_of(OURS, captured))


def test_a_sample_of_the_runs_target_is_planned() -> None:
    """And any, where the consumer was given no target."""
    for target in (OURS, None):
        planned = loader_of(target, OURS).next_step(1)
        assert planned is not None
        assert planned.sample_ids == ["run0:s0"]
