"""Figures of prompts become reports: two named lengths, intervals over prompts, a paired comparison."""

from __future__ import annotations

import pytest

from paceline.evaluation.acceptance import AnswerFigures, PromptFigures, compare, summarise
from paceline.evaluation.resampling import Resampling
from paceline.evaluation.tree import Drafting


def prompt(name: str, kept: tuple[int, ...], cycles: int, **lookup: int) -> PromptFigures:
    """A prompt whose draft kept guesses as told, and whose lookup kept `lookup` of them at depth 1."""
    tokens = cycles + sum(kept)
    ways = {"chain": AnswerFigures(tokens, cycles * 0.1, cycles, kept, 0.01 * cycles, 0.08 * cycles, True)}
    if lookup:
        found, count = lookup["found"], lookup["of"]
        ways["lookup"] = AnswerFigures(count + found, count * 0.1, count, (found, 0), identical=True)
    return PromptFigures(name, "", 5, AnswerFigures(tokens, tokens * 0.1), ways)


def test_both_lengths_by_their_names() -> None:
    """What was accepted beyond an answer's end counts for the one, and not for the other."""
    cut = AnswerFigures(5, 2.5, 3, (2, 1), identical=True)  # 3 + 3 tokens, of which the end cut one
    other = AnswerFigures(2, 0.5, 1, (1, 0), identical=False)
    figures = [
        PromptFigures("a", "", 3, AnswerFigures(5, 5.0), {"chain": cut}),
        PromptFigures("b", "", 3, AnswerFigures(2, 1.0), {"chain": other}),
    ]
    report = summarise(figures, "chain", Drafting(2))
    assert report.acceptance_length == 1 + 4 / 4
    assert report.emitted_per_cycle == 7 / 4
    assert report.acceptance_rate == (0.75, 0.25)
    assert (report.identical, report.prompts, report.cycles) == (1, 2, 4)
    assert report.speed_up == pytest.approx((7 / 3.0) / (7 / 6.0))


def test_the_time_of_a_cycle_is_told_by_what_took_it() -> None:
    report = summarise([prompt("a", (1, 0), 4)], "chain", Drafting(2))
    assert report.cycle_ms == pytest.approx({"draft": 10.0, "target": 80.0, "rest": 10.0})


def test_an_interval_covers_the_spread_of_prompts_and_repeats() -> None:
    """Equal prompts have no spread; unequal ones an interval around the figure; one prompt has none."""
    equal = summarise([prompt(str(n), (4, 2), 8) for n in range(9)], "chain", Drafting(2))
    assert equal.acceptance_length_interval == pytest.approx((1.75, 1.75))
    figures = [prompt(str(n), (n % 5, 0), 8) for n in range(20)]
    mixed = summarise(figures, "chain", Drafting(2))
    assert mixed.acceptance_length_interval is not None
    low, high = mixed.acceptance_length_interval
    assert 1.1 < low < mixed.acceptance_length == 1.25 < high < 1.4
    assert summarise(figures, "chain", Drafting(2)) == mixed
    assert summarise(figures[:1], "chain", Drafting(2)).acceptance_length_interval is None


def test_an_interval_has_its_level() -> None:
    """Of 120 samples of a known population, about 95 % of the intervals hold the population's value."""
    import numpy as np

    random, held = np.random.default_rng(3), 0
    for _ in range(120):
        kept = random.binomial(20, 0.4, size=30)
        resampling = Resampling(30)
        bounds = resampling.interval(resampling.ratio(list(kept), [20.0] * 30))
        assert bounds is not None
        held += bounds[0] <= 0.4 <= bounds[1]
    assert 0.88 * 120 < held < 120


def test_a_draft_is_compared_with_the_lookup_prompt_by_prompt() -> None:
    """Prompts differ much, the difference on each hardly: its interval is narrow, as it is paired."""
    figures = [prompt(str(n), (n % 7 + 1, 0), 10, found=n % 7, of=10) for n in range(21)]
    better = compare(figures, "chain", "lookup")
    assert better.gain == pytest.approx(0.1)
    assert better.gain_interval == pytest.approx((0.1, 0.1))
    assert better.speed_ratio > 1.0
    worse = compare(figures, "lookup", "chain")
    assert worse.gain_interval == pytest.approx((-0.1, -0.1))


def test_sampled_answers_give_no_speed_up_and_no_count_of_equal_ones() -> None:
    """They cannot be compared with plain decoding token for token."""
    sampled = [PromptFigures("a", "", 3, None, {"chain": AnswerFigures(4, 1.0, 2, (2, 0))})]
    report = summarise(sampled, "chain", Drafting(2))
    assert report.acceptance_length == 2.0
    assert (report.identical, report.speed_up, report.plain_tokens_per_s) == (None, None, None)


def test_answers_that_ended_with_their_first_token_leave_figures_finite() -> None:
    """There was no cycle, in every prompt or in some draws of prompts."""
    nothing = PromptFigures("a", "", 3, AnswerFigures(0, 1e-6), {"chain": AnswerFigures(0, 1e-6, 0, (0, 0))})
    report = summarise([nothing, nothing], "chain", Drafting(2))
    assert (report.acceptance_length, report.acceptance_length_interval) == (1.0, None)
    assert summarise([nothing, prompt("b", (4, 2), 8)], "chain", Drafting(2)).acceptance_length == 1.75
