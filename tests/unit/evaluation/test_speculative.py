"""Speculative decoding must be invisible in the output: the same tokens, the same distribution."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from paceline.errors import ConfigError
from paceline.evaluation import speculative
from paceline.evaluation.acceptance import AcceptanceReport, Way, decode_prompts, summarise
from paceline.evaluation.heldout import Asked
from paceline.evaluation.lookup import LookupDrafter
from paceline.evaluation.speculative import (
    Decoding,
    _Chooser,
    _verify_sampled,
    follow_answer,
    plain_generate,
    speculative_generate,
)
from paceline.evaluation.target import LlamaTarget
from paceline.evaluation.tree import Drafting, DraftTree
from paceline.methods.drafter import Drafter
from paceline.methods.eagle3.decode import Eagle3Decoder
from paceline.methods.eagle3.method import Eagle3Method
from paceline.methods.eagle3.model import Eagle3Draft
from paceline.target.head import TargetHead
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
def random_draft(folder: Path, model: LlamaForCausalLM) -> Eagle3Draft:
    method = Eagle3Method({"draft_vocab_size": 40, "init": "random"})
    return method.build(TargetHead.load(folder), [captured_sample(model, 40, 2, 1)], seed=1)


@pytest.fixture(scope="module")
def trained_draft(folder: Path, model: LlamaForCausalLM) -> Eagle3Draft:
    """Overfitted to the target's greedy answers of the prompts, so that long chains are accepted."""
    method = Eagle3Method({"draft_vocab_size": VOCAB, "step_decay": 1.0, "init": "random"})
    samples = []
    for prompt in PROMPTS:
        answer = model.generate(
            torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=None
        )[0]
        samples.append(captured_sample(model, len(answer) - 1, len(prompt), 0, answer))
    draft = method.build(TargetHead.load(folder), samples, seed=1)
    batch = method.collate(samples, torch.device("cpu"))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=5e-3)
    for _ in range(150):
        sums = draft(batch)
        optimizer.zero_grad()
        (sums.loss_sum / sums.num_tokens).backward()
        optimizer.step()
    return draft


def measured(
    target: LlamaTarget,
    drafter: Drafter,
    prompts: Sequence[tuple[int, ...]],
    decoding: Decoding,
    draftings: Sequence[Drafting],
) -> list[AcceptanceReport]:
    """One report for each kind of drafting."""
    ways = [Way(str(place), drafter, drafting) for place, drafting in enumerate(draftings)]
    asked = [Asked(str(place), ids) for place, ids in enumerate(prompts)]
    figures = list(decode_prompts(target, ways, asked, decoding))
    return [summarise(figures, way.name, way.drafting) for way in ways]


def test_target_forward_equals_hugging_face(target: LlamaTarget, model: LlamaForCausalLM) -> None:
    """Logits, auxiliary states and the cache agree with transformers, in one call or token by token."""
    sample = captured_sample(model, 12, 4, seed=5)
    ids = sample["input_ids"][:-1].long()
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


@pytest.mark.parametrize("which", ["random_draft", "trained_draft"])
def test_greedy_output_equals_plain_decoding(
    request: pytest.FixtureRequest, target: LlamaTarget, which: str
) -> None:
    """Token for token, whether the draft is always wrong or nearly always right."""
    drafter, lengths = Eagle3Decoder(request.getfixturevalue(which), torch.float32), (1, 3, 5)
    chains = measured(target, drafter, PROMPTS, NEVER_ENDS, [Drafting(length) for length in lengths])
    for length, chain in zip(lengths, chains, strict=True):
        assert chain.identical == len(PROMPTS)
        if which == "trained_draft":
            assert chain.acceptance_length > 1.0 + 0.5 * length
        else:
            assert chain.acceptance_length < 1.5


@pytest.mark.parametrize("which", ["random_draft", "trained_draft"])
def test_greedy_output_of_a_tree_equals_plain_decoding(
    request: pytest.FixtureRequest, target: LlamaTarget, which: str
) -> None:
    """Several guesses verified in one pass change the speed and nothing else."""
    drafter = Eagle3Decoder(request.getfixturevalue(which), torch.float32)
    shapes = [Drafting(4, 2, 2), Drafting(7, 3, 4), Drafting(1, 4, 1), Drafting(12, 8, 3), Drafting(3)]
    *trees, chain = measured(target, drafter, PROMPTS, NEVER_ENDS, shapes)
    assert [report.identical for report in (*trees, chain)] == [len(PROMPTS)] * len(shapes)
    if which == "random_draft":
        assert trees[-1].acceptance_length > chain.acceptance_length, "more guesses hit more often"


def test_greedy_output_of_prompt_lookup_equals_plain_decoding(target: LlamaTarget) -> None:
    """With no guess in some cycles and several in others."""
    prompt = (5, 9, 12, 5, 9, 12, 5, 9)
    [report] = measured(target, LookupDrafter(VOCAB), [prompt, *PROMPTS], NEVER_ENDS, [Drafting(4)])
    assert report.identical == len(PROMPTS) + 1
    assert report.acceptance_length > 1.0
    assert report.cycles > 0


def test_every_tensor_of_decoding_is_made_where_the_target_lies(
    target: LlamaTarget, trained_draft: Eagle3Draft
) -> None:
    """A tensor made without a device would land on the wrong one, and mixing devices is an error."""
    drafter = Eagle3Decoder(trained_draft, torch.float32)
    sampled = Decoding(max_new_tokens=8, temperature=0.7)
    with torch.device("meta"):  # whatever names no device lies elsewhere
        assert torch.zeros(()).is_meta
        tree, _ = measured(target, drafter, PROMPTS, NEVER_ENDS, [Drafting(7, 3, 4), Drafting(3)])
        speculative_generate(target, drafter, PROMPTS[0], sampled, Drafting(3))
    assert tree.identical == len(PROMPTS)


def test_the_prefill_lasts_until_its_token_is_known(
    target: LlamaTarget, random_draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU computes on after the call; what is left of a prefill is no time of decoding."""
    seen: list[str] = []
    clock, chosen = time.perf_counter, speculative._likeliest
    monkeypatch.setattr(time, "perf_counter", lambda: seen.append("clock") or clock())
    monkeypatch.setattr(speculative, "_likeliest", lambda logits: seen.append("token") or chosen(logits))
    plain_generate(target, PROMPTS[0], NEVER_ENDS)
    assert seen[:3] == ["clock", "token", "clock"]
    seen.clear()
    speculative_generate(target, Eagle3Decoder(random_draft), PROMPTS[0], NEVER_ENDS, Drafting(2))
    assert seen[:3] == ["clock", "token", "clock"]


def test_a_draft_that_draws_no_tree_is_decoded_as_a_chain(
    target: LlamaTarget, trained_draft: Eagle3Draft
) -> None:
    """A tree is what a draft may offer, not what every method must."""

    class Chain:
        def __init__(self) -> None:
            own = Eagle3Decoder(trained_draft, torch.float32)
            self.target_ids, self.layers, self.start, self.propose = (
                own.target_ids,
                own.layers,
                own.start,
                own.propose,
            )

    tree, chain = (
        speculative_generate(target, Chain(), PROMPTS[0], NEVER_ENDS, drafting)
        for drafting in (Drafting(3, 2, 3), Drafting(3))
    )
    assert (tree.tokens, tree.accepted) == (chain.tokens, chain.accepted)


def test_a_tree_row_sees_its_own_path_alone(target: LlamaTarget) -> None:
    """Every row's logits are those of plain decoding along its path, bit for bit in float32."""
    tree = DraftTree(tokens=(9, 4, 30, 11, 7, 50), parents=(-1, 0, 0, 1, 2, 3))
    target.start(64)
    target.forward(torch.tensor([1, 5]))
    logits = target.verify(tree).logits
    for row in range(len(tree.tokens)):
        target.start(64)
        target.forward(torch.tensor([1, 5]))
        for token in [tree.tokens[node] for node in tree.path(row)]:
            plain = target.forward(torch.tensor([token])).logits[0]
        torch.testing.assert_close(logits[row], plain, atol=1e-5, rtol=1e-5)


def test_an_accepted_path_is_cached_like_plain_decoding(target: LlamaTarget) -> None:
    """What follows an accepted path sees the same cache as if its tokens had come one by one."""
    tree = DraftTree(tokens=(9, 4, 30, 11), parents=(-1, 0, 0, 2))
    target.start(64)
    target.forward(torch.tensor([1, 5]))
    target.verify(tree)
    target.accept([0, 2, 3])
    after_tree = target.forward(torch.tensor([8])).logits
    target.start(64)
    target.forward(torch.tensor([1, 5]))
    for token in (9, 30, 11):
        target.forward(torch.tensor([token]))
    torch.testing.assert_close(after_tree, target.forward(torch.tensor([8])).logits, atol=1e-5, rtol=1e-5)


def test_a_tree_is_grown_by_likelihood(trained_draft: Eagle3Draft, target: LlamaTarget) -> None:
    """Parents come first, no guess is repeated under one parent, and the likeliest chain is in it."""
    drafter = Eagle3Decoder(trained_draft, torch.float32)
    target.start(64)
    step = target.forward(torch.tensor(PROMPTS[1]))
    drafter.start(128)
    next_ids = torch.tensor([*PROMPTS[1][1:], int(step.logits[-1].argmax())])
    tokens, parents = drafter.propose_tree(step.aux, next_ids, 7, 3, 4)
    assert len(tokens) == len(parents) == 7
    assert all(parent <= row for row, parent in enumerate(parents))
    assert len(set(zip(tokens, parents, strict=True))) == 7
    drafter.start(128)
    chain, _ = drafter.propose(step.aux, next_ids, 1, lambda logits: (int(logits.argmax()), None))
    assert chain[0] == tokens[0]


def test_end_of_text_inside_a_chain_ends_the_output(target: LlamaTarget, trained_draft: Eagle3Draft) -> None:
    """Whatever token is declared the end, both decoders stop right at its first occurrence."""
    drafter = Eagle3Decoder(trained_draft, torch.float32)
    whole = plain_generate(target, PROMPTS[0], NEVER_ENDS).tokens
    for end in set(whole):
        decoding = Decoding(max_new_tokens=40, eos_token_ids=(end,))
        expected = whole[: whole.index(end) + 1]
        assert plain_generate(target, PROMPTS[0], decoding).tokens == expected
        assert speculative_generate(target, drafter, PROMPTS[0], decoding, Drafting(4)).tokens == expected


def test_training_predicts_real_acceptance(target: LlamaTarget, trained_draft: Eagle3Draft) -> None:
    """What training unrolls is what decoding does: a draft that fits every step is always accepted."""
    drafter = Eagle3Decoder(trained_draft, torch.float32)
    accepted = [
        kept
        for prompt in PROMPTS
        for kept in speculative_generate(target, drafter, prompt, NEVER_ENDS, Drafting(3)).accepted
    ]
    assert sum(kept == 3 for kept in accepted) > 0.8 * len(accepted)


@pytest.mark.parametrize("proposal", [torch.tensor([0.5, 0.1, 0.4]), None])
def test_a_guess_that_is_kept_or_replaced_is_the_targets_own_draw(proposal: torch.Tensor | None) -> None:
    """The rule alone, in twenty times as many draws as with models below: a draft that guesses three of five
    tokens, and one whose guess is certain. The draws are the same in every run of this test."""
    wanted = torch.tensor([0.4, 0.3, 0.1, 0.15, 0.05])
    target_ids, draws = torch.tensor([1, 2, 4]), 6000
    chooser = _Chooser(Decoding(max_new_tokens=1, temperature=1.0), torch.device("cpu"))
    counts = torch.zeros(5)
    for _ in range(draws):
        guess = int(target_ids[1 if proposal is None else chooser.draw(proposal)])
        kept, own = _verify_sampled(wanted.log().repeat(2, 1), [guess], [proposal], target_ids, chooser)
        counts[guess if kept else own] += 1
    statistic = float(((counts - wanted * draws) ** 2 / (wanted * draws)).sum())
    assert statistic < 4 + 5 * 8**0.5  # as below


@pytest.mark.parametrize("which", ["random_draft", "trained_draft", "lookup"])
def test_sampled_output_has_the_targets_distribution(
    request: pytest.FixtureRequest, target: LlamaTarget, which: str
) -> None:
    """Pairs of tokens drawn speculatively fit the target's exact pair probabilities (chi-square)."""
    if which == "lookup":  # its guesses have no distribution; every token occurred, so there is always one
        drafter: Drafter = LookupDrafter(VOCAB)
        prompt: tuple[int, ...] = (1, *range(VOCAB), 12, 30)
    else:
        drafter, prompt = Eagle3Decoder(request.getfixturevalue(which), torch.float32), PROMPTS[1]
    draws, temperature = 300, 0.6
    target.start(128)
    after_prompt = target.forward(torch.tensor(prompt), last_only=True).logits[0]
    first = int(after_prompt.argmax())
    target.forward(torch.tensor([first]))
    forced = (*prompt, first)
    counts = torch.zeros(VOCAB, VOCAB)
    for seed in range(draws):
        decoding = Decoding(max_new_tokens=3, temperature=temperature, seed=seed)
        tokens = speculative_generate(target, drafter, forced, decoding, Drafting(2)).tokens
        counts[tokens[1], tokens[2]] += 1
    expected = _pair_probabilities(target, forced, temperature) * draws
    common = expected >= 2
    observed = torch.cat([counts[common], counts[~common].sum().reshape(1)])
    wanted = torch.cat([expected[common], (draws - expected[common].sum()).reshape(1)])
    statistic = float(((observed - wanted) ** 2 / wanted.clamp_min(1e-9)).sum())
    freedom = observed.numel() - 1
    # Mean `freedom`, standard deviation sqrt(2 * freedom); five of them is far beyond chance.
    assert freedom > 5
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def _pair_probabilities(target: LlamaTarget, prompt: tuple[int, ...], temperature: float) -> torch.Tensor:
    """Probability [V, V] of the second and third new token, summed over the first; exact to one in 250.

    Beginnings that hardly occur would cost 3,600 passes of the target, and are left out.
    """
    pairs = torch.zeros(VOCAB, VOCAB)
    target.start(128)
    first = (target.forward(torch.tensor(prompt), last_only=True).logits[0] / temperature).softmax(-1)
    for a in range(VOCAB):
        if float(first[a]) < 1e-4:
            continue
        target.truncate(len(prompt))
        second = (target.forward(torch.tensor([a])).logits[0] / temperature).softmax(-1)
        for b in range(VOCAB):
            if float(first[a] * second[b]) < 1e-4:
                continue
            target.truncate(len(prompt) + 1)
            third = (target.forward(torch.tensor([b])).logits[0] / temperature).softmax(-1)
            pairs[b] += first[a] * second[b] * third
    return pairs


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


@pytest.mark.parametrize("drafting", [Drafting(3), Drafting(7, 4, 3)])
def test_an_answer_that_is_followed_accepts_what_decoding_it_accepted(
    target: LlamaTarget, trained_draft: Eagle3Draft, drafting: Drafting
) -> None:
    """Cycle by cycle; only the last one knows nothing of what would come after the answer."""
    drafter = Eagle3Decoder(trained_draft, torch.float32)
    for prompt in PROMPTS:
        decoded = speculative_generate(target, drafter, prompt, NEVER_ENDS, drafting)
        followed = follow_answer(target, drafter, prompt, decoded.tokens, drafting)
        assert followed[:-1] == decoded.accepted[:-1]
        assert followed[-1] <= decoded.accepted[-1]
        assert 0 < sum(followed) < len(decoded.tokens)


def test_a_foreign_answer_is_followed_to_its_end(target: LlamaTarget, trained_draft: Eagle3Draft) -> None:
    """One that the target would not write: few guesses are right, and every cycle goes on by a token."""
    drafter = Eagle3Decoder(trained_draft, torch.float32)
    answer = [(7 * n) % VOCAB for n in range(20)]
    followed = follow_answer(target, drafter, PROMPTS[0], answer, Drafting(7, 4, 3))
    assert len(answer) - 1 <= sum(followed) + len(followed) <= len(answer)
    assert follow_answer(target, drafter, PROMPTS[0], answer[:1], Drafting(3)) == ()


def test_a_path_along_tokens_ends_where_no_guess_is_the_next_one() -> None:
    """A token that is twice the same is no path by itself."""
    tree = DraftTree((9, 9, 5, 9, 7), (-1, 0, 0, 1, 3))
    assert tree.along([9, 9, 7]) == [0, 1, 3, 4]
    assert tree.along([9, 5]) == [0, 1]
    assert tree.along([5, 5]) == [0, 2]
    assert tree.along([]) == tree.along([1]) == [0]
