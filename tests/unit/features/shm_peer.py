"""The other process of test_shm.py: obeys one command a line, answers one line of JSON each.

Started as `shm_peer.py DIRECTORY owner|reader KILL_POINT`. Commands: put ID SEED, get REF, free ID, usage,
written.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from paceline.errors import StoreError
from paceline.features.stores.shm import SharedMemoryFeatureStore
from paceline.testing.feature_store_suite import MIB, assert_same, feature_ref, features
from paceline.testing.kill_points import arm, pointed
from paceline.types import ref_from_json, ref_to_json


def obey(store: SharedMemoryFeatureStore, verb: str, rest: str) -> str:
    match verb:
        case "put":
            sample_id, seed = rest.split()
            return ref_to_json(feature_ref(sample_id, store.put(sample_id, features(int(seed)))))
        case "get":
            ref = ref_from_json(rest)
            assert_same(store.get(ref), features(int(ref.sample_id.removeprefix("s"))))
            return "true"
        case "free":
            store.free([(rest, 0)])
            return "true"
        case "usage":
            return json.dumps(dataclasses.asdict(store.usage()))
        case "written":
            return json.dumps(store.written())
    raise AssertionError(verb)


def main(directory: Path, role: str, kill_at: str) -> None:
    arm(kill_at)
    bare = SharedMemoryFeatureStore(directory, budget_bytes=8 * MIB, owner=role == "owner")
    store = pointed(bare, "features")
    for line in sys.stdin:
        verb, _, rest = line.strip().partition(" ")
        try:
            answer = obey(store, verb, rest)
        except StoreError as error:
            answer = json.dumps({"error": type(error).__name__})
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
