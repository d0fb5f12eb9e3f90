"""Several ranks train one run with torch and gloo. Any of them is killed or hangs: the same bits.

Every rank is a process; ledger, shared memory, checkpoints and signals are real, target and method are small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from paceline.errors import RanksError
from paceline.ledger.facts import RANKS
from paceline.ledger.records import State
from paceline.ledger.stores.sqlite import SQLiteLedger
from paceline.testing.forked_commands import ForkedCommands
from paceline.testing.small_run import same_bits

RUN = """
import json
import signal
import sys
from pathlib import Path
from paceline.testing.ranks_of_a_run import Strike, one_attempt
from paceline.testing.synthetic import SyntheticEngine

class Broken(SyntheticEngine):
    def capture(self, group, features):
        captured = super().capture(group, features)
        for sample in captured:
            if sample.sample_id == "small:11":
                sample.tensors["aux_hidden_states"].fill_(float("inf"))
        return captured

def start(name, ranks, victim, point, turn, stops, breaks, sharded):
    def prepare(run):
        run.engine = Broken() if breaks else run.engine
    strike = Strike(victim, point, turn, signal.SIGSTOP if stops else signal.SIGKILL)
    shape = {"batch_size": 4, "passes": 2, "sharded": sharded}
    codes = one_attempt(
        Path(name), ranks, strike, timeout_s=2 if stops else 60, prepare=prepare, **shape
    )
    (Path(name) / "codes.json").write_text(json.dumps(codes))

start(*json.loads(sys.argv[1]))
"""
CLOSE = 1e-6  # of a tensor's norm: how far another order of sums may lead in a whole run
LOST = RanksError.exit_code
KILLED = -9


class Ranks:
    """A run folder and the attempts in it."""

    def __init__(self, forked_commands: ForkedCommands, folder: Path) -> None:
        self.folder = folder
        self._commands = forked_commands

    def attempt(
        self,
        ranks: int,
        victim: int = -1,
        where: str = "",
        *,
        stops: bool = False,
        breaks: bool = False,
        sharded: bool = False,
    ) -> list[int]:
        """Exit codes by rank. `where`: a point, and which time it is reached."""
        point, _, turn = where.partition(":")
        arguments: list[Any] = [
            str(self.folder),
            ranks,
            victim,
            point,
            int(turn or 1),
            stops,
            breaks,
            sharded,
        ]
        done = self._commands.script(RUN, json.dumps(arguments))
        assert done.returncode == 0, done.stderr
        for broken in self.folder.glob("broken-*"):
            raise AssertionError(broken.read_text())
        codes: list[int] = json.loads((self.folder / "codes.json").read_text())
        return codes

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "final.safetensors")

    def said(self) -> str:
        return " ".join(path.read_text() for path in self.folder.glob("ended-*"))

    def ledger(self) -> SQLiteLedger:
        return SQLiteLedger(self.folder / "ledger.db")


@pytest.fixture(scope="module")
def undisturbed(
    forked_commands: ForkedCommands, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Ranks]:
    """By the number of ranks."""
    runs = {ranks: Ranks(forked_commands, tmp_path_factory.mktemp(f"of-{ranks}")) for ranks in (1, 2, 4)}
    for ranks, run in runs.items():
        assert run.attempt(ranks) == [0] * ranks
    return runs


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a tensor, in parts of its norm."""
    parts = [name for name, tensor in one.items() if tensor.is_floating_point()]
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in parts)


def test_a_run_of_any_number_of_ranks_trains_the_same_up_to_the_order_of_sums(
    undisturbed: dict[int, Ranks],
) -> None:
    """The global batches are the same ones, and so is the lineage of every checkpoint."""
    wanted, alone = undisturbed[1].weights(), undisturbed[1].ledger().snapshot()
    for ranks in (2, 4):
        assert far(undisturbed[ranks].weights(), wanted) < CLOSE
        now = undisturbed[ranks].ledger().snapshot()
        assert [record.chain for record in now.checkpoints] == [record.chain for record in alone.checkpoints]


@pytest.mark.parametrize(
    ("victim", "where"),
    [
        (1, "learner.step.after:3"),
        (1, "learner.files.after:2"),
        (0, "checkpoint.before_rename:2"),
    ],
)
def test_a_rank_that_is_killed_ends_the_attempt_and_the_next_one_ends_in_the_same_bits(
    tmp_path: Path, forked_commands: ForkedCommands, undisturbed: dict[int, Ranks], victim: int, where: str
) -> None:
    """The other rank learns it from its connection, and no rank trains a step alone."""
    run = Ranks(forked_commands, tmp_path)
    codes = run.attempt(2, victim, where)
    assert codes[victim] == KILLED, "the point was never reached"
    assert codes[1 - victim] == LOST
    assert run.attempt(2) == [0, 0]
    assert same_bits(run.weights(), undisturbed[2].weights())


def test_a_rank_that_is_killed_while_it_resumes_is_resumed_again(
    tmp_path: Path, forked_commands: ForkedCommands, undisturbed: dict[int, Ranks]
) -> None:
    run = Ranks(forked_commands, tmp_path)
    assert run.attempt(2, 1, "learner.step.before:4") == [LOST, KILLED]
    assert run.attempt(2, 1, "learner.load.before") == [LOST, KILLED]
    assert run.attempt(2) == [0, 0]
    assert same_bits(run.weights(), undisturbed[2].weights())


def test_a_rank_that_hangs_ends_the_attempt_within_the_time_out(
    tmp_path: Path, forked_commands: ForkedCommands, undisturbed: dict[int, Ranks]
) -> None:
    """It is stopped in a step; the other one waits for the 2 seconds that this test allows, and says so."""
    run = Ranks(forked_commands, tmp_path)
    assert run.attempt(2, 1, "learner.step.before:3", stops=True) == [LOST, KILLED]
    assert "machine.trainer_timeout_s" in run.said()
    assert run.attempt(2) == [0, 0]
    assert same_bits(run.weights(), undisturbed[2].weights())


def test_a_run_goes_on_with_another_number_of_ranks(
    tmp_path: Path, forked_commands: ForkedCommands, undisturbed: dict[int, Ranks]
) -> None:
    """From 2 to 1 to 2: the same global batches, the same weights up to the order of sums; and it is said."""
    run = Ranks(forked_commands, tmp_path)
    assert run.attempt(2, 0, "learner.step.after:3") == [KILLED, LOST]
    assert run.attempt(1, 0, "learner.step.after:3") == [KILLED]
    assert run.attempt(2) == [0, 0]
    assert far(run.weights(), undisturbed[1].weights()) < CLOSE
    ledger = run.ledger()
    assert ledger.facts()[RANKS] == [[0, 2], [2, 1], [4, 2]]
    assert ledger.snapshot().checkpoints[-1].chain == undisturbed[1].ledger().snapshot().checkpoints[-1].chain


def test_a_bad_sample_on_rank_1_is_isolated_as_with_one_rank(
    tmp_path: Path, forked_commands: ForkedCommands
) -> None:
    """The same sample is quarantined for the same reason in as many plans; the rest is trained.

    Its step visits samples 10, 6, 11 and 7, of which the last two are rank 1's.
    """
    found = []
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        run = Ranks(forked_commands, tmp_path / str(ranks))
        assert run.attempt(ranks, breaks=True) == [0] * ranks
        ledger = run.ledger()
        [record] = ledger.find(state=State.QUARANTINED).values()
        history = [(trained.step, trained.rev, trained.samples) for trained in ledger.history()]
        found.append((record.sample_id, record.reason, history, run.weights()))
    (*alone, weights), (*together, its_weights) = found
    assert alone[0] == "small:11"
    assert together == alone
    assert far(its_weights, weights) < CLOSE


# -- sharded: each rank holds a part of the weights and of the optimizer (training/sharding.py) -------------


@pytest.fixture(scope="module")
def sharded(forked_commands: ForkedCommands, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Undisturbed, of 2 ranks."""
    run = Ranks(forked_commands, tmp_path_factory.mktemp("sharded"))
    assert run.attempt(2, sharded=True) == [0, 0]
    return run


def test_sharded_ranks_train_the_same_up_to_the_order_of_sums(
    undisturbed: dict[int, Ranks], sharded: Ranks
) -> None:
    """And no rank writes more than its part: half of what one process would write, and its random state."""
    assert far(sharded.weights(), undisturbed[1].weights()) < CLOSE
    now, alone = sharded.ledger().snapshot(), undisturbed[1].ledger().snapshot()
    assert [record.chain for record in now.checkpoints] == [record.chain for record in alone.checkpoints]
    for stem in ("draft", "optimizer"):
        path = undisturbed[1].folder / "checkpoints" / alone.checkpoints[-1].name / f"{stem}.safetensors"
        tensors = load_file(path)
        parts = sorted((sharded.folder / "checkpoints" / now.checkpoints[-1].name).glob(f"{stem}-*"))
        for part in parts:
            rows = {name: tensor for name, tensor in load_file(part).items() if tensor.ndim}
            trained = [name for name in rows if name not in ("d2t", "t2d")]
            assert trained
            assert all(len(rows[name]) == -(-len(tensors[name]) // 2) for name in trained), part.name
        assert len(parts) == 2


@pytest.mark.parametrize(
    ("victim", "where"),
    [
        (1, "checkpoint.after_file:4"),  # while it writes its part of the second checkpoint
        (0, "checkpoint.before_manifest:2"),
    ],
)
def test_a_sharded_rank_that_is_killed_ends_the_attempt_and_the_next_one_ends_in_the_same_bits(
    tmp_path: Path, forked_commands: ForkedCommands, sharded: Ranks, victim: int, where: str
) -> None:
    run = Ranks(forked_commands, tmp_path)
    codes = run.attempt(2, victim, where, sharded=True)
    assert codes[victim] == KILLED, "the point was never reached"
    assert codes[1 - victim] == LOST
    assert run.attempt(2, sharded=True) == [0, 0]
    assert same_bits(run.weights(), sharded.weights())


def test_a_run_goes_on_with_another_number_of_sharded_ranks_and_with_whole_ones(
    tmp_path: Path, forked_commands: ForkedCommands, undisturbed: dict[int, Ranks]
) -> None:
    """From 2 parts to one whole to 3 parts, of which some have fewer rows than others."""
    run = Ranks(forked_commands, tmp_path)
    assert run.attempt(2, 0, "learner.step.after:4", sharded=True) == [KILLED, LOST]
    assert run.attempt(1, 0, "learner.step.after:3") == [KILLED]
    assert run.attempt(3, sharded=True) == [0, 0, 0]
    assert far(run.weights(), undisturbed[1].weights()) < CLOSE
    assert run.ledger().facts()[RANKS] == [[0, 2, "sharded"], [2, 1], [4, 3, "sharded"]]


def test_a_bad_sample_of_a_sharded_rank_is_isolated_as_with_one_rank(
    tmp_path: Path, forked_commands: ForkedCommands
) -> None:
    """No rank waits for another one in a pass, so nothing times out."""
    run = Ranks(forked_commands, tmp_path)
    assert run.attempt(2, breaks=True, sharded=True) == [0, 0]
    [record] = run.ledger().find(state=State.QUARANTINED).values()
    assert record.sample_id == "small:11"
    assert not run.said()
