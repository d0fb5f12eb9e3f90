"""A sample that kills the process: the run is started again and again, and ends without that sample.

The kills are real. Nothing of the process that died can report what killed it; the isolation in the ledger
(ledger/isolation.py) narrows it down over the restarts.
"""

from __future__ import annotations

from pathlib import Path

from paceline import SQLiteMetadataStore
from paceline.testing.forked_commands import ForkedCommands

RUN = """
import os, signal, sys
from pathlib import Path
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.methods.eagle3 import method
from paceline.testing.small_run import SmallRun
from paceline.training.worker import Worker

def die():
    os.kill(os.getpid(), signal.SIGKILL)

folder, where, killing = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
features = SharedMemoryFeatureStore(folder / "features", budget_bytes=8 << 20, owner=True)
run = SmallRun(folder, features=features, passes=2)
if where == "engine":
    real = run.engine.capture
    def capture(group, features):
        return die() if any(r.sample_id == killing for r in group) else real(group, features)
    run.engine.capture = capture
if where == "trainer":
    real_fetch, real_collate = Worker.fetch, method.Eagle3Method.collate
    bad = []
    def fetch(self, order):
        answer = real_fetch(self, order)
        bad.extend(id(sample) for i, (_, sample) in self._held.items() if i == killing)
        return answer
    def collate(self, samples, device, visit=None):
        return die() if any(id(s) in bad for s in samples) else real_collate(self, samples, device, visit)
    Worker.fetch, method.Eagle3Method.collate = fetch, collate
if where == "engine":
    # The producer alone: in one process its deaths would be laid to the consumer's samples, too.
    run.producer()[1]()
run.run()
assert features.usage().resident_samples == 0, "nothing may stay behind"
"""
STARTS_MAX = 12


def run_to_the_end(forked_commands: ForkedCommands, folder: Path, where: str, killing: str) -> int:
    """Start the run until it ends by itself, as a supervisor would; how often it was started."""
    for starts in range(1, STARTS_MAX + 1):
        start = forked_commands.script(RUN, str(folder), where, killing)
        if start.returncode == 0:
            return starts
        assert start.returncode == -9, f"it may die of the sample and of nothing else: {start.stderr}"
    raise AssertionError(f"{STARTS_MAX} starts were not enough")


def test_a_prompt_that_kills_the_engine_fails(forked_commands: ForkedCommands, tmp_path: Path) -> None:
    """All other samples are trained."""
    assert run_to_the_end(forked_commands, tmp_path, "engine", "small:5") > 1
    store = SQLiteMetadataStore(tmp_path / "ledger.db")
    assert store.failed() == {5: "5: the engine's process dies of this prompt"}
    assert store.durable_marker()["acked"] == {f"small:{n}" for n in range(14)} - {"small:5"}


def test_a_sample_that_kills_the_trainer_is_quarantined(
    forked_commands: ForkedCommands, tmp_path: Path
) -> None:
    """The steps before its own count, its own goes on without it, and everything else is trained."""
    assert run_to_the_end(forked_commands, tmp_path, "trainer", "small:5") > 1
    store = SQLiteMetadataStore(tmp_path / "ledger.db")
    assert store.quarantined() == {"small:5": "the consumer's process dies of this sample"}
    assert store.durable_marker()["acked"] == {f"small:{n}" for n in range(14)} - {"small:5"}
