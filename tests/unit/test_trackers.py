"""Every tracker passes the suite: TensorBoard's files, and the packages behind stand-ins of what we call.

The stand-ins keep the rules that matter: W&B drops a row of an earlier step of its own, MLflow finds a run
by its tag, Trackio continues a run of the same name.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.errors import ConfigError, PacelineError
from paceline.testing.tracker_suite import Rows, TrackerSuite, measured, scalars, trained
from paceline.trackers.mlflow import MLflow
from paceline.trackers.table import TRACKERS
from paceline.trackers.tensorboard import TensorBoard, event, record
from paceline.trackers.tracker import Point, TrackedRun, Tracker
from paceline.trackers.trackio import Trackio
from paceline.trackers.wandb import WandB


def by_step(rows: list[dict[str, float]]) -> Rows:
    found: Rows = {}
    for row in rows:
        for series in ("train", "heldout"):
            if (step := row.get(f"{series}/step")) is not None:
                found.setdefault((series, int(step)), []).append(row)
    return found


# -- TensorBoard ---------------------------------------------------------------------------


class TestTensorBoard(TrackerSuite):
    def open(self, run: TrackedRun) -> Tracker:
        return TensorBoard(run)

    def rows(self, run: TrackedRun) -> Rows:
        found: Rows = {}
        for tag, step in scalars(run.directory / "tensorboard" / run.key):
            series = tag.partition("/")[0]
            value = {"train/loss": 1 / step, "heldout/acceptance_length": 1.5}.get(tag)
            if value is not None:
                found.setdefault((series, step), []).append({tag: value})
        return found

    def test_the_bytes_are_those_of_tensorboards_own_writer(self) -> None:
        """Recorded from tensorboard 2.21: an Event of two scalars, as its RecordWriter writes it."""
        point = Point("train", 300, 1.5, {"loss": 0.25, "samples": 4.0})
        assert record(event(point)).hex() == (
            "3700000000000000e7e8ca5909000000000000f83f10ac022a290a110a0a747261696e2f6c6f7373150000803e"
            "0a140a0d747261696e2f73616d706c6573150000804045716d6f"
        )

    def test_a_torn_end_of_a_file_costs_its_last_record(self, run: TrackedRun) -> None:
        """A kill may leave one; the next process writes a file of its own."""
        tracker = TensorBoard(run)
        tracker.write(trained(1, 2))
        tracker.close()
        [path] = (run.directory / "tensorboard" / run.key).iterdir()
        path.write_bytes(path.read_bytes()[:-5])
        assert dict(TensorBoard(run).newest()) == {"train": 1}

    def test_files_of_other_programs_stop_nothing(self, run: TrackedRun) -> None:
        """Not damage, not a folder, not a number that no float can hold."""
        folder = run.directory / "tensorboard" / run.key
        (folder / "events.out.tfevents.1.folder").mkdir(parents=True)
        (folder / "events.out.tfevents.2.damaged").write_bytes(record(b"\xff\xff") + b"\0" * 99)
        tracker = TensorBoard(run)
        tracker.write([Point("train", 1, 0.0, {"loss": 1e300})])
        tracker.close()
        assert dict(TensorBoard(run).newest()) == {"train": 1}

    def test_nothing_to_write_leaves_no_file(self, run: TrackedRun) -> None:
        """A tracker that is started again and again would fill the folder."""
        TensorBoard(run).close()
        assert list((run.directory / "tensorboard" / run.key).iterdir()) == []


# -- packages ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins of the three packages, and what their servers hold by run."""
    held: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "wandb", wandb_like(held))
    monkeypatch.setitem(sys.modules, "trackio", trackio_like(held))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow_like(held))
    return held


def wandb_like(held: dict[str, Any]) -> Any:
    def init(*, id: str, resume: str, **_: object) -> Any:
        assert resume == "allow"
        rows = held.setdefault(id, {})
        now = SimpleNamespace(step=max(rows, default=-1) + 1)

        def log(row: dict[str, float], step: int | None = None) -> None:
            if step is not None and step < now.step:
                return  # with a warning
            now.step = now.step if step is None else step
            rows.setdefault(now.step, {}).update(row)
            now.step += step is None

        summary = {name: value for step in sorted(rows) for name, value in rows[step].items()}
        nothing = lambda *_, **__: None  # noqa: E731
        return SimpleNamespace(log=log, summary=summary, define_metric=nothing, finish=nothing)

    return SimpleNamespace(init=init, Settings=lambda **_: None)


class TestWandB(TrackerSuite):
    @pytest.fixture(autouse=True)
    def held(self, packages: dict[str, Any]) -> None:
        self.packages = packages

    def open(self, run: TrackedRun) -> Tracker:
        return WandB(run)

    def rows(self, run: TrackedRun) -> Rows:
        return by_step(list(self.packages[run.key].values()))


def trackio_like(held: dict[str, Any]) -> Any:
    def init(*, name: str, resume: str, private: bool, **_: object) -> Any:
        assert resume == "allow"
        assert private, "a Space that is made for it is not for everybody"
        rows = held.setdefault(name, [])
        return SimpleNamespace(log=lambda row, step: rows.append(row), finish=lambda: None)

    return SimpleNamespace(init=init)


class TestTrackio(TrackerSuite):
    tells_newest = False

    @pytest.fixture(autouse=True)
    def held(self, packages: dict[str, Any]) -> None:
        self.packages = packages

    def open(self, run: TrackedRun) -> Tracker:
        return Trackio(run)

    def rows(self, run: TrackedRun) -> Rows:
        return by_step(self.packages[f"{run.name}-{run.identity[:8]}"])


class MlflowClientLike:
    def __init__(self, held: dict[str, Any]) -> None:
        self.held = held

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name) if name in self.held else None

    def create_experiment(self, name: str) -> str:
        self.held[name] = []
        return name

    def search_runs(self, places: list[str], asked: str, max_results: int) -> list[Any]:
        [tag, value] = asked.removeprefix("tags.`").removesuffix("'").split("` = '")
        return [run for run in self.held[places[0]] if run.tags.get(tag) == value][:max_results]

    def create_run(self, place: str, run_name: str, tags: dict[str, str]) -> Any:
        number = len(self.held[place])
        run = SimpleNamespace(tags=tags, info=SimpleNamespace(run_id=(place, number)), metrics={}, status="")
        self.held[place].append(run)
        return run

    def _run(self, run_id: tuple[str, int]) -> Any:
        return self.held[run_id[0]][run_id[1]]

    def get_run(self, run_id: tuple[str, int]) -> Any:
        newest = {name: value for name, _, _, value in self._run(run_id).metrics}
        return SimpleNamespace(data=SimpleNamespace(metrics=newest))

    def log_batch(self, run_id: tuple[str, int], metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self._run(run_id).metrics |= {(m.key, m.timestamp, m.step, m.value): None for m in metrics}

    def update_run(self, run_id: tuple[str, int], status: str) -> None:
        self._run(run_id).status = status

    def set_terminated(self, run_id: tuple[str, int]) -> None:
        self._run(run_id).status = "FINISHED"


def mlflow_like(held: dict[str, Any]) -> Any:
    def metric(key: str, value: float, timestamp: int, step: int) -> Any:
        return SimpleNamespace(key=key, value=value, timestamp=timestamp, step=step)

    entities = SimpleNamespace(Metric=metric, Param=lambda *given: given)
    return SimpleNamespace(MlflowClient=lambda: MlflowClientLike(held), entities=entities)


class TestMLflow(TrackerSuite):
    @pytest.fixture(autouse=True)
    def held(self, packages: dict[str, Any]) -> None:
        self.packages = packages

    def open(self, run: TrackedRun) -> Tracker:
        return MLflow(run)

    def rows(self, run: TrackedRun) -> Rows:
        [found] = [one for one in self.packages["paceline"] if one.tags["paceline.run"] == run.key]
        rows: Rows = {}
        for name, _, step, value in found.metrics:
            series, _, figure = name.partition("/")
            if figure in ("loss", "acceptance_length"):
                rows.setdefault((series, step), []).append({name: value})
        return rows

    def test_many_points_go_in_calls_that_the_server_takes(self, run: TrackedRun) -> None:
        """A run that is tracked from its end has all its points at once."""
        tracker = MLflow(run)
        tracker.write([*trained(*range(1, 700)), *measured(300)])
        assert len(self.rows(run)) == 700


# -- what goes wrong -----------------------------------------------------------------------


def test_wandb_adds_nothing_of_the_machine_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: dict[str, Any]
) -> None:
    """With these settings W&B 0.31 (offline) recorded no path; without them it did."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(sys.modules["wandb"], "Settings", lambda **given: asked.update(given))
    WandB(TrackedRun("r", "1" * 32, tmp_path)).close()
    told = ("disable_git", "x_disable_meta", "x_disable_machine_info", "x_disable_stats")
    assert {name: asked.get(name) for name in told} == dict.fromkeys(told, True)
    assert asked["save_code"] is False


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the tracker that needs none."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"needs the package {name}") as error:
        TRACKERS.find(name)(TrackedRun("r", "1" * 32, tmp_path))
    assert f"pip install 'paceline[{name}]'" in error.value.next


def test_whatever_a_package_raises_comes_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: dict[str, Any]
) -> None:
    """Its own errors say nothing of the run."""
    tracker = MLflow(TrackedRun("r", "1" * 32, tmp_path))

    def fails(*_: object, **__: object) -> None:
        raise KeyError("server")

    monkeypatch.setattr(MlflowClientLike, "log_batch", fails)
    with pytest.raises(PacelineError, match="MLflow could not take the points") as error:
        tracker.write(trained(1))
    assert "goes on after the last point" in error.value.next
