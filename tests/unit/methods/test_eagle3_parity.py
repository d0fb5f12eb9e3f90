"""One case of the training maths against SpecForge and speculators, whose tensors lie in eagle3_parity/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Config, Eagle3Draft
from paceline.target.head import TargetHead
from paceline.target.layout import HeadLayout

FOLDER = Path(__file__).parent / "eagle3_parity"
CASE = json.loads((FOLDER / "case.json").read_text())
STEPS, BOUND = 4, 2e-5
PEERS = ("specforge", "speculators")


@pytest.fixture(scope="module")
def case() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "case.safetensors")


@pytest.fixture
def draft(case: dict[str, torch.Tensor]) -> Eagle3Draft:
    """The case's draft with the case's target attached."""
    names = [name for name in Eagle3Config.__dataclass_fields__ if name in CASE]
    draft = Eagle3Draft(Eagle3Config(**{name: CASE[name] for name in names}, aux_layer_ids=(2, 4, 5)))
    draft.load_state_dict({name: case[name] for name in draft.state_dict()})
    draft.attach_target(
        TargetHead(
            CASE,
            case["target.embed_tokens.weight"],
            case["target.norm.weight"],
            case["target.lm_head.weight"],
            layout=HeadLayout(eps=CASE["rms_norm_eps"]),
        ),
    )
    return draft


def _samples(case: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """As EAGLE-3's features have them. The case leaves out the last token, on which no loss depends."""
    samples = []
    for i in range(len(CASE["lengths"])):
        tokens, targets, early, last = (
            case[f"sample{i}.{name}"]
            for name in ("input_ids", "loss_mask", "aux_hidden_states", "last_hidden_states")
        )
        targets = torch.cat([targets, targets.new_ones(1)])
        samples.append(
            {
                "input_ids": torch.cat([tokens, tokens.new_zeros(1)]),
                "loss_mask": targets,
                "aux_hidden_states": early,
                "last_hidden_states": last[targets[1:].bool()],
            }
        )
    return samples


def _trained(draft: Eagle3Draft, case: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss sum, logits [S, anchors, D]) with the gradients left in the draft."""
    method = Eagle3Method({"ttt_steps": STEPS, "step_decay": 0.8, "draft_vocab_size": 40})
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        seen.append(output.detach())

    handle = draft.lm_head.register_forward_hook(keep)
    loss = draft(method.collate(_samples(case), torch.device("cpu"))).loss_sum
    handle.remove()
    loss.backward()
    return loss.detach(), seen[0].view(STEPS, -1, 40)


@pytest.mark.parametrize("peer", PEERS)
def test_logits_of_every_step_equal_those_of_other_trainers(
    draft: Eagle3Draft, case: dict[str, torch.Tensor], peer: str
) -> None:
    """Every row that counts in step 0, 1, 2 and 3, to 2e-5; a wrong key, norm or position is off by more."""
    theirs = load_file(FOLDER / f"{peer}.safetensors")
    _, logits = _trained(draft, case)
    counted = case["common.counted"]
    anchors = counted[0].nonzero().squeeze(1)  # what counts at all counts in step 0
    assert logits.shape[1] == anchors.numel()
    for step in range(STEPS):
        rows = counted[step, anchors]
        difference = logits[step, rows] - theirs["logits"][step, anchors[rows]]
        assert float(difference.abs().max()) < BOUND, f"step {step}"


@pytest.mark.parametrize("peer", PEERS)
def test_loss_and_gradients_equal_those_of_other_trainers(
    draft: Eagle3Draft, case: dict[str, torch.Tensor], peer: str
) -> None:
    """The weighted sum and, relative to its largest entry, the gradient of every weight, to 2e-5."""
    theirs = load_file(FOLDER / f"{peer}.safetensors")
    loss, _ = _trained(draft, case)
    decay = torch.tensor(CASE["common_step_weights"])
    wanted = ((theirs["row_loss"] * case["common.counted"]).sum(1) * decay).sum()
    assert float((loss - wanted).abs() / wanted) < BOUND
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None
        expected = theirs[f"common.grad.{name}"]
        difference = (parameter.grad - expected).abs().max() / expected.abs().max()
        assert float(difference) < BOUND, name
