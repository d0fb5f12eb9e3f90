"""A disk that really fails: what the kernel lost in a failed fsync is never called durable.

A filesystem in a file on a memory filesystem that is full, so that writing back fails; unmounting it
forgets what is only in memory, as a power failure does. Needs root, for mounts in a namespace of its own;
elsewhere it says so in its counts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from paceline.errors import LedgerError, UnknownResultError
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.testing.samples import sample_ref

ROOT = Path(__file__).parents[1]
WAYS = ("waits", "has synced", "comes later")

MOUNTED = """
set -e
mount -t tmpfs -o size=24m paceline-lost-pages "$1"
truncate -s 64M "$1/image"
mkfs.ext4 -q -F -J size=8 -E lazy_itable_init=0,lazy_journal_init=0,nodiscard "$1/image"
mkdir "$1/disk" && mount -o loop "$1/image" "$1/disk"
"$3" -m reliability.lost_pages write "$1" "$2" || true
umount "$1/disk" && mount -o loop "$1/image" "$1/disk"
"$3" -m reliability.lost_pages check "$1" "$2"
umount "$1/disk" && umount "$1"
"""


def run(scale: float, seed: int) -> dict[str, int]:
    counts: Counter[str] = Counter()
    if os.geteuid() or not all(map(shutil.which, ("unshare", "mkfs.ext4", "losetup"))):
        return {"not run: needs root, unshare, losetup and mkfs.ext4": 1}
    for number in range(max(1, round(5 * scale))):
        for way in WAYS:
            with tempfile.TemporaryDirectory(prefix="paceline-lost-pages-") as folder:
                command = ["unshare", "-m", "bash", "-c", MOUNTED, "lost_pages", folder, way, sys.executable]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise AssertionError(f"{way}, number {number}, seed {seed}: {done.stdout}{done.stderr}")
            counts.update(done.stdout.split("\n")[:-1])
    return dict(counts)


def write(folder: Path, way: str) -> None:
    """Commit while the disk below fills up; what a call that returned promised goes to `promised`."""
    child = os.fork()
    if not child:
        _fail(folder, way)
        os._exit(9)  # as a kill would: nothing is closed
    os.waitpid(child, 0)
    if way == WAYS[2]:
        _promise(folder, way, _store(folder))
        os._exit(9)


def _store(folder: Path) -> SQLiteMetadataStore:
    return SQLiteMetadataStore(folder / "disk" / "run" / "ledger.db", durability="full")


def _fail(folder: Path, way: str) -> None:
    first, second = _store(folder), _store(folder)
    lazy = SQLiteMetadataStore(first.path, durability="head")
    first.commit_samples([sample_ref(0)])
    if way == WAYS[1]:
        second.acquire_role("producer", "b")
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 4096, 512, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    for number in range(1, 41):
        lazy.commit_samples([sample_ref(number)])
    try:
        first.commit_samples([sample_ref(41)])
        print("the fault did not strike", flush=True)
    except UnknownResultError:
        print("syncs that failed", flush=True)
    filler.unlink()  # the disk is well again
    if way != WAYS[2]:
        _promise(folder, way, second)


def _promise(folder: Path, way: str, store: SQLiteMetadataStore) -> None:
    try:
        store.acquire_role("consumer", "b")
        store.commit_samples([sample_ref(42)])
    except LedgerError:
        print(f"who {way}: told of it", flush=True)
    else:
        (folder / "promised").write_text(str(store.lsn()))
        print(f"who {way}: wrote it again", flush=True)


def check(folder: Path) -> None:
    """After the power failure."""
    promised = folder / "promised"
    store = _store(folder)
    lsn = store.lsn()
    if promised.exists() and lsn < int(promised.read_text()):
        raise AssertionError(f"change {promised.read_text()} was promised, the ledger ends at {lsn}")
    print("power failures survived", flush=True)
    os._exit(0)


if __name__ == "__main__":
    verb, place = sys.argv[1], Path(sys.argv[2])
    if verb == "write":
        write(place, sys.argv[3])
    else:
        check(place)
