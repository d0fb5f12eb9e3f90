"""A run that was complete goes on with prompts that were added to its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.loader.passes import Position
from paceline.loader.settings import LoaderSettings
from paceline.testing.small_run import SmallRun, same_bits, weights


def extended(folder: Path, passes: int, *sizes: int) -> SmallRun:
    """A run that was complete with each of these sizes but the last, and goes on with that."""
    run = SmallRun(folder, num_prompts=sizes[-1], passes=passes)
    for place in range(1, len(sizes)):
        run.stretches = sizes[:place]
        run.run()
        SQLiteLedger(run.db).end_stream(None, False)
    run.stretches = sizes
    return run


def visits(run: SmallRun) -> list[list[str]]:
    ledger = SQLiteLedger(run.db)
    plans = iter(range(1, 1000))
    return [list(plan.sample_ids) for plan in map(ledger.step_plan, plans) if plan is not None]


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(10, 14), (8, 13), (9, 10, 15), (3, 14)])
def test_every_sample_is_visited_as_often_as_every_other(
    tmp_path: Path, passes: int, sizes: tuple[int, ...]
) -> None:
    """Whether the last block was whole or short when the run ended; nothing is visited anew."""
    run = extended(tmp_path, passes, *sizes)
    before = visits(run)
    run.run()
    after = visits(run)
    assert after[: len(before)] == before
    counts = {i: sum(step.count(i) for step in after) for i in {i for step in after for i in step}}
    assert counts == {f"small:0/{n}": passes for n in range(sizes[-1])}
    assert {i for step in after[len(before) :] for i in step} == {
        f"small:0/{n}" for n in range(sizes[-2], sizes[-1])
    }


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("dies_at", [1, 3])
def test_an_extension_that_is_interrupted_ends_in_the_same_weights(
    tmp_path: Path, passes: int, dies_at: int
) -> None:
    """They follow from the prompts and from where the run was extended, and from nothing else."""
    plain = extended(tmp_path / "plain", passes, 10, 17)
    expected = weights(plain.run())
    run = extended(tmp_path / "killed", passes, 10, 17)
    run.producer()[1]()
    trainer, loader = run.consumer()
    real, calls = loader.next_step, []

    def next_step(step: int) -> object:
        calls.append(step)
        if len(calls) > dies_at:
            raise KeyboardInterrupt
        return real(step)

    loader.next_step = next_step  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loader)
    assert same_bits(weights(run.run()), expected)


def test_blocks_begin_anew_where_a_run_was_extended() -> None:
    """After as many empty ones as its last block was visited again in."""
    settings = LoaderSettings(3, passes=3, block_size=4, starts=(0, 10, 12))
    blocks = [settings.block(number) for number in range(10)]
    first, second, third = blocks[:5], blocks[5:8], blocks[8:]
    assert first == [range(4), range(4, 8), range(8, 10), range(10, 10), range(10, 10)]
    assert second == [range(10, 12), range(12, 12), range(12, 12)]
    assert third == [range(12, 16), range(16, 20)]
    assert settings.first_place(Position(5, 0)) <= 10
