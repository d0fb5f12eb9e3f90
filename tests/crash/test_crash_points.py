"""SIGKILL at every named point of the protocol, again and again, then to the end: the same bits.

The first starts of the run die at the n-th time they reach the point, recovery included; the last one
goes to the end. Target and method are small (no transformers), the ledger, the shared memory, the
checkpoints and the kills are real.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paceline import SQLiteMetadataStore
from paceline.testing.forked_commands import ForkedCommands
from paceline.testing.small_run import SmallRun, same_bits, weights

RUN = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from paceline.features.stores.directory import DirectoryFeatureStore
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.testing.kill_points import arm
from paceline.testing.small_run import SmallRun, weights

STORES = {"shm": SharedMemoryFeatureStore, "directory": DirectoryFeatureStore}

def start(name, crash_at, store):
    folder = Path(name)
    arm(crash_at)
    features = STORES[store](folder / "features", budget_bytes=8 << 20, owner=True)
    run = SmallRun(folder, features=features, passes=2)
    trainer = run.run()
    assert features.usage().resident_samples == 0, "nothing may stay behind"
    save_file(weights(trainer), folder / "final.safetensors")

start(*sys.argv[1:])
"""

POINTS = [
    "features.put.before_seal:5",
    "features.put.after:5",
    "engine.capture.after:2",
    "ledger.commit.before:2",
    "ledger.commit.after:2",
    "learner.step.before:2",
    "learner.step.after:2",
    "ledger.plan.before:3",
    "checkpoint.before_rename:2",
    "checkpoint.before_sync:2",
    "ledger.head.before:2",
    "ledger.head.after:2",
    "ledger.release.after:4",
    "ledger.before_commit:20",
    "ledger.after_commit:20",
]
OF_FEATURES = ["features.put.before_seal:5", "ledger.commit.before:2", "ledger.release.after:4"]
KILLS = 2


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return weights(SmallRun(tmp_path_factory.mktemp("plain"), passes=2).run())


@pytest.mark.parametrize(
    ("store", "point"), [*(("shm", p) for p in POINTS), *(("directory", p) for p in OF_FEATURES)]
)
def test_repeated_kills_end_in_the_same_weights(
    tmp_path: Path,
    uninterrupted: dict[str, torch.Tensor],
    forked_commands: ForkedCommands,
    store: str,
    point: str,
) -> None:
    """Nothing is lost, nothing is trained twice, and no slot or folder is left behind."""
    deaths = [forked_commands.script(RUN, str(tmp_path), point, store).returncode for _ in range(KILLS)]
    assert deaths[0] == -9, "the point was never reached"
    assert set(deaths) <= {-9, 0}
    last = forked_commands.script(RUN, str(tmp_path), "", store)
    assert last.returncode == 0, last.stderr
    assert same_bits(load_file(tmp_path / "final.safetensors"), uninterrupted)
    store = SQLiteMetadataStore(tmp_path / "ledger.db")
    assert store.all_committed_ids() == [f"small:{n}" for n in range(14)]
    assert store.durable_marker()["acked"] == set(store.all_committed_ids())
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert folders == {record.name for record in store.snapshot().checkpoints}
