"""Adapters without torch, for thousands of whole runs: an engine, feature stores, and a learner of hashes.

A captured "tensor" is a string of bytes that follows from the sample's id, its seed and its capture
group; the "weights" are a hash chain over every step's samples. So a sample that is lost, repeated, out
of order or of other bytes changes the final 32 bytes. The file store serves processes that are killed and
stopped anywhere; its files are those of the store that hosts share (features/sample_files.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.crashpoints import reach
from paceline.durable_files import FileContent
from paceline.engines.engine import Captured, CaptureRequest
from paceline.errors import EngineError, StoreFullError, TrainingError
from paceline.features.ownership import make_store_id, store_id
from paceline.features.sample_files import SampleFiles
from paceline.features.store import Sealed, Usage, Written
from paceline.features.stores.refusals import corrupt, elsewhere, missing, stale
from paceline.target.facts import TargetFacts
from paceline.training.learner import Sample
from paceline.training.link import Alone, Link, meet
from paceline.types import Feature, FeatureSpec, SampleRef, States, Targets, Tokens

if TYPE_CHECKING:
    from paceline.target.chat_encoder import ChatEncoder

TOKENS = "tokens"
LIGHT_FEATURES = (
    Feature(TOKENS, Tokens(), dtype="uint8"),
    Feature("targets", Targets(), dtype="uint8"),
    Feature("early", States((1, 2, 3)), dtype="uint8"),
    Feature("late", States((4,)), dtype="uint8"),
)
NAMES = tuple(feature.name for feature in LIGHT_FEATURES)
SAMPLE_BYTES = 256  # at least as many as any sample of `light_sample` takes
BY_TOKENS = (2, 7, 10, 12, 17)  # none of the seeds of which a test says what happens in them
MAGIC = b"PLLIGHT1"
HEADER = struct.Struct("<8sQI32s")  # magic, generation, bytes of the id, digest of both and what follows


@dataclass(frozen=True)
class LightTensor:
    """Bytes where a tensor would be."""

    data: bytes

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.data),)


def light_sample(request: CaptureRequest, group: Sequence[str] = (), tail: int = 8) -> Captured:
    """What the engine captures; the tokens begin with the sample's id, so that a learner can name it, and
    `tail` more follow."""
    key = json.dumps([request.sample_id, request.seed, request.temperature, list(group)]).encode()

    def bytes_of(name: str, size: int) -> Any:
        return LightTensor(hashlib.shake_128(name.encode() + key).digest(size))

    tensors = {name: bytes_of(name, size) for name, size in zip(NAMES, (tail, 8, 64, 32), strict=True)}
    tensors[TOKENS] = LightTensor(request.sample_id.encode() + b"\0" + tensors[TOKENS].data)
    return Captured(request.sample_id, tensors)


def uneven_tail(sample_id: str) -> int:
    """The tail of a sample of a run whose samples differ in length: 8, 13, 18 or 23 tokens."""
    return 8 + 5 * (int(sample_id.rpartition(":")[2]) * 7 % 4)


def uneven_length(sample_id: str) -> int:
    """The tokens that the target processed of such a sample: 15 to about 33."""
    return len(sample_id) + uneven_tail(sample_id)


def tokens_per_step(seed: int) -> int | None:
    """The tokens of a step, in a quarter of the seeds; drawn by itself, so that other draws stay the same."""
    return random.Random(f"tokens {seed}").choice((16, 30, 50)) if seed % 20 in BY_TOKENS else None


def id_of(sample: Sample) -> str:
    """The sample id in its tokens."""
    name: bytes = sample[TOKENS].data.partition(b"\0")[0]
    return name.decode()


class LightEngine:
    """A TargetEngine. `refuses` may raise (or kill) over a group: a bad prompt. `uneven`: samples differ in
    length (`uneven_length`)."""

    def __init__(
        self, refuses: Callable[[Sequence[str]], None] | None = None, *, uneven: bool = False
    ) -> None:
        self._refuses, self._tail = refuses, uneven_tail if uneven else lambda _: 8
        self.captured: list[list[str]] = []

    @property
    def facts(self) -> TargetFacts:
        return TargetFacts(8, 4, 256, "uint8", (0,), "light", "bytes")

    @property
    def chats(self) -> ChatEncoder:
        raise EngineError("This target has no chats.")

    def encode(self, prompt: str) -> tuple[int, ...]:
        return tuple(prompt.encode())

    def probe(self) -> None:
        """Nothing to check."""

    def close(self) -> None:
        """Nothing to end."""

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        """The bytes of each depend on the whole group, as those of a real batch do."""
        ids = [request.sample_id for request in group]
        if self._refuses is not None:
            self._refuses(ids)
        assert tuple(features) == LIGHT_FEATURES, "the run's own"
        self.captured.append(ids)
        return [light_sample(request, ids, self._tail(request.sample_id)) for request in group]


class HashLearner:
    """A Learner whose weights are H(weights before, step, every byte of every sample in order).

    `trained` lists the sample ids of every step that the weights contain. `refuses` may raise
    TrainingError (or kill) over the ids of a batch: a bad sample. Any number of ranks gives the same
    weights, because their slices are in order.
    """

    def __init__(
        self, refuses: Callable[[Sequence[str]], None] | None = None, link: Link | None = None
    ) -> None:
        self._refuses = refuses
        self._link = link or Alone()
        self.weights = b""
        self.trained: list[list[str]] = []

    is_sharded = False

    @property
    def ready(self) -> bool:
        return bool(self.weights)

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def opened(self, stored: Sample) -> Sample:
        return stored

    def num_tokens(self, samples: Sequence[Sample]) -> int:
        return len(samples)

    def build(self, samples: Sequence[Sample]) -> None:
        self.attempt(samples)
        self.weights = _hashed(b"build", samples)

    def step(
        self,
        step: int,
        samples: Sequence[Sample],
        num_tokens: int | None = None,
        progress: float | None = None,
    ) -> dict[str, Any]:
        if self._link.size == 1:
            self.attempt(samples)
            self.weights = _hashed(self.weights + step.to_bytes(8, "little"), samples)
            self.trained.append([id_of(sample) for sample in samples])
            return {"loss": self.weights[0] / 256}
        chain, ids = hashlib.sha256(self.weights + step.to_bytes(8, "little")), []
        for sample_id, digest in self._of_all_ranks(step, samples):
            chain.update(bytes.fromhex(digest))
            ids.append(sample_id)
        self.weights = chain.digest()
        self.trained.append(ids)
        return {"loss": self.weights[0] / 256}

    def _of_all_ranks(self, step: int, samples: Sequence[Sample]) -> list[tuple[str, str]]:
        """Id and digest of every rank's samples. Raises on every rank what one of them refuses."""
        mine: dict[str, Any] = {"samples": [(id_of(s), _digest(_pack(s)).hex()) for s in samples]}
        try:
            self.attempt(samples)
        except TrainingError as error:
            mine = {"refuses": error.what}
        said = [json.loads(one) for one in meet(self._link, f"step {step}", json.dumps(mine).encode())]
        for part in said:
            if "refuses" in part:
                raise TrainingError(part["refuses"])
        return [(sample_id, digest) for part in said for sample_id, digest in part["samples"]]

    def check_greedy(self, samples: Sequence[Sample]) -> None:
        """No target, nothing to check."""

    def attempt(self, samples: Sequence[Sample], step: int = 0) -> None:
        if any(sample.keys() != set(NAMES) for sample in samples):
            raise TrainingError("A sample lacks a tensor.", next="report this: the store lost it.")
        if self._refuses is not None:
            self._refuses([id_of(sample) for sample in samples])

    def probe(self, like: Sample) -> None:
        """A hash can always be made."""

    def fingerprint(self) -> str:
        return self.weights.hex()

    def files(self) -> dict[str, bytes]:
        if self._link.rank:
            return {f"rank-{self._link.rank}.json": b"{}"}
        return {"weights.bin": self.weights, "trained.json": json.dumps(self.trained).encode()}

    def load(self, files: Mapping[str, FileContent]) -> None:
        self.weights = bytes(files["weights.bin"])
        self.trained = json.loads(bytes(files["trained.json"]))

    def describe(self) -> dict[str, Any]:
        return {"learner": "hash chain"}


def _hashed(before: bytes, samples: Sequence[Sample]) -> bytes:
    chain = hashlib.sha256(before)
    for sample in samples:
        chain.update(_digest(_pack(sample)))
    return chain.digest()


# -- feature stores ------------------------------------------------------------------------


def _pack(tensors: Mapping[str, Any]) -> bytes:
    return b"".join(len(tensors[name].data).to_bytes(4, "little") + tensors[name].data for name in NAMES)


def _unpack(payload: bytes) -> dict[str, Any]:
    tensors, at = {}, 0
    for name in NAMES:
        size = int.from_bytes(payload[at : at + 4], "little")
        tensors[name] = LightTensor(payload[at + 4 : at + 4 + size])
        at += 4 + size
    return tensors


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _sealed(uri: str, sample_id: str, payload: bytes, generation: int) -> Sealed:
    shapes = {name: tensor.shape for name, tensor in _unpack(payload).items()}
    specs = {name: FeatureSpec(name, shape, "uint8") for name, shape in shapes.items()}
    keys = {name: f"{sample_id}/{generation}/{name}" for name in NAMES}
    return Sealed(uri, keys, specs, len(payload), _digest(payload).hex())


def _full(sample_id: str, budget_bytes: int) -> StoreFullError:
    return StoreFullError(
        f"Sample {sample_id!r} does not fit into {budget_bytes} bytes.",
        why="A sample's bytes stay until a durable checkpoint covers it.",
        next="raise the budget, or save a checkpoint sooner.",
    )


class InMemoryLightFeatureStore:
    """In a dictionary, for runs in one process. `wipe` is a reboot: another uri, nothing there."""

    def __init__(self, budget_bytes: int = 1 << 20, *, uri: str = "light://0") -> None:
        self.uri = uri
        self.budget_bytes = budget_bytes
        self.held: dict[str, tuple[int, bytes]] = {}  # generation and payload by sample id
        self._newest = 0

    def put(self, sample_id: str, tensors: Mapping[str, Any], *, generation: int = 0) -> Sealed:
        known = self.held.get(sample_id)
        if known is not None and generation in (0, known[0]):
            return _sealed(self.uri, sample_id, known[1], known[0])
        if known is not None and generation < known[0]:
            raise stale(sample_id, generation, known[0])
        payload = _pack(tensors)
        self.held.pop(sample_id, None)
        if self.usage().resident_bytes + len(payload) > self.budget_bytes:
            raise _full(sample_id, self.budget_bytes)
        self._newest = generation or self._newest + 1
        self.held[sample_id] = self._newest, payload
        return _sealed(self.uri, sample_id, payload, self._newest)

    def get(self, ref: SampleRef) -> dict[str, Any]:
        if ref.feature_store_uri != self.uri:
            raise elsewhere(ref, self.uri)
        generation, payload = self.held.get(ref.sample_id, (0, b""))
        keys = _sealed(self.uri, ref.sample_id, payload, generation).keys
        if not payload or ref.feature_keys != keys:
            raise missing(ref, "they were freed, or never sealed here")
        if _digest(payload).hex() != ref.metadata.get("digest"):
            raise corrupt(ref, "other bytes lie there")
        return _unpack(payload)

    def free(self, written: Iterable[Written]) -> None:
        for sample_id, generation in written:
            if sample_id in self.held and generation in (0, self.held[sample_id][0]):
                del self.held[sample_id]

    def written(self) -> list[Written]:
        return [(sample_id, generation) for sample_id, (generation, _) in self.held.items()]

    def usage(self) -> Usage:
        resident = sum(len(payload) for _, payload in self.held.values())
        return Usage(resident, len(self.held), self.budget_bytes)

    def generations(self) -> dict[str, int]:
        """Of what is there, by sample id."""
        return dict(self.written())

    def lose(self, sample_id: str) -> None:
        del self.held[sample_id]

    def damage(self, sample_id: str) -> None:
        """Flip a bit."""
        generation, payload = self.held[sample_id]
        self.held[sample_id] = generation, payload[:-1] + bytes([payload[-1] ^ 1])

    def wipe(self, uri: str) -> None:
        self.held.clear()
        self.uri, self._newest = uri, 0

    def close(self) -> None:
        """Nothing to detach from."""

    def destroy(self) -> None:
        self.held.clear()


class LightFeatureStore:
    """A file for each sample in one folder, for several processes: those of the store that hosts share."""

    def __init__(self, folder: Path, *, budget_bytes: int = 1 << 20, owner: bool) -> None:
        self.folder = folder
        self._budget_bytes = budget_bytes
        self._files = SampleFiles(folder, sleep=lambda _: None)
        if owner:
            make_store_id(folder)

    def _uri(self) -> str:
        found = store_id(self.folder)
        return f"light://{found}" if found else ""

    def put(self, sample_id: str, tensors: Mapping[str, Any], *, generation: int = 0) -> Sealed:
        """`generation`: that of the ledger, which also counts the bytes."""
        known = self._read(sample_id, generation) if self._files.is_there(sample_id, generation) else None
        if known is not None:
            return _sealed(self._uri(), sample_id, known, generation)
        payload = _pack(tensors)
        data = _with_header(sample_id, payload, generation)
        self._files.write(sample_id, generation, lambda fd: _write(fd, data))
        return _sealed(self._uri(), sample_id, payload, generation)

    def _read(self, sample_id: str, generation: int) -> bytes | None:
        """The payload; None if the file is damaged. Raises FileNotFoundError."""
        with self._files.open(sample_id, generation) as file:
            known = _parsed(file.read())
        return known[1] if known is not None and known[0] == generation else None

    def get(self, ref: SampleRef) -> dict[str, Any]:
        if ref.feature_store_uri != self._uri():
            raise elsewhere(ref, self._uri() or "no store")
        try:
            payload = self._read(ref.sample_id, ref.generation)
        except FileNotFoundError as error:
            raise missing(ref, "they were freed, or never sealed here") from error
        if payload is None:
            raise corrupt(ref, "the header is damaged")
        if _digest(payload).hex() != ref.metadata.get("digest"):
            raise corrupt(ref, "other bytes lie there")
        return _unpack(payload)

    def free(self, written: Iterable[Written]) -> None:
        """Damaged files, too, and what was written aside and never renamed."""
        for one in written:
            reach("features.free.between")
            self._files.free([one])

    def written(self) -> list[Written]:
        """Whole ones: a damaged one is found by its reader. Of those half-written no id is known."""
        found: list[Written] = []
        for file in self._files.list(anew=True):
            if not file.is_sealed:
                found.append(("", file.generation))
                continue
            with suppress(FileNotFoundError):
                data = file.path.read_bytes()
                if (known := _parsed(data)) is not None:
                    found.append((_id_in(data), known[0]))
        return found

    def usage(self) -> Usage:
        sizes = []
        for file in self._files.list():
            with suppress(FileNotFoundError):
                sizes.append(file.path.stat().st_size)
        return Usage(sum(sizes), len(sizes), self._budget_bytes, is_current=False)

    def left(self) -> list[str]:
        """The names of all files that samples have here."""
        return [file.path.name for file in self._files.list()]

    def damage(self, rng: random.Random) -> None:
        """Delete or alter one sample's file, if there is any."""
        files = [file.path for file in self._files.list() if file.is_sealed]
        if not files:
            return
        path = rng.choice(files)
        with suppress(FileNotFoundError):  # freed meanwhile
            if rng.random() < 0.5:
                path.unlink()
                return
            with path.open("r+b", buffering=0) as file:  # one byte: a reader meets all of the damage or none
                at = rng.randrange(os.fstat(file.fileno()).st_size)
                [byte] = os.pread(file.fileno(), 1, at)
                os.pwrite(file.fileno(), bytes([byte ^ 1 << rng.randrange(8)]), at)

    def close(self) -> None:
        """Nothing to detach from."""

    def destroy(self) -> None:
        self.free(self.written())


def _write(fd: int, data: bytes) -> None:
    os.write(fd, data)


def _with_header(sample_id: str, payload: bytes, generation: int) -> bytes:
    rest = sample_id.encode() + payload
    size = len(sample_id.encode())
    return HEADER.pack(MAGIC, generation, size, _digest(b"%d %d " % (generation, size) + rest)) + rest


def _parsed(data: bytes) -> tuple[int, bytes] | None:
    """Generation and payload; None if the file is damaged."""
    if len(data) < HEADER.size:
        return None
    magic, generation, size, digest = HEADER.unpack_from(data)
    rest = data[HEADER.size :]
    if magic != MAGIC or _digest(b"%d %d " % (generation, size) + rest) != digest:
        return None
    return generation, rest[size:]


def _id_in(data: bytes) -> str:
    size: int = HEADER.unpack_from(data)[2]
    return data[HEADER.size : HEADER.size + size].decode()
