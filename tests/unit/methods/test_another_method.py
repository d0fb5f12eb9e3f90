"""A second method, with other layers, other rows and no last state: no file of the product knows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from paceline.methods.method import DraftMethod, LossSums
from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead
from paceline.testing.method_suite import MethodSuite
from paceline.types import Feature, Rows, States, Targets, Tokens


class Guess(nn.Linear):
    """A draft: called with a batch, it gives the loss."""

    def forward(self, batch: Any) -> LossSums:
        states, words = batch
        logits = super().forward(states)
        return LossSums(nn.functional.cross_entropy(logits, words, reduction="sum"), len(words))


class OneLayerGuess:
    """Guesses a token from the early states of the token before it: a linear map, nothing else."""

    name = "one-layer-guess"

    def features(self, target: TargetFacts) -> tuple[Feature, ...]:
        return (
            Feature("words", Tokens(), dtype="int64"),
            Feature("wanted", Targets(), dtype="bool"),
            Feature("shallow", States((0, 1, 3)), Rows.PREDICTED, dtype="float16"),
        )

    def check_target(self, head: TargetHead) -> None:
        """Every target will do."""

    def build(self, head: TargetHead, samples: Sequence[Any], seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Guess(3 * head.hidden_size, head.vocab_size)

    def restore(self, head: TargetHead, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        draft = Guess(3 * head.hidden_size, head.vocab_size)
        draft.load_state_dict(dict(tensors))
        return draft

    def learning_rate_scales(self) -> Mapping[str, float]:
        return {}

    def adamw_for(self) -> Sequence[str]:
        return ("weight",)

    def describe(self, draft: nn.Module) -> dict[str, Any]:
        return {"states": 3}

    def num_tokens(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> int:
        return sum(int(sample["wanted"].sum()) for sample in samples)

    def collate(
        self, samples: Sequence[Mapping[str, torch.Tensor]], device: torch.device, visit: int | None = None
    ) -> Any:
        assert all(set(sample) == {"words", "wanted", "shallow"} for sample in samples)
        return (
            torch.cat([sample["shallow"] for sample in samples]).float().to(device),
            torch.cat([sample["words"][sample["wanted"]] for sample in samples]).to(device),
        )

    def drafter(self, draft: nn.Module, dtype: torch.dtype) -> Any:
        raise NotImplementedError

    def chain_length(self, wanted: int) -> int:
        return wanted

    def mean_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {}


class TestOneLayerGuess(MethodSuite):
    drafts = False  # it guesses the token that the target has written already

    def make(self) -> DraftMethod:
        return OneLayerGuess()
