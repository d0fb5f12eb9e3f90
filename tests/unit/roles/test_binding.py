"""What a run is bound to, from when on, and how it is extended."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paceline.config.load import parse_run_config
from paceline.errors import ConfigError
from paceline.ledger.facts import COMPLETED_STEP, FLAT_AFTER, STOPPED_FLAT
from paceline.ledger.locks import RoleLock
from paceline.ledger.producer_session import ProducerSession
from paceline.ledger.records import Lease, Order
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.roles.binding import bind_run, go_on_if_flat_no_more
from paceline.roles.plan import RunPlan, plan_run
from paceline.testing.ledger_calls import capture, producer_of, refs_of


class Run:
    """A run file whose sections can be changed, and its ledger."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ledger = folder, SQLiteLedger()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        self.write("heldout.jsonl", 900, 2)
        self.write("train.jsonl", 0, 6)
        self.sections: dict[str, dict[str, Any]] = {
            "run": {"name": "r", "directory": str(folder / "run")},
            "target": {"model": str(folder)},
            "prompts": {"path": str(folder / "train.jsonl"), "rounds": 2},
            "evaluation": {"prompts": str(folder / "heldout.jsonl")},
        }

    def write(self, name: str, first: int, count: int) -> None:
        lines = [json.dumps({"id": n, "prompt": f"question {n}"}) for n in range(first, first + count)]
        (self.folder / name).write_text("\n".join(lines))

    def plan(self, **sections: dict[str, Any]) -> RunPlan:
        data = {name: {**values, **sections.pop(name, {})} for name, values in self.sections.items()}
        return plan_run(parse_run_config({**data, **sections}, source="run.yaml"))

    def registered(self, plan: RunPlan) -> ProducerSession:
        """A producer that has registered the plan's prompts."""
        stretches = bind_run(plan, self.ledger)
        producer = ProducerSession(self.ledger, "r", order=Order.ORDINAL)
        producer.acquire()
        producer.extend(plan.source(stretches).blocks())
        return producer

    def capture_one(self) -> None:
        capture(producer_of(self.ledger), 0)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_settings_bind_once_something_was_captured_under_them(run: Run) -> None:
    """Until then advice to change one can be followed."""
    bind_run(run.plan(), run.ledger)
    bind_run(run.plan(prompts={"max_prompt_tokens": 260}), run.ledger)
    run.capture_one()
    bind_run(run.plan(prompts={"max_prompt_tokens": 260}), run.ledger)
    with pytest.raises(ConfigError, match="max_prompt_tokens: 260 -> 192"):
        bind_run(run.plan(), run.ledger)


def test_settings_do_not_change_under_a_role_that_is_live(run: Run) -> None:
    """It would capture under the old ones what is recorded under the new."""
    bind_run(run.plan(), run.ledger)
    producer = RoleLock(run.folder / "run", "producer")
    other = run.plan(training={"batch_size": 9})
    with pytest.raises(ConfigError, match="batch_size"):
        bind_run(other, run.ledger, role="consumer")
    producer.release()
    bind_run(other, run.ledger, role="consumer")


def test_a_moved_prompt_file_is_the_same_prompts(run: Run) -> None:
    """They are known by their digests."""
    bind_run(run.plan(), run.ledger)
    run.capture_one()
    (run.folder / "train.jsonl").rename(run.folder / "moved.jsonl")
    bind_run(run.plan(prompts={"path": str(run.folder / "moved.jsonl")}), run.ledger)


def test_a_longer_file_with_the_same_beginning_extends_a_run_that_was_complete(run: Run) -> None:
    """Both roles then go on; the ordinals of what was captured stay."""
    assert bind_run(run.plan(), run.ledger) == (6,)
    run.capture_one()
    run.write("train.jsonl", 0, 9)
    plan = run.plan()
    with pytest.raises(ConfigError, match="not complete"):
        bind_run(plan, run.ledger)
    run.ledger.set_facts(None, {COMPLETED_STEP: 3})
    assert bind_run(plan, run.ledger) == (6, 9)
    assert run.ledger.facts()[COMPLETED_STEP] is None
    assert not run.ledger.snapshot().closed
    assert bind_run(plan, run.ledger) == (6, 9)
    assert [p.prompt_id for p in plan.source((6, 9)).read(11, 2)] == ["1/5", "0/6"]


def test_longer_sources_extend_a_mixture_that_was_complete(run: Run) -> None:
    """Each at its end, and by another source; what was captured keeps its ordinal. No more may change."""
    del run.sections["prompts"]
    paths = [run.folder / name for name in ("train.jsonl", "more.jsonl", "last.jsonl")]
    run.write("more.jsonl", 100, 4)
    sources = [{"path": str(path), "weight": weight} for path, weight in zip(paths, (1, 2, 1), strict=True)]

    def planned(count: int) -> RunPlan:
        return run.plan(data={"sources": sources[:count]})

    assert bind_run(planned(2), run.ledger) == ([6, 4],)
    run.capture_one()
    before = planned(2).source(([6, 4],)).read(0, 99)
    run.write("more.jsonl", 100, 5)
    run.write("last.jsonl", 200, 2)
    with pytest.raises(ConfigError, match="has 18 prompts, and this run of 14 is not complete"):
        bind_run(planned(3), run.ledger)
    run.ledger.set_facts(None, {COMPLETED_STEP: 3})
    stretches = ([6, 4], [6, 5, 2])
    assert bind_run(planned(3), run.ledger) == bind_run(planned(3), run.ledger) == stretches
    source = planned(3).source(stretches)
    assert source.read(0, 14) == before
    assert sorted(p.prompt_id for p in source.read(14, 9)) == ["0/2.1:104", "0/2:104", "0/3:200", "0/3:201"]
    assert planned(3).num_steps(stretches)[0] < planned(3).num_steps(stretches)[1]
    run.write("more.jsonl", 101, 5)
    with pytest.raises(ConfigError, match=r"the content of .*more\.jsonl is another"):
        bind_run(planned(3), run.ledger)
    run.write("more.jsonl", 100, 5)
    sources[0]["weight"] = 3
    with pytest.raises(ConfigError, match="sizes or weights of the sources"):
        bind_run(planned(3), run.ledger)


@pytest.mark.parametrize(("first", "count"), [(20, 3), (0, 9), (0, 2)])
def test_prompts_may_change_until_something_was_captured_of_them(run: Run, first: int, count: int) -> None:
    """A producer that was killed before its first capture has registered and leased them."""
    plan = run.plan()
    producer = run.registered(plan)
    producer.lease(2)
    refs_of(producer, 0, 1)
    run.ledger.set_facts(None, {"isolation.capture.0": {"culprits": ["0/0"]}})
    run.write("train.jsonl", first, count)
    plan = run.plan()
    assert bind_run(plan, run.ledger) == (count,)
    assert run.ledger.source_blocks() == []
    assert not run.ledger.facts()["isolation.capture.0"]
    producer = run.registered(plan)
    assert producer.snapshot().prompts.pending == 2 * count
    assert producer.lease(1) == [Lease(0)]


def test_fewer_rounds_are_fewer_prompts(run: Run) -> None:
    """A setting that may still change decides how many there are."""
    assert run.registered(run.plan()).snapshot().prompts.known == 12
    assert run.registered(run.plan(prompts={"rounds": 1})).snapshot().prompts.known == 6


def test_prompts_do_not_change_under_a_role_that_is_live(run: Run) -> None:
    """It would train the old ones under the new ones' ids."""
    bind_run(run.plan(), run.ledger)
    consumer = RoleLock(run.folder / "run", "consumer")
    run.write("train.jsonl", 20, 3)
    with pytest.raises(ConfigError, match="not those that this run was started with"):
        bind_run(run.plan(), run.ledger, role="producer")
    consumer.release()
    assert bind_run(run.plan(), run.ledger, role="producer") == (3,)


@pytest.mark.parametrize("what", ["a failed prompt", "a checkpoint"])
def test_prompts_bind_with_what_was_done_to_them(run: Run, what: str) -> None:
    """A ledger that lost its newest changes may know less than the folder of checkpoints."""
    bind_run(run.plan(), run.ledger)
    if what == "a checkpoint":
        (run.folder / "run" / "checkpoints" / "step-00000001-000001-0").mkdir(parents=True)
    else:
        producer = producer_of(run.ledger)
        producer.lease(1)
        producer.fail([0], "too long", retryable=False)
    run.write("train.jsonl", 20, 6)
    with pytest.raises(ConfigError, match="not those that this run was started with"):
        bind_run(run.plan(), run.ledger)


@pytest.mark.parametrize(("first", "count"), [(1, 9), (0, 5)])
def test_another_beginning_is_refused_naming_where_it_differs(run: Run, first: int, count: int) -> None:
    """A sample is its prompt's place in the file."""
    bind_run(run.plan(), run.ledger)
    run.capture_one()
    run.write("train.jsonl", first, count)
    where = "it has 5, and the run 6" if count == 5 else "the first that differ are in line 1 to the end"
    with pytest.raises(ConfigError, match=where):
        bind_run(run.plan(), run.ledger)


def test_repeated_prompts_are_taken_once_or_named_all_at_once(run: Run) -> None:
    """As the run file says."""
    lines = [json.dumps({"prompt": f"question {n % 5}"}) for n in range(10)]
    (run.folder / "train.jsonl").write_text("\n".join(lines))
    plan = run.plan()
    assert plan.num_samples == 10
    assert "5 lines repeat an earlier one" in plan.notes[0]
    with pytest.raises(ConfigError, match=r"5 lines .* lines 6, 7, 8, 9, 10\."):
        run.plan(prompts={"duplicates": "refuse"})


def test_the_index_of_the_prompts_is_kept_beside_the_run(run: Run) -> None:
    """A role that starts when there is one does not look through the file again."""
    (run.folder / "run").mkdir()
    assert run.plan().prompts.source.num_read == 6
    assert run.plan().prompts.source.num_read == 0
    run.write("heldout.jsonl", 3, 4)
    with pytest.raises(ConfigError, match=r"3 prompts of .*heldout\.jsonl are also in"):
        run.plan()


def test_a_number_of_rounds_that_no_run_can_have_is_refused(run: Run) -> None:
    """It would be counted, not tried."""
    with pytest.raises(ConfigError, match="less than or equal to 10000"):
        run.plan(prompts={"rounds": 10**12})
    assert replace(run.plan(prompts={"rounds": 10_000})).num_samples == 60_000


def flat_facts(run: Run) -> list[Any]:
    facts = run.ledger.facts()
    return [facts.get(name) for name in (STOPPED_FLAT, COMPLETED_STEP, FLAT_AFTER)]


def test_a_run_that_stopped_early_stays_as_it_is_until_its_run_file_says_otherwise(run: Run) -> None:
    """Then it goes on, and what was measured before does not stop it again."""
    bind_run(run.plan(), run.ledger)
    run.capture_one()
    run.ledger.set_facts(None, {STOPPED_FLAT: "it rises no more", COMPLETED_STEP: 3})
    ruled = run.plan(training={"stop_when_flat": {"evaluations": 2}})
    bind_run(ruled, run.ledger)
    go_on_if_flat_no_more(ruled.config, run.ledger)
    assert flat_facts(run) == ["it rises no more", 3, None]
    go_on_if_flat_no_more(run.plan().config, run.ledger)
    assert flat_facts(run) == [None, None, 3]


def test_a_run_that_stopped_early_and_gets_more_prompts_goes_on(run: Run) -> None:
    """More data is a reason to measure anew."""
    ruled = {"stop_when_flat": {"evaluations": 2}}
    bind_run(run.plan(training=ruled), run.ledger)
    run.capture_one()
    run.ledger.set_facts(None, {STOPPED_FLAT: "it rises no more", COMPLETED_STEP: 3})
    run.write("train.jsonl", 0, 9)
    assert bind_run(run.plan(training=ruled), run.ledger) == (6, 9)
    assert flat_facts(run) == [None, None, 3]
