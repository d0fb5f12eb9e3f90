"""The ranks of a consumer: where each stands, and how the supervisor sees them as one child."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import torch

from paceline import precision
from paceline.errors import ConfigError, RanksError
from paceline.roles import trainer_group, trainer_rank
from paceline.roles.child import RoleFailedError
from paceline.roles.plan import refuse_unfit_ranks
from paceline.roles.trainer_group import LAST_WORDS_S, TrainerGroup
from paceline.roles.trainers import MeetingPoint, known_ranks, place_in, without_place
from paceline.target.version import TargetVersion
from paceline.training.link import Place
from paceline.training.settings import TrainingSection

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}


def test_torchruns_variables_name_the_place_of_a_rank() -> None:
    place = place_in(TORCHRUN)
    assert place == Place(5, 8, "10.0.0.7", 29500, on_host=1, ranks_on_host=4)
    assert not place.is_one_host
    assert place_in({}) is None
    assert place_in({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None


def test_a_launcher_that_counts_no_ranks_of_a_host_is_not_taken_for_one_host() -> None:
    """gloo would be told to use loopback alone, and ranks of another host would wait in vain."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    by_hand = {name: TORCHRUN[name] for name in names}
    place = place_in(by_hand)
    assert place is not None
    assert (place.on_host, place.ranks_on_host, place.is_one_host) == (None, None, False)
    for address in ("localhost", "127.0.0.1", "::1"):
        here = place_in({**by_hand, "MASTER_ADDR": address})
        assert here is not None
        assert (here.on_host, here.ranks_on_host, here.is_one_host) == (5, 8, True)


SLURM = ("SLURM_LOCALID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
OPEN_MPI = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")


@pytest.mark.parametrize("names", [SLURM, OPEN_MPI])
def test_a_launcher_s_number_on_the_host_counts_for_the_ranks_that_it_started(names: tuple[str, ...]) -> None:
    """Those that somebody starts by hand in one shell of its job all have the shell's number, which is 0."""
    by_hand = {name: value for name, value in TORCHRUN.items() if not name.startswith("LOCAL_")}
    started = place_in({**by_hand, **dict(zip(names, ("3", "5", "8"), strict=True))})
    assert started is not None
    assert (started.on_host, started.ranks_on_host) == (3, None)
    for shell in (("0", "0", "1"), ("0", "1", "2"), ("0", "5", "9"), ("0",)):
        place = place_in({**by_hand, **dict(zip(names, shell, strict=False))})
        assert place is not None
        assert place.on_host is None, "which rank of its host it is, nobody has told"
        here = place_in({**by_hand, "MASTER_ADDR": "localhost", **dict(zip(names, shell, strict=False))})
        assert here is not None
        assert here.on_host == 5
    told = place_in({**TORCHRUN, **dict(zip(names, ("0", "0", "1"), strict=True))})
    assert told is not None
    assert told.on_host == 1


def test_two_ranks_of_one_gpu_are_refused_on_every_rank() -> None:
    """LOCAL_RANK may be set, and wrong; NCCL would say so at the first gradient, in its own words."""
    trainer_rank._refuse_one_gpu_for_two(["", "", ""])
    trainer_rank._refuse_one_gpu_for_two(["5ad", "6be"])
    with pytest.raises(ConfigError, match="Ranks 0 and 2 take one GPU, 5ad") as caught:
        trainer_rank._refuse_one_gpu_for_two(["5ad", "6be", "5ad"])
    assert "set LOCAL_RANK for every rank" in caught.value.next


def test_a_rank_that_does_not_know_its_number_on_its_host_takes_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer_rank, "resolve_device", lambda _: torch.device("cuda"))
    config: Any = SimpleNamespace(training=SimpleNamespace(device="auto"))
    with pytest.raises(ConfigError, match="set LOCAL_RANK for every rank"):
        trainer_rank.device_of(config, Place(5, 8, "10.0.0.7", 29500, None, None))


@pytest.mark.parametrize("broken", [{"MASTER_PORT": ""}, {"RANK": "first"}])
def test_a_place_that_makes_no_sense_is_refused(broken: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2 -m paceline consume"):
        place_in({**TORCHRUN, **broken})


def test_the_roles_of_a_run_that_is_started_within_torchrun_are_no_ranks() -> None:
    """Only `paceline consume` is one: `paceline train` starts ranks of its own."""
    assert without_place({**TORCHRUN, "HOME": "/root"}) == {"HOME": "/root"}


def test_ranks_meet_on_loopback_at_a_port_that_is_already_taken() -> None:
    """Rank 0 inherits the listening socket, so no other process can come in between."""
    meeting = MeetingPoint(2)
    places = [place_in(meeting.environment(rank)) for rank in range(2)]
    assert [place and (place.rank, place.ranks, place.address) for place in places] == [
        (0, 2, "127.0.0.1"),
        (1, 2, "127.0.0.1"),
    ]
    assert places[0] is not None
    assert places[1] is not None
    assert places[0].port == places[1].port > 0
    assert ([places[0].listens], places[1].listens) == (meeting.descriptors(0), None)
    assert meeting.descriptors(1) == []
    meeting.close()


def test_every_rank_that_ever_was_here_is_known_by_its_lock(tmp_path: Path) -> None:
    for name in ("consumer", "consumer-10", "consumer-2", "consumer-x", "producer-3"):
        (tmp_path / f"{name}.lock").touch()
    assert known_ranks(tmp_path) == ["consumer-2", "consumer-10"]


class Rank:
    """A process that ends when the test says so, or is killed."""

    started: ClassVar[list[Rank]] = []

    def __init__(self, role: str, *_: Any, environment: dict[str, str], **__: Any) -> None:
        self.role, self.environment = role, environment
        self.code: int | None = None
        self.says: RoleFailedError | None = None
        self.sent: list[signal.Signals] = []
        self.started.append(self)

    def ends(self, code: int) -> None:
        self.code = code
        if code > 0:
            self.says = RoleFailedError(f"{self.role} ended with {code}", "why", "next", code)

    def poll(self) -> int | None:
        return self.code

    def wait(self, _: float) -> bool:
        return self.code is not None

    def send(self, number: signal.Signals) -> None:
        self.sent.append(number)
        if number == signal.SIGKILL and self.code is None:
            self.code = -9

    def error(self) -> RoleFailedError | None:
        return self.says

    def end(self, _: float) -> None:
        assert self.code is not None

    def keep_log_short(self) -> None:
        """It has none."""


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The group's clock: its last value."""
    clock = [100.0]
    monkeypatch.setattr(trainer_group, "time", SimpleNamespace(monotonic=lambda: clock[-1]))
    return clock


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch, now: list[float]) -> TrainerGroup:
    Rank.started.clear()
    monkeypatch.setattr(trainer_group, "Child", Rank)
    config: Any = SimpleNamespace(machine=SimpleNamespace(trainers=3))
    return TrainerGroup(Path("run.yaml"), config, threads=1)


def test_every_rank_is_started_with_its_place(group: TrainerGroup) -> None:
    assert [rank.role for rank in Rank.started] == ["consumer", "consumer-1", "consumer-2"]
    assert [rank.environment["RANK"] for rank in Rank.started] == ["0", "1", "2"]
    assert {rank.environment["WORLD_SIZE"] for rank in Rank.started} == {"3"}
    assert group.poll() is None


def test_the_group_has_ended_well_once_rank_0_and_then_all_have(group: TrainerGroup) -> None:
    """A rank that is dismissed may end before rank 0, which has some work left."""
    first, *others = Rank.started
    others[0].ends(0)
    assert group.poll() is None
    first.ends(0)
    assert group.poll() is None
    others[1].ends(0)
    assert (group.poll(), group.error()) == (0, None)


LOST = RanksError.exit_code


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ((LOST, -9, LOST), 1),  # killed: the others lost it
        ((LOST, LOST, 2), 2),  # its own error
        ((8, LOST, LOST), 0),
        ((LOST, -9, 7), 2),  # an error of its own counts before a death
        ((LOST, 1, LOST), 1),
        ((LOST, LOST, LOST), 0),
        ((11, LOST, LOST), 0),  # fenced
    ],
)
def test_the_group_ends_as_the_rank_that_caused_it(
    group: TrainerGroup, codes: tuple[int, ...], cause: int
) -> None:
    for rank, code in zip(Rank.started, codes, strict=True):
        rank.ends(code)
    assert group.poll() == codes[cause]
    assert group.role == Rank.started[cause].role
    assert group.error() is Rank.started[cause].says


def test_a_rank_that_outlives_the_others_is_killed(group: TrainerGroup, now: list[float]) -> None:
    """It hangs, or waits for something else; a kill undoes nothing that is committed."""
    first, hangs, second = Rank.started
    first.ends(LOST)
    second.ends(LOST)
    assert group.poll() is None
    now.append(now[-1] + LAST_WORDS_S)
    assert group.poll() == LOST
    assert hangs.sent == [signal.SIGKILL]
    assert group.role == "consumer"


def test_all_ranks_are_asked_to_stop_together(group: TrainerGroup) -> None:
    group.send(signal.SIGTERM)
    assert [rank.sent for rank in Rank.started] == [[signal.SIGTERM]] * 3


def test_a_stop_does_not_wait_for_ranks_that_wait_for_a_dead_one(
    group: TrainerGroup, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One was asked to stop before it could hear it, and died; the others still wait for it to join."""
    first, dead, second = Rank.started
    dead.ends(-signal.SIGTERM)
    monkeypatch.setattr(Rank, "wait", lambda _, seconds: now.append(now[-1] + seconds))
    began = now[-1]
    group.send(signal.SIGTERM)
    group.end(began + 60)
    assert first.sent == second.sent == [signal.SIGTERM, signal.SIGKILL]
    assert now[-1] - began < 4 * LAST_WORDS_S


def test_ranks_do_not_divide_an_optimizer_that_needs_whole_matrices() -> None:
    training = TrainingSection.parse({"optimizer": "muon"})
    config: Any = SimpleNamespace(training=training, machine=SimpleNamespace(shard=True))
    with pytest.raises(ConfigError, match=r"machine\.shard does not go with training\.optimizer muon"):
        refuse_unfit_ranks(config, 2)
    config.machine.shard = False
    refuse_unfit_ranks(config, 2)


class Joining:
    """The link of a rank that joins; the first that joined is rank 0."""

    rank, size = 0, 2
    said: ClassVar[list[bytes]] = []

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nobody has to come."""

    def exchange(self, message: bytes) -> list[bytes]:
        self.said.append(message)
        return [self.said[0], message]


def test_ranks_that_would_compute_in_other_types_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dtype: auto` follows from the processor of each host, and a run has one type."""
    Joining.said.clear()
    monkeypatch.setattr(trainer_rank, "Group", Joining)
    monkeypatch.setattr(trainer_rank, "binding", lambda _: {})
    monkeypatch.setattr(trainer_rank, "refuse_unfit_ranks", lambda *_: None)
    monkeypatch.setattr(trainer_rank.TargetVersion, "of", lambda _: TargetVersion("m", "t"))
    config: Any = SimpleNamespace(
        target=SimpleNamespace(model=Path()),
        training=SimpleNamespace(device="cpu"),
        method=SimpleNamespace(dtype="auto"),
        machine=SimpleNamespace(trainer_timeout_s=1.0, shard=False),
    )
    place = Place(0, 2, "127.0.0.1", 1)
    monkeypatch.setattr(precision, "has_bfloat16", lambda *_: True)
    trainer_rank.joined(config, place)
    monkeypatch.setattr(precision, "has_bfloat16", lambda *_: False)
    with pytest.raises(ConfigError, match="the numbers' type: float32 and bfloat16"):
        trainer_rank.joined(config, place)


def test_a_rank_looks_for_the_features_where_its_own_run_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 tells the folder's name; another host may have mounted the shared folder elsewhere."""
    for name in ("compute_deterministically", "joined", "TargetHead", "trainer_settings"):
        monkeypatch.setattr(trainer_rank, name, Mock())
    told = {"epoch": 1, "totals": None, "features": "paceline-a-run-1234"}
    monkeypatch.setattr(trainer_rank, "hear_begin", lambda _: told)
    plan = Mock()
    plan.config.feature_folder = Path("/mnt/here/paceline-a-run-99")
    plan.config.features.build.side_effect = EOFError  # no more of it
    with pytest.raises(EOFError):
        trainer_rank.follow(plan, Mock(), lambda: False, Place(1, 2, "", 1))
    assert plan.config.features.build.call_args.args == (Path("/mnt/here/paceline-a-run-1234"),)
