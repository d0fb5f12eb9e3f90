"""Random choices of training: new at every visit of a sample, and the same whenever a visit is made again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline.methods.dflash.batch import anchors_of
from paceline.methods.method import DraftMethod
from paceline.methods.table import METHODS
from paceline.methods.visits import noisy
from paceline.precision import CPU
from paceline.testing.tiny_target import captured_sample, tiny_target

MADE: dict[str, dict[str, Any]] = {
    "eagle3": {"draft_vocab_size": 40, "feature_noise": 0.1},
    "p-eagle": {"draft_vocab_size": 40, "feature_noise": 0.1},
    "dflash": {"block_size": 4, "target_states": 3, "anchors_max": 5, "feature_noise": 0.1},
}


def method_of(name: str) -> DraftMethod:
    method: DraftMethod = METHODS.find(name).parse(MADE[name]).build()
    return method


@pytest.fixture(scope="module")
def samples() -> list[dict[str, torch.Tensor]]:
    return [captured_sample(tiny_target(), 40, 6, seed) for seed in (1, 2)]


def states(method: DraftMethod, samples: list[dict[str, torch.Tensor]], visit: int | None) -> torch.Tensor:
    found: torch.Tensor = method.collate(samples, CPU, visit).aux_hidden_states
    return found


@pytest.mark.parametrize("name", MADE)
def test_noise_is_new_at_every_visit_and_the_same_when_it_is_made_again(
    samples: list[dict[str, torch.Tensor]], name: str
) -> None:
    """Whatever else is in the micro-batch, and whatever was drawn before. Outside training there is none."""
    method = method_of(name)
    first = states(method, samples, visit=7)
    torch.randn(3)
    parts = [states(method_of(name), [sample], visit=7) for sample in samples]
    assert torch.equal(first, torch.cat(parts))
    exact = torch.cat([sample["aux_hidden_states"] for sample in samples])
    assert torch.equal(states(method, samples, visit=None), exact)
    assert not torch.equal(first, exact)
    assert not torch.equal(first, states(method, samples, visit=8))


def test_noise_has_a_share_of_each_states_size(samples: list[dict[str, torch.Tensor]]) -> None:
    """States of different depths differ in size. Targets and tokens are left alone."""
    [sample, _] = samples
    scaled = sample["aux_hidden_states"].unflatten(1, (3, -1)) * torch.tensor([1.0, 10.0, 100.0])[:, None]
    given = {**sample, "aux_hidden_states": scaled.flatten(1)}
    [moved] = noisy([given], 0.1, visit=3)
    error = (moved["aux_hidden_states"] - given["aux_hidden_states"]).unflatten(1, (3, -1))
    share = error.square().mean((0, 2)).sqrt() / scaled.square().mean((0, 2)).sqrt()
    torch.testing.assert_close(share, torch.full((3,), 0.1), rtol=0.15, atol=0)
    assert all(moved[key] is given[key] for key in given if key != "aux_hidden_states")
    assert noisy([given], 0.0, visit=3)[0] is given


def test_anchors_of_a_long_answer_change_with_the_visit(samples: list[dict[str, torch.Tensor]]) -> None:
    """As many each time, in order and without repeats; in the end every place has been one."""
    [sample, _] = samples
    places = set(anchors_of(sample, 1000).tolist())
    seen: set[int] = set()
    for visit in range(60):
        chosen = anchors_of(sample, 5, visit).tolist()
        assert chosen == sorted(set(chosen))
        assert len(chosen) == 5
        assert chosen == anchors_of(sample, 5, visit).tolist()
        seen.update(chosen)
    assert seen == places
    assert anchors_of(sample, 5).tolist() == anchors_of(sample, 5).tolist()
    assert set(anchors_of(sample, 1000, 3).tolist()) == places


def test_which_anchors_are_chosen_changes_no_count(samples: list[dict[str, torch.Tensor]]) -> None:
    """Ranks agree on the tokens of a step before they train it."""
    method = method_of("dflash")
    with torch.no_grad():
        assert method.collate(samples, CPU).num_tokens == 2 * 34, "without gradients all are judged"
    assert method.num_tokens(samples) == 10
    assert {method.collate(samples, CPU, visit).num_tokens for visit in (None, 1, 2)} == {10}
