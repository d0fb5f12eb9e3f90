"""Speculative decoding must be invisible in the output: the same tokens, the same distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from paceline.errors import ConfigError
from paceline.evaluation.acceptance import measure_acceptance, summarise
from paceline.evaluation.speculative import Decoded, Decoding, plain_generate, speculative_generate
from paceline.evaluation.target import LlamaTarget
from paceline.methods.eagle3.decode import Eagle3Decoder
from paceline.methods.eagle3.loss import training_time_test
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.methods.target_head import TargetHead
from paceline.testing.tiny_target import AUX_LAYER_IDS, VOCAB, captured_sample, save_target, tiny_target

PROMPTS = [(1, 5, 9), (1, 7, 7, 30, 12), (4,), (1, 44, 3, 2, 50, 6)]
NEVER_ENDS = Decoding(max_new_tokens=40)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_target()


@pytest.fixture(scope="module")
def folder(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(model, Path(tmp_path_factory.mktemp("target")))


@pytest.fixture(scope="module")
def target(folder: Path) -> LlamaTarget:
    return LlamaTarget.load(folder, AUX_LAYER_IDS, torch.float32)


@pytest.fixture(scope="module")
def random_draft(folder: Path) -> Eagle3Draft:
    method = Eagle3Method({"draft_vocab_size": 40, "init": "random"})
    return method.build_draft(TargetHead.load(folder), seed=1, token_weights=torch.arange(VOCAB).float() % 5)


@pytest.fixture(scope="module")
def trained_draft(folder: Path, model: LlamaForCausalLM) -> Eagle3Draft:
    """Overfitted to the target's greedy answers of the prompts, so that long chains are accepted."""
    method = Eagle3Method({"draft_vocab_size": VOCAB, "ttt_steps": 4, "init": "random"})
    draft = method.build_draft(TargetHead.load(folder), seed=1)
    samples = []
    for prompt in PROMPTS:
        answer = model.generate(
            torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=None
        )[0, :-1]
        samples.append(captured_sample(model, len(answer), len(prompt), 0, answer))
    batch = method.collate(samples)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=5e-3)
    for _ in range(150):
        sums = training_time_test(draft, batch, 4, 1.0)
        optimizer.zero_grad()
        (sums.loss_sum / sums.num_tokens).backward()
        optimizer.step()
    return draft


def test_target_forward_equals_hugging_face(target: LlamaTarget, model: LlamaForCausalLM) -> None:
    """Logits, auxiliary states and the cache agree with transformers, in one call or token by token."""
    sample = captured_sample(model, 12, 4, seed=5)
    ids = sample["input_ids"].long()
    with torch.no_grad():
        expected = model(ids.unsqueeze(0)).logits[0]
    target.start(20)
    whole = target.forward(ids)
    torch.testing.assert_close(whole.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.aux, sample["aux_hidden_states"], rtol=1e-4, atol=1e-4)
    target.truncate(5)
    steps = torch.cat([target.forward(ids[i : i + 1]).logits for i in range(5, 12)])
    torch.testing.assert_close(steps, expected[5:], rtol=1e-4, atol=1e-4)


def test_plain_generate_equals_hugging_face_greedy(target: LlamaTarget, model: LlamaForCausalLM) -> None:
    """The baseline is the target's own greedy decoding, not a decoding of our making."""
    for prompt in PROMPTS:
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=None
        )[0, len(prompt) :]
        assert plain_generate(target, prompt, NEVER_ENDS).tokens == expected.tolist()


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 5])
@pytest.mark.parametrize("which", ["random_draft", "trained_draft"])
def test_greedy_output_equals_plain_decoding(
    request: pytest.FixtureRequest, target: LlamaTarget, which: str, num_draft_tokens: int
) -> None:
    """Token for token, whether the draft is always wrong or nearly always right."""
    drafter = Eagle3Decoder(request.getfixturevalue(which), torch.float32)
    report = measure_acceptance(target, drafter, PROMPTS, NEVER_ENDS, num_draft_tokens)
    assert report.identical == len(PROMPTS)
    if which == "trained_draft":
        assert report.acceptance_length > 1.0 + 0.5 * num_draft_tokens
    else:
        assert report.acceptance_length < 1.5


def test_end_of_text_inside_a_chain_ends_the_output(target: LlamaTarget, trained_draft: Eagle3Draft) -> None:
    """Whatever token is declared the end, both decoders stop right at its first occurrence."""
    drafter = Eagle3Decoder(trained_draft, torch.float32)
    whole = plain_generate(target, PROMPTS[0], NEVER_ENDS).tokens
    for end in set(whole):
        decoding = Decoding(max_new_tokens=40, eos_token_ids=(end,))
        expected = whole[: whole.index(end) + 1]
        assert plain_generate(target, PROMPTS[0], decoding).tokens == expected
        assert speculative_generate(target, drafter, PROMPTS[0], decoding, 4).tokens == expected


def test_training_predicts_real_acceptance(target: LlamaTarget, trained_draft: Eagle3Draft) -> None:
    """What training unrolls is what decoding does: a draft that fits every step is always accepted."""
    drafter = Eagle3Decoder(trained_draft, torch.float32)
    accepted = [
        kept
        for prompt in PROMPTS
        for kept in speculative_generate(target, drafter, prompt, NEVER_ENDS, 3).accepted
    ]
    assert sum(kept == 3 for kept in accepted) > 0.8 * len(accepted)


@pytest.mark.parametrize("which", ["random_draft", "trained_draft"])
def test_sampled_output_has_the_targets_distribution(
    request: pytest.FixtureRequest, target: LlamaTarget, which: str
) -> None:
    """Pairs of tokens drawn speculatively fit the target's exact pair probabilities (chi-square)."""
    drafter = Eagle3Decoder(request.getfixturevalue(which), torch.float32)
    prompt, draws, temperature = PROMPTS[1], 1500, 0.6
    target.start(32)
    after_prompt = target.forward(torch.tensor(prompt), last_only=True).logits[0]
    first = int(after_prompt.argmax())
    target.forward(torch.tensor([first]))
    forced = (*prompt, first)
    counts = torch.zeros(VOCAB, VOCAB)
    for seed in range(draws):
        decoding = Decoding(max_new_tokens=3, temperature=temperature, seed=seed)
        tokens = speculative_generate(target, drafter, forced, decoding, 2).tokens
        counts[tokens[1], tokens[2]] += 1
    expected = _pair_probabilities(target, forced, temperature) * draws
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum().reshape(1)])
    wanted = torch.cat([expected[common], expected[~common].sum().reshape(1)])
    statistic = float(((observed - wanted) ** 2 / wanted.clamp_min(1e-9)).sum())
    freedom = observed.numel() - 1
    # Mean `freedom`, standard deviation sqrt(2 * freedom); five of them is far beyond chance.
    assert freedom > 5
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def _pair_probabilities(target: LlamaTarget, prompt: tuple[int, ...], temperature: float) -> torch.Tensor:
    """Exact probability [V, V] of the second and third new token, summed over the first."""
    pairs = torch.zeros(VOCAB, VOCAB)
    target.start(32)
    first = (target.forward(torch.tensor(prompt), last_only=True).logits[0] / temperature).softmax(-1)
    for a in range(VOCAB):
        target.truncate(len(prompt))
        second = (target.forward(torch.tensor([a])).logits[0] / temperature).softmax(-1)
        if float(first[a]) < 1e-7:
            continue
        for b in range(VOCAB):
            if float(first[a] * second[b]) < 1e-8:
                continue
            target.truncate(len(prompt) + 1)
            third = (target.forward(torch.tensor([b])).logits[0] / temperature).softmax(-1)
            pairs[b] += first[a] * second[b] * third
    return pairs


def test_report_counts_tokens_per_cycle() -> None:
    """Acceptance length leaves out the prefill's token and counts the target's own one."""
    plain = Decoded([1, 2, 3, 4, 5, 6], decode_s=5.0, prefill_s=1.0)
    drafted = Decoded([1, 2, 3, 4, 5, 6], decode_s=2.5, prefill_s=1.0, accepted=(2, 0, 1))
    other = Decoded([1, 2, 9], decode_s=0.5, prefill_s=1.0, accepted=(1,))
    report = summarise([(plain, drafted), (Decoded([1, 2, 3], 1.0, 1.0), other)], num_draft_tokens=2)
    assert report.acceptance_length == 7 / 4
    assert report.acceptance_rate == (0.75, 0.25)
    assert (report.identical, report.prompts, report.cycles) == (1, 2, 4)
    assert report.speed_up == pytest.approx((7 / 3.0) / (7 / 6.0))


@pytest.mark.parametrize("prompt", [(), (1, 2)])
def test_nothing_to_decode_is_refused(target: LlamaTarget, prompt: tuple[int, ...]) -> None:
    """An empty prompt or no room for a single new token is a mistake of the caller."""
    with pytest.raises(ConfigError):
        plain_generate(target, prompt, Decoding(max_new_tokens=0 if prompt else 4))


def test_target_of_another_architecture_is_refused(folder: Path) -> None:
    """A config this forward would compute wrongly is named instead of being computed wrongly."""
    head = TargetHead.load(folder)
    scaled = {**head.config, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}
    with pytest.raises(ConfigError, match="llama3"):
        LlamaTarget(
            TargetHead(scaled, head.embed_tokens, head.norm_weight, head.lm_head),
            AUX_LAYER_IDS,
            torch.float32,
        )
