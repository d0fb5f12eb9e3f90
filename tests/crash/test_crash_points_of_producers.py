"""SIGKILL of one of three producers at every named point of its work: the others capture the rest, same bits.

Two producers die at the n-th time they reach the point. The third one, which has another name and other
slots of the store, takes them for dead and ends the run. Ledger, shared memory, answers and kills are real.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paceline.ledger.facts import producers_in
from paceline.ledger.stores.sqlite import SQLiteLedger
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

def start(name, crash_at, worker, store):
    folder = Path(name)
    arm(crash_at)
    if store == "shm":
        kind, more = SharedMemoryFeatureStore, {"writer": int(worker)}
    else:
        kind, more = DirectoryFeatureStore, {}
    features = kind(folder / "features", budget_bytes=8 << 20, owner=True, **more)
    run = SmallRun(folder, features=features, passes=2)
    run.place = {"worker": worker, "timeout_s": 0.5}
    if crash_at:
        run.producer()[1]()
        return
    trainer = run.run()
    assert features.usage().resident_samples == 0, "nothing may stay behind"
    save_file(weights(trainer), folder / "final.safetensors")

start(*sys.argv[1:])
"""

POINTS = [
    "ledger.lease.after:1",
    "ledger.reserve.after:1",
    "features.put.before_seal:2",
    "ledger.commit.before:1",
    "ledger.commit.after:1",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return weights(SmallRun(tmp_path_factory.mktemp("plain"), passes=2).run())


@pytest.mark.parametrize(
    ("store", "point"), [*(("shm", p) for p in POINTS), ("directory", POINTS[2]), ("directory", POINTS[3])]
)
def test_producers_that_die_anywhere_cost_nothing(
    tmp_path: Path,
    uninterrupted: dict[str, torch.Tensor],
    forked_commands: ForkedCommands,
    store: str,
    point: str,
) -> None:
    """No sample is lost or trained twice, and neither bytes nor leases are left behind.

    A name may be, if its holder had nothing that the third producer had to wait for.
    """
    for worker in ("1", "2"):
        assert forked_commands.script(RUN, str(tmp_path), point, worker, store).returncode == -9
    last = forked_commands.script(RUN, str(tmp_path), "", "0", store)
    assert last.returncode == 0, last.stderr
    assert same_bits(load_file(tmp_path / "final.safetensors"), uninterrupted)
    ledger = SQLiteLedger(tmp_path / "ledger.db")
    now, owned = ledger.snapshot(), ledger.ownership()
    assert (now.committed, now.samples_trained, now.prompts.open) == (14, 14, 0)
    assert not owned.present
    assert not owned.promised
    assert not owned.revoked
    assert not any(told["holds"] for told in producers_in(now.facts).values())
