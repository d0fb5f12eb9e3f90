"""The stores that reach over hosts, each against its bare medium in the same run.

    python -m benchmarks.between_hosts [--mooncake]

Mooncake: samples against raw calls of its client with objects of as many bytes, over TCP on loopback, by two
clients of one process; run it in a network namespace (`make test-mooncake`). The shared folder: samples
against safetensors files that are written beside their names and renamed, and loaded. Rounds alternate, so
both sides see the same machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.record import commit, keep
from benchmarks.rows import Row, against
from benchmarks.transports import payload_bytes, sample
from paceline.features.settings import MooncakeSection
from paceline.features.stores.directory import DirectoryFeatureStore
from paceline.features.stores.mooncake.link import connect
from paceline.features.stores.mooncake.store import MooncakeFeatureStore
from paceline.testing.feature_store_suite import feature_ref
from paceline.testing.mooncake_master import MooncakeMaster, is_alone

SIZES = {"8 MB": 8 << 20, "1 MB": 1 << 20}
ROUND_BYTES = 64 << 20
ROUNDS = 9

Side = Callable[[int], object]


def rates(ours: Side, bare: Side, num_bytes: int, tidy: Side = lambda _: None) -> tuple[list[float], ...]:
    """GB/s of each, in pairs; a warm-up before. Each is called with the round's number."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 1):
        for kept, side in zip(found, (ours, bare), strict=True):
            began = time.perf_counter()
            side(number)
            took = time.perf_counter() - began
            if number:
                kept.append(num_bytes / took / 1e9)
        tidy(number)
    return found


def over_mooncake(name: str, size: int, folder: Path) -> list[Row]:
    tensors = sample(size)
    count = ROUND_BYTES // size
    master = MooncakeMaster(folder / "master")
    section = MooncakeSection(master=master.address)
    near, taking = connect(section, 4 * ROUND_BYTES >> 20), connect(section)
    giving = near
    writer = MooncakeFeatureStore(giving, "bench", budget_bytes=1 << 40, owner=True)
    reader = MooncakeFeatureStore(taking, "bench", budget_bytes=1 << 40, owner=False)
    room = 2 * ROUND_BYTES
    further = MooncakeFeatureStore(taking, "bench", budget_bytes=1 << 40, owner=True)
    into, raw = reader.buffer(room), writer.buffer(room)
    back = reader.buffer(room)
    object_bytes = writer.put("one", tensors, generation=1 << 40).num_bytes
    starts = [number * (-(-object_bytes // 64) * 64) for number in range(count)]

    def put(number: int) -> None:
        for n in range(count):
            writer.put(f"s{n}", tensors, generation=number + 1)

    def raw_put(number: int) -> None:
        for n in range(count):
            giving.put(f"raw/{number}-{n}", raw.address + starts[n], object_bytes)

    def tidy(number: int) -> None:
        giving.remove([f"raw/{number}-{n}" for n in range(count)])
        writer.free([(f"s{n}", number + 1) for n in range(count)])

    puts = rates(put, raw_put, count * object_bytes, tidy)
    giving, writer, raw = taking, further, further.buffer(room)
    sent = rates(put, raw_put, count * object_bytes, tidy)
    refs = [feature_ref(f"s{n}", writer.put(f"s{n}", tensors, generation=99)) for n in range(count)]
    raw_put(0)

    def get(_: int) -> None:
        found = reader.get_many(refs, into=into)
        assert all(isinstance(one, dict) for one in found)

    def raw_get(_: int) -> None:
        keys = [f"raw/0-{n}" for n in range(count)]
        taking.get(keys, [back.address + start for start in starts], [object_bytes] * count)

    def get_each(_: int) -> None:
        for ref in refs:
            reader.get(ref)

    def raw_get_each(_: int) -> None:
        for n in range(count):
            taking.get([f"raw/0-{n}"], [back.address + starts[n]], [object_bytes])

    gets, singles = (
        rates(get, raw_get, count * object_bytes),
        rates(get_each, raw_get_each, count * object_bytes),
    )
    for link in (taking, near):
        link.close()
    master.kill()
    return [
        against(
            f"put into the producer's own memory, {name}, digested", *puts, "GB/s", limit_name="raw upsert"
        ),
        against(f"put into another one's memory, {name}, digested", *sent, "GB/s", limit_name="raw upsert"),
        against(f"get_many into registered memory, {name}", *gets, "GB/s", limit_name="raw batch_get_into"),
        against(f"get one by one, {name}", *singles, "GB/s", limit_name="raw batch_get_into of one"),
    ]


def in_a_folder(name: str, size: int, folder: Path) -> list[Row]:
    tensors = sample(size)
    count = ROUND_BYTES // size
    store = DirectoryFeatureStore(folder / "store", budget_bytes=1 << 40, owner=True)
    plain = folder / "plain"
    plain.mkdir()

    def put(number: int) -> None:
        for n in range(count):
            store.put(f"s{n}", tensors, generation=number * count + n + 1)

    def save(number: int) -> None:
        for n in range(count):
            path = plain / f"{number}-{n}.safetensors"
            save_file(tensors, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)

    def tidy(number: int) -> None:
        for n in range(count):
            (plain / f"{number}-{n}.safetensors").unlink()

    puts = rates(put, save, count * payload_bytes(tensors), tidy)
    refs = [feature_ref(f"s{n}", store.put(f"s{n}", tensors, generation=10**6 + n)) for n in range(count)]
    save(0)

    def get(_: int) -> None:
        for ref in refs:
            store.get(ref)

    def load(_: int) -> None:
        for n in range(count):
            for tensor in load_file(plain / f"0-{n}.safetensors").values():
                tensor.clone()  # it is mapped; a step reads it

    gets = rates(get, load, count * payload_bytes(tensors))
    store.destroy()
    return [
        against(f"put into a shared folder, {name} samples, digested", *puts, "GB/s", limit_name="save_file"),
        against(f"get from it, {name}", *gets, "GB/s", limit_name="load_file and a copy"),
    ]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--mooncake", action="store_true")
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="paceline-bench-") as name:
        for label, size in SIZES.items():
            rows += in_a_folder(label, size, _made(Path(name) / f"folder {label}"))
            if asked.mooncake:
                assert is_alone(), "Mooncake's clients listen on all addresses: use `make test-mooncake`"
                rows += over_mooncake(label, size, _made(Path(name) / f"mooncake {label}"))
    for one in rows:
        print(
            f"{one['name']:60} {one['value']:6.2f} {one['unit']} of {one['limit']:6.2f}: {one['ratio']:.2f}"
        )
    load = os.getloadavg()[0]  # the other work of the machine takes its share of both sides, and of ours more
    report: dict[str, Any] = {"commit": commit(), "load_average": load, "rounds": ROUNDS, "rows": rows}
    print(keep("between-hosts", report))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
