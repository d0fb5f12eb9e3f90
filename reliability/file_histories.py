"""Power failures and failing calls under checkpoints, replaced files and the ref channel, by the thousand."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from paceline.testing import channel_history, checkpoint_history
from paceline.testing.recording_files import CODES, failing

CHECKPOINT_HISTORIES = 60
CHANNEL_HISTORIES = 150
FAULT_SEEDS = 3


def run(scale: float, seed: int) -> dict[str, int]:
    """Images of seeded histories, then every n-th fault of each kind; with the failed fsyncs, images too."""
    counts: Counter[str] = Counter()

    def add(name: str, found: Counter[str], *keys: str) -> None:
        counts.update({f"{name} {key}": found[key] for key in keys})

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        place = Path(folder)
        for number in range(round(CHECKPOINT_HISTORIES * scale)):
            at = place / f"checkpoints-{number}"
            found = checkpoint_history.lose_power(at, 1000 * seed + number, saves=6, per_point=4)
            add("checkpoint", found, "images", "operations", "Killed", "CheckpointError")
        for number in range(round(CHANNEL_HISTORIES * scale)):
            at = place / f"channel-{number}"
            found = channel_history.lose_power(at, 1000 * seed + number, rounds=20, per_point=6)
            add("channel", found, "images")
        for number in range(max(1, round(FAULT_SEEDS * scale))):
            base = 1000 * seed + number
            for code, value in CODES.items():
                for lasting in (False, True):
                    at = place / f"{code}-{lasting}-{number}"
                    found = checkpoint_history.fail_every_call(at, base, failing(value), lasting=lasting)
                    counts[f"checkpoint {code}"] += found["faults"]
                found = channel_history.fail_every_call(place / f"channel-{code}-{number}", failing(value))
                counts[f"channel {code}"] += found["faults"]
            found = checkpoint_history.fail_every_call(
                place / f"short-{number}", base, None, kinds=("write",)
            )
            counts["checkpoint short writes"] += found["faults"]
            found = checkpoint_history.fail_every_call(
                place / f"sync-{number}", base, failing(CODES["EIO"]), kinds=("sync",), per_point=2
            )
            counts["checkpoint failed syncs"] += found["faults"]
            counts["images after failed syncs"] += found["images"]
    return dict(counts)
