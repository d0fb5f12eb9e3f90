"""All producers of a run are the same target: equal files are not enough, the states must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paceline.config.load import load_run_config
from paceline.config.run import RunConfig
from paceline.engines.engine import Captured, CaptureRequest
from paceline.errors import ConfigError
from paceline.ledger.facts import TARGET_PROBE, TARGET_VARIES
from paceline.ledger.ledger import Ledger
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles.target_probe import bind_probe, tolerance
from paceline.target.facts import TargetFacts
from paceline.testing.ledger_calls import capture, producer_of
from paceline.testing.synthetic import SyntheticEngine
from paceline.testing.tiny_run import TinyRun
from paceline.types import Feature


class Apart(SyntheticEngine):
    """Its states differ by this factor from the synthetic target's; `repeats`: what it says of its bits."""

    def __init__(self, factor: float = 1.0, *, repeats: bool = True) -> None:
        super().__init__()
        self.factor, self.repeats = factor, repeats

    @property
    def facts(self) -> TargetFacts:
        return replace(super().facts, repeats_bits=self.repeats)

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        samples = super().capture(group, features)
        for sample in samples:
            for name, tensor in sample.tensors.items():
                if tensor.is_floating_point():
                    sample.tensors[name] = (tensor.double() * self.factor).to(tensor.dtype)
        return samples


class Events:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def write(self, event: str, message: str) -> None:
        assert event == "note"
        self.notes.append(message)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_run_config(TinyRun(tmp_path, tmp_path / "model").run_file)


@pytest.fixture
def ledger() -> SQLiteLedger:
    """Of a run that has captured a sample, so that what is on record binds."""
    ledger = SQLiteLedger()
    capture(producer_of(ledger), 0)
    return ledger


def bind(ledger: Ledger, config: RunConfig, engine: SyntheticEngine, role: str = "producer") -> list[str]:
    events: Any = Events()
    bind_probe(ledger, config, engine, events, role=role)
    notes: list[str] = events.notes
    return notes


def test_a_producer_that_computes_the_same_bits_is_welcome(ledger: SQLiteLedger, config: RunConfig) -> None:
    """What the first one recorded stays on record."""
    assert bind(ledger, config, Apart()) == []
    recorded = ledger.facts()[TARGET_PROBE]
    assert bind(ledger, config, Apart(), "producer-1") == []
    assert ledger.facts()[TARGET_PROBE] == recorded
    assert TARGET_VARIES not in ledger.facts()
    assert all(any(abs(x) > 1e-3 for x in numbers) for numbers in recorded["states"].values())


def test_a_producer_that_differs_in_rounding_is_welcome_and_the_run_says_so(
    ledger: SQLiteLedger, config: RunConfig
) -> None:
    """A sample that it captures again may have other bits; an engine that promises none is not told."""
    bind(ledger, config, Apart())
    slight = 1 + tolerance("float32") / 2
    assert bind(ledger, config, Apart(slight, repeats=False)) == []
    assert TARGET_VARIES not in ledger.facts()
    [note] = bind(ledger, config, Apart(slight), "producer-1")
    assert "may have other bits" in note
    assert ledger.facts()[TARGET_VARIES] is True


@pytest.mark.parametrize("factor", [1 + 2 * tolerance("float32"), -1.0, float("nan")])
def test_a_producer_that_computes_other_states_is_refused(
    ledger: SQLiteLedger, config: RunConfig, factor: float
) -> None:
    """The files have the same digest, and a draft of both would imitate neither."""
    bind(ledger, config, Apart())
    with pytest.raises(ConfigError, match="differ by"):
        bind(ledger, config, Apart(factor), "producer-1")


def test_another_tokenizer_or_another_layer_is_refused(ledger: SQLiteLedger, config: RunConfig) -> None:
    """Numbers of other tokens say nothing, however close they are."""
    bind(ledger, config, Apart())
    recorded = ledger.facts()[TARGET_PROBE]
    name = next(iter(recorded["states"]))
    for other in (
        {**recorded, "tokens": "others", "bits": ""},
        {**recorded, "states": {"elsewhere": recorded["states"][name]}},
        {**recorded, "states": {**recorded["states"], name: []}},
    ):
        ledger.set_facts(None, {TARGET_PROBE: other})
        with pytest.raises(ConfigError, match="differ by"):
            bind(ledger, config, Apart())


def test_until_a_sample_is_captured_a_start_may_bring_another_target(config: RunConfig) -> None:
    """As with everything that binds a run: advice can be followed."""
    ledger = SQLiteLedger()
    bind(ledger, config, Apart())
    before = ledger.facts()[TARGET_PROBE]
    bind(ledger, config, Apart(2.0))
    assert ledger.facts()[TARGET_PROBE] != before
