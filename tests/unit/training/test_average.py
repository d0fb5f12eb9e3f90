"""The average of the weights: what it is, and that a run gives it away and trains on without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from paceline.errors import ConfigError
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.small_run import SmallRun, same_bits, weights
from paceline.training.average import WeightAverage
from paceline.training.settings import TrainingSection


def test_the_average_keeps_its_share_at_every_step() -> None:
    """Less of it in the first steps; buffers are the draft's own."""
    draft = nn.BatchNorm1d(2)
    average = WeightAverage(draft, 0.6)
    expected = draft.weight.detach().double()
    for step in range(1, 30):
        with torch.no_grad():
            draft.weight.add_(torch.tensor([0.5, -1.0]) * step)
        average.update(step)
        kept = min(0.6, step / (step + 10))
        expected = kept * expected + (1 - kept) * draft.weight.detach().double()
    state = average.state_dict()
    torch.testing.assert_close(state["weight"].double(), expected)
    assert state.keys() == draft.state_dict().keys()
    assert torch.equal(state["running_mean"], draft.running_mean)
    assert torch.equal(average.trained()["weight"], draft.weight)


def given(run: SmallRun, name: str = "draft") -> dict[str, torch.Tensor]:
    """A file of the newest checkpoint."""
    head = SQLiteLedger(run.db).snapshot().head
    assert head is not None
    return load_file(run.folder / "checkpoints" / head.name / f"{name}.safetensors")


def test_a_run_gives_the_average_away_and_trains_as_without_it(tmp_path: Path) -> None:
    """The checkpoint's draft is the average of the steps; the weights that are trained lie beside it."""
    plain, averaged = SmallRun(tmp_path / "plain"), SmallRun(tmp_path / "a", training={"ema_decay": 0.5})
    last = weights(plain.run())
    assert same_bits(weights(averaged.run()), last)
    assert same_bits(given(plain), last)
    trained = given(averaged, "weights")
    assert trained
    assert all(torch.equal(weight, last[name]) for name, weight in trained.items())
    draft = given(averaged)
    assert draft.keys() == last.keys()
    assert {name for name in draft if torch.equal(draft[name], last[name])} == {"d2t", "t2d"}


def test_the_draft_of_a_checkpoint_is_the_average_of_the_weights_after_each_step(tmp_path: Path) -> None:
    """Beginning with the first weights, by the numbers of the run's steps."""
    run, states = SmallRun(tmp_path, training={"ema_decay": 0.5}), list[dict[str, torch.Tensor]]()
    run.producer()[1]()
    trainer, loader = run.consumer()
    real = loader.next_step

    def next_step(step: int) -> object:
        states.append({name: weight.detach().clone() for name, weight in trainer.draft.named_parameters()})
        return real(step)

    loader.next_step = next_step  # type: ignore[method-assign, assignment]
    steps = trainer.fit(loader)
    assert len(states) == steps + 1, "the loader is asked once more at the end"
    draft = given(run)
    for name, expected in states[0].items():
        for step in range(1, steps + 1):
            expected = torch.lerp(expected, states[step][name], 1 - min(0.5, step / (step + 10)))
        assert torch.equal(draft[name], expected), name


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_share_that_averages_nothing_is_refused(decay: float) -> None:
    """0 would be the last weights, 1 the first ones for ever."""
    with pytest.raises(ConfigError, match="ema_decay"):
        TrainingSection.parse({"ema_decay": decay})
