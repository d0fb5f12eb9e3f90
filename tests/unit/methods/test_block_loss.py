"""The loss of block drafts against a slow reference that decodes block by block."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from block_case import HEADS, Sample, decoded, draft_of, head, method_of, samples

from paceline.methods.dflash.batch import anchors_of
from paceline.methods.dflash.loss import dpace_weights
from paceline.methods.dflash.model import DFlashDraft
from paceline.precision import CPU


def places_of(sample: Sample) -> list[int]:
    """Tokens of an answer that a token of an answer follows; token 0 has no row before it."""
    target = sample["loss_mask"].tolist()
    return [p for p in range(1, len(target) - 1) if target[p] and target[p + 1]]


def wanted_logits(sample: Sample, token: int) -> torch.Tensor | None:
    """float64 [V]: the target's logits of the sample's token number `token`; None if it is no target."""
    target = sample["loss_mask"].tolist()
    if token >= len(target) or not target[token]:
        return None
    row = sum(target[1:token])  # of the captured rows; row i predicts token i + 1
    return head().output()(sample["last_hidden_states"][row]).double()


def cross_entropy(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(-(wanted.softmax(-1) * logits.log_softmax(-1)).sum())


def of_confidence(
    draft: DFlashDraft, hidden: torch.Tensor, base: torch.Tensor, before: int, wanted: torch.Tensor
) -> float:
    """How far the predicted rate of acceptance is from the one that rejection sampling has."""
    markov = draft.get_submodule("markov_head").state_dict()
    latent = markov["markov_w1.weight"][before].double()
    logits = base + markov["markov_w2.weight"].double() @ latent
    rate = float(torch.minimum(logits.softmax(-1), wanted.softmax(-1)).sum())
    proj = draft.get_submodule("confidence_head").state_dict()
    weight = proj["proj.weight"][0].double()
    predicted = float(torch.sigmoid(weight @ torch.cat((hidden, latent)) + proj["proj.bias"][0].double()))
    return -(rate * math.log(predicted) + (1 - rate) * math.log(1 - predicted))


def of_the_backbone(
    draft: DFlashDraft, hidden: torch.Tensor, base: torch.Tensor, before: int, wanted: torch.Tensor
) -> float:
    return 0.5 * cross_entropy(base, wanted)


def of_the_selector(
    draft: DFlashDraft, hidden: torch.Tensor, base: torch.Tensor, before: int, wanted: torch.Tensor
) -> float:
    """Among the five likeliest tokens; the target's own takes the fifth's place if it is none of them."""
    tokens, own = base.argsort(descending=True)[:5].tolist(), int(wanted.argmax())
    tokens = tokens if own in tokens else [*tokens[:4], own]
    selector = {
        name: t.double() for name, t in draft.get_submodule("candidate_selector").state_dict().items()
    }
    gate = selector["predecessor_codebook"][before] * (selector["hidden_projection.weight"] @ hidden)
    return cross_entropy(base[tokens] + selector["successor_codebook"][tokens] @ gate, wanted[tokens])


FURTHER = {"dspark": of_confidence, "domino": of_the_backbone, "dflash2": of_the_selector}


def reference(name: str, draft: DFlashDraft, decay: Any) -> tuple[float, dict[str, float]]:
    """(loss sum, metrics) in float64, anchor by anchor. `decay`: the weights of a block's guesses."""
    total, metrics = 0.0, {"chain": 0.0}
    for sample in samples():
        for place in places_of(sample):
            block, tokens = decoded(draft, sample, place), sample["input_ids"].tolist()
            trained = block.base if name == "dflash2" else block.logits
            wanted = [wanted_logits(sample, place + 1 + k) for k in range(len(trained))]
            weights, leading = decay(trained, wanted), True
            for k, theirs in enumerate(wanted):
                if theirs is None:
                    leading = False
                    continue
                loss = cross_entropy(trained[k], theirs)
                hit = int(block.logits[k].argmax()) == int(theirs.argmax())
                leading = leading and hit
                further = FURTHER.get(name, lambda *inputs: 0.0)
                more = further(draft, block.hidden[k], block.base[k], tokens[place + k], theirs)
                total += weights[k] * (loss + more)
                for key, value in (("loss", loss), ("count", 1.0), ("hits", float(hit)), ("judged", 1.0)):
                    metrics[f"{key}_{k}"] = metrics.get(f"{key}_{k}", 0.0) + value
                metrics["chain"] += float(leading)
    return total, metrics


def fixed(gamma: float) -> Any:
    return lambda logits, wanted: [math.exp(-k / gamma) for k in range(len(logits))]


def by_expected_length(alpha: float) -> Any:
    """The weights of D-PACE by their definition: what the expected length gains from each log probability."""

    def weights(logits: torch.Tensor, wanted: list[torch.Tensor | None]) -> list[float]:
        kept = [
            1.0 if w is None else (1 - alpha) * float(mine.softmax(-1)[int(w.argmax())]) + alpha
            for mine, w in zip(logits, wanted, strict=True)
        ]
        reached = [math.prod(kept[: k + 1]) * (wanted[k] is not None) for k in range(len(kept))]
        return [sum(reached[k:]) for k in range(len(kept))]

    return weights


WEIGHTINGS: list[tuple[Any, Any]] = [
    ({"name": "decay", "gamma": 2.5}, fixed(2.5)),
    ({"name": "dpace", "alpha": 0.3}, by_expected_length(0.3)),
]


@pytest.mark.parametrize(("weighting", "decay"), WEIGHTINGS, ids=["decay", "dpace"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", HEADS)
def test_training_sees_what_a_decoder_sees(name: str, causal: bool, weighting: Any, decay: Any) -> None:
    """Loss and metrics of packed samples are those of decoding, one block at a time, from a cache."""
    method = method_of(name, weighting=weighting, causal=causal)
    draft = draft_of(method)
    sums = draft(method.collate(samples(), CPU))
    total, metrics = reference(name, draft, decay)
    torch.testing.assert_close(float(sums.loss_sum.detach()), total, rtol=1e-4, atol=1e-4)
    assert sums.num_tokens == sum(len(places_of(sample)) for sample in samples())
    found = {name: float(value) for name, value in sums.metrics.items()}
    assert found.keys() == metrics.keys()
    for name, value in metrics.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_anchors_are_chosen_by_the_sample_alone() -> None:
    """All of them, or a fixed choice of some, which another sample makes otherwise."""
    sample = samples()[1]
    assert anchors_of(sample, 100).tolist() == places_of(sample)
    some = anchors_of(sample, 3)
    assert len(some) == 3
    assert some.tolist() == sorted(set(some.tolist()) & set(places_of(sample)))
    assert torch.equal(some, anchors_of(sample, 3))
    others = {
        tuple(anchors_of({**sample, "input_ids": sample["input_ids"].roll(n)}, 3).tolist()) for n in range(6)
    }
    assert len(others) > 1


@pytest.mark.parametrize("name", HEADS)
def test_groups_change_nothing_but_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small groups compute their logits again in backward; so does `recompute`, to the same bits."""
    results = []
    for guesses, recompute in ((1 << 10, False), (1 << 10, True), (6, False)):
        monkeypatch.setattr("paceline.methods.dflash.method.GROUP_GUESSES", guesses)
        method = method_of(name, recompute=recompute)
        draft, batch = draft_of(method), method.collate(samples(), CPU)
        assert (len(batch.groups) > 1) == (guesses == 6)
        sums = draft(batch)
        sums.loss_sum.backward()
        results.append([sums.loss_sum.detach(), *(weight.grad for weight in draft.parameters())])
    for whole, again, cut in zip(*results, strict=True):
        assert torch.equal(whole, again)
        torch.testing.assert_close(whole, cut, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("loss", ["soft_cross_entropy", "kl", "tv", "lk_alpha"])
def test_gradients_in_bfloat16_are_finite(name: str, loss: str) -> None:
    """With weights large enough that some distributions hardly overlap."""
    method = method_of(name, loss=loss, weighting="dpace")
    draft = draft_of(method)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.mul_(4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = draft(method.collate(samples(), CPU))
    sums.loss_sum.backward()
    assert torch.isfinite(sums.loss_sum)
    assert all(w.grad is not None and torch.isfinite(w.grad).all() for w in draft.parameters())


def test_the_candidates_scores_are_rounded_by_nothing_but_their_factors() -> None:
    """In bfloat16, which autocast would give the scores, too."""
    base, latents = (torch.randn(9, size, generator=torch.Generator().manual_seed(4)) for size in (61, 6))
    of = draft_of(method_of("dflash2")).head
    scores = []
    for is_mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            scores.append(of.logits(base.bfloat16(), latents.bfloat16()))
    assert scores[1].dtype == torch.float32
    assert torch.equal(*scores)


def test_dpace_weighs_by_the_gain_of_the_expected_length() -> None:
    """Without smoothing the weight is the derivative by each log probability; with alpha 1 it counts
    depths."""
    generator = torch.Generator().manual_seed(0)
    logs = (torch.rand(5, 3, generator=generator, dtype=torch.float64)).log().requires_grad_()
    length = logs.exp().cumprod(0).sum()
    (gain,) = torch.autograd.grad(length, logs)
    torch.testing.assert_close(dpace_weights(logs.detach().exp(), torch.ones(5, 3), 0.0), gain)
    counted = torch.tensor([[1.0], [0.0], [1.0]])
    assert dpace_weights(torch.zeros(3, 1), counted, 1.0).flatten().tolist() == [2.0, 0.0, 1.0]
