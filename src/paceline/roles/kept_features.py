"""The features of a comparison, kept on a disk and verified; kept_capture.py captures them.

A folder `features-*` of the comparison holds a ledger, the answers, a file per sample, and `identity.json`:
the target, data, settings and prompts that it is bound to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from paceline.data.source import Beginning, RunPrompts
from paceline.durable_files import replace_file
from paceline.engines.engine import CaptureRequest, TargetEngine
from paceline.errors import FeatureMissingError, StoreError
from paceline.evaluation.heldout import HeldOut
from paceline.features.merged import covers, feature_named, merged, num_targets, of_method
from paceline.features.stores.files import FileFeatureStore
from paceline.ledger.facts import RENDERING_DATE
from paceline.ledger.records import Entry, State
from paceline.ledger.settings import SqliteSection
from paceline.methods.method import DraftMethod
from paceline.roles.comparison import digest_of
from paceline.roles.held_out import Encodes, held_out_prompts
from paceline.roles.plan import RunPlan
from paceline.target.facts import TargetFacts
from paceline.target.head import TargetHead
from paceline.target.version import TargetVersion
from paceline.training.replay import KeptSample
from paceline.types import Feature, SampleRef, ref_from_json, ref_to_json

IDENTITY, FEATURES, HELD_OUT = "identity.json", "features", "held_out"


@dataclass(frozen=True)
class Asked:
    """`num_prompts`: the first so many of the data are answered; `methods`: of all variants."""

    plan: RunPlan
    num_prompts: int
    methods: Sequence[DraftMethod]
    head: TargetHead

    @property
    def source(self) -> RunPrompts:
        plan, size = self.plan, self.plan.prompts.size
        if self.num_prompts == size:
            return plan.source([plan.stretch])
        return RunPrompts(Beginning(plan.prompts, self.num_prompts), plan.config.data.rounds)

    def held_out(self, target: Encodes) -> HeldOut:
        positions = self.head.config.get("max_position_embeddings")
        return held_out_prompts(self.plan.config, target, self.head.vocab_size, positions)

    def needed(self, facts: TargetFacts) -> tuple[Feature, ...]:
        return merged(method.features(facts) for method in self.methods)

    def identity(self) -> dict[str, Any]:
        """What decides the bits of the features, as JSON values."""
        config, version = self.plan.config, TargetVersion.of(self.plan.config.target.model)
        engine = config.engine
        return {
            "target": [version.model, version.tokenizer],
            "template": config.target.model_dump(mode="json", exclude={"model", "revision"}),
            "engine": engine.model_dump(mode="json", exclude=set(engine.changeable)),
            "data": config.data.model_dump(mode="json", exclude=set(config.data.changeable)),
            "prompts": [[block.first, block.count, block.digest] for block in self.source.blocks()],
            "group_size": config.capture.group_size,
            "seed": config.run.seed,
            "threads": config.machine.producer_threads,
        }


class KeptFeatures:
    """One folder of features. `features`: the merged ones that its samples hold."""

    def __init__(self, folder: Path, budget_bytes: int = 0) -> None:
        """Raises OSError, ValueError or LookupError for a folder that is none."""
        self.folder = folder
        told = json.loads((folder / IDENTITY).read_bytes())
        self.dtype: str = told["dtype"]
        self.features = tuple(feature_named(name, rows) for name, rows in told[FEATURES].items())
        self.store = FileFeatureStore(folder / "samples", budget_bytes=budget_bytes)

    def samples(self) -> list[KeptSample]:
        """Every sample of the log, verified, in log order. Raises FeatureMissingError if some are damaged."""
        found, damaged = [], list[str]()
        for entry in self._entries:
            count = self._targets_of(entry)
            if count is None:
                damaged.append(entry.sample_id)
            else:
                found.append(KeptSample(entry.sample_id, entry.place, count, entry.ref.num_tokens))
        if damaged:
            raise FeatureMissingError(
                f"{len(damaged)} of {len(self._entries)} kept samples are damaged (first: {damaged[0]}).",
                why="Training on other samples would compare variants on different data.",
                next="run the same command again: it captures them again.",
            )
        return found

    @cached_property
    def _entries(self) -> Sequence[Entry]:
        with closing(SqliteSection().open(self.folder, "")) as ledger:
            return ledger.read(0, ledger.snapshot().settled).entries

    @cached_property
    def _refs(self) -> dict[str, SampleRef]:
        return {entry.sample_id: entry.ref for entry in self._entries}

    def _targets_of(self, entry: Entry) -> int | None:
        """How many tokens of a sound sample are to be predicted; a damaged one is freed."""
        if entry.state == State.PRESENT:
            try:
                return num_targets(self.store.get(entry.ref), self.features)
            except StoreError:
                self.store.free([(entry.sample_id, entry.ref.generation)])
        return None

    def is_greedy(self, sample: KeptSample) -> bool:
        return bool(self._refs[sample.sample_id].metadata.get("greedy"))

    def read(self, sample: KeptSample, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """The sample's tensors for a method of these features. Raises StoreError."""
        return self.as_of_method(self.store.get(self._refs[sample.sample_id]), features)

    def as_of_method(
        self, sample: Mapping[str, torch.Tensor], features: Sequence[Feature]
    ) -> dict[str, torch.Tensor]:
        """The tensors of a method's features from a sample of the merged ones."""
        return of_method(sample, self.features, features)

    @property
    def is_complete(self) -> bool:
        """Whether the capture has ended; its files may have been damaged since."""
        with closing(SqliteSection().open(self.folder, "")) as ledger:
            now = ledger.snapshot()
        return now.closed and not now.prompts.open

    @property
    def date(self) -> str | None:
        """What the target's template took for today."""
        with closing(SqliteSection().open(self.folder, "")) as ledger:
            date: str | None = ledger.facts().get(RENDERING_DATE)
        return date

    # -- the target's answers to held-out prompts ------------------------------------------------

    def held_out(self, held_out: HeldOut, num_tokens: int) -> list[dict[str, torch.Tensor]] | None:
        """The merged features of the target's greedy answers; None if they were not kept, or are damaged."""
        store = FileFeatureStore(self.folder / HELD_OUT, budget_bytes=0)
        try:
            refs = json.loads(self._held_out_list(held_out, num_tokens).read_bytes())
            return [store.get(ref_from_json(ref)) for ref in refs]
        except (OSError, ValueError, StoreError):
            return None

    def keep_held_out(self, held_out: HeldOut, num_tokens: int, engine: TargetEngine, size: int) -> None:
        """Let the target answer the prompts, in groups of `size`, and keep the features."""
        store = FileFeatureStore(self.folder / HELD_OUT, budget_bytes=1 << 60)
        listed, path = list[str](), self._held_out_list(held_out, num_tokens)
        for first in range(0, len(held_out.asked), size):
            group = [
                CaptureRequest(f"{path.stem}:{asked.prompt_id}", asked.token_ids, (), num_tokens)
                for asked in held_out.asked[first : first + size]
            ]
            for sample in engine.capture(group, self.features):
                store.free([(sample.sample_id, 0)])
                sealed = store.put(sample.sample_id, sample.tensors)
                ref = SampleRef(
                    sample.sample_id,
                    "held-out",
                    None,
                    sealed.uri,
                    sealed.keys,
                    sealed.specs,
                    strategy="comparison",
                    metadata={"digest": sealed.digest},
                )
                listed.append(ref_to_json(ref))
        replace_file(path, json.dumps(listed).encode())

    def _held_out_list(self, held_out: HeldOut, num_tokens: int) -> Path:
        return self.folder / f"{HELD_OUT}-{digest_of([held_out.prompts, num_tokens])}.json"


def find_kept(directory: Path, asked: Asked) -> KeptFeatures | None:
    """A folder of the same identity whose samples hold what the methods ask for; complete or not."""
    identity = json.loads(json.dumps(asked.identity()))
    for path in sorted(directory.glob(f"features-*/{IDENTITY}")):
        try:
            told = json.loads(path.read_bytes())
            kept = KeptFeatures(path.parent)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # the capture was killed before it began, or it is not ours
        needed = asked.needed(replace(asked.head.facts, dtype=kept.dtype))
        if told["identity"] == identity and covers(kept.features, needed):
            return kept
    return None
