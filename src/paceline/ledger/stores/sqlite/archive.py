"""The archive of steps and samples that no recovery can need, and the history of steps.

No recovery goes back behind the oldest checkpoint kept, and no consumer reads the log before the place
where that checkpoint resumes. The rows before it are replaced by compressed chunks of steps, which only
`paceline inspect` and the checker read.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Collection, Iterator
from itertools import takewhile
from typing import Any

from paceline.crashpoints import reach
from paceline.errors import SchemaError
from paceline.ledger.records import TrainedSample, TrainedStep
from paceline.ledger.stores.sqlite.database import change
from paceline.ledger.stores.sqlite.prompts import PromptTable
from paceline.types import SampleRef

BLOCK = 4096  # visits in one chunk, about
UNKNOWN_PLACE = -1  # the place of a planned sample that was never committed


def compressed(data: bytes) -> bytes:
    """As lzma.compress, whose window of 8 MiB costs 10 ms a call: one as long as `data` does as well."""
    window = min(max(4 << 10, len(data)), 8 << 20)
    how = {"id": lzma.FILTER_LZMA2, "preset": lzma.PRESET_DEFAULT, "dict_size": window}
    return lzma.compress(data, filters=[how])


class Archive(PromptTable):
    archive_from = BLOCK  # how many samples or steps must be ready before any is archived
    block_size = BLOCK

    @change(final=True)  # the caller removes the folders next
    def retire(self, keep: int) -> int:
        retired = self._change(
            "DELETE FROM checkpoint WHERE step NOT IN "
            "(SELECT step FROM checkpoint ORDER BY step DESC LIMIT ?)",
            max(1, keep),
        )
        oldest = self._rows("SELECT step, first_place FROM checkpoint ORDER BY step LIMIT 1")
        (step, first_place), run = oldest[0] if oldest else (0, 0), self._run()
        if step <= run.archived_step and first_place <= run.archived_place:
            return 0 if retired else self._unchanged(0)
        done = "state = 'released' AND acked = 2 AND step <= ? AND place < ?"
        ready = self._value(f"SELECT count(*) FROM sample WHERE {done}", step, first_place)  # noqa: S608
        plans = self._value("SELECT count(*) FROM plan WHERE step <= ?", step)
        run.archived_step = max(run.archived_step, step)
        if max(ready, plans) < self.archive_from:
            return 0
        self._archive_steps(step)
        reach("ledger.between_archives")
        run.archived_place = max(run.archived_place, first_place)
        run.archived += ready
        self._change(f"DELETE FROM sample WHERE {done}", step, first_place)  # noqa: S608 (ours)
        return int(ready)

    def _archive_steps(self, last: int) -> None:
        """Runs before the samples' rows are deleted, because it reads their places."""
        block: list[TrainedStep] = []
        for trained in self._planned("step <= ?", last):
            block.append(trained)
            if sum(len(step.samples) + 1 for step in block) >= self.block_size:
                self._write_block(block)
                block = []
        if block:
            self._write_block(block)
        self._change("DELETE FROM plan WHERE step <= ?", last)

    def _write_block(self, steps: list[TrainedStep]) -> None:
        content = [
            [t.step, t.rev, [[s.place, s.sample_id, s.ordinal, int(s.finished)] for s in t.samples]]
            for t in steps
        ]
        data = json.dumps(content, separators=(",", ":")).encode()
        finished = sum(s.finished for t in steps for s in t.samples)
        self._change(
            "INSERT OR REPLACE INTO archive VALUES (?, ?, ?, ?, ?)",
            *(steps[0].step, steps[-1].step, finished, hashlib.sha256(data).hexdigest(), compressed(data)),
        )

    def _planned(self, where: str, *values: Any) -> Iterator[TrainedStep]:
        """Steps whose plans have rows."""
        for step, rev, ids in self._rows(
            f"SELECT step, rev, sample_ids FROM plan WHERE {where} ORDER BY step",  # noqa: S608 (ours)
            *values,
        ):
            samples, names = [], json.loads(ids)
            last_visits = {
                sample_id: visit for visit, sample_id in enumerate(names)
            }  # a sample may come twice
            for visit, sample_id in enumerate(names):
                row = self._rows(
                    "SELECT place, ordinal, acked, step FROM sample WHERE sample_id = ?", sample_id
                )
                place, ordinal, acked, acked_by = row[0] if row else (UNKNOWN_PLACE, None, 0, None)
                finished = bool(acked) and acked_by == step and visit == last_visits[sample_id]
                samples.append(TrainedSample(place, sample_id, ordinal, finished))
            yield TrainedStep(step, rev, tuple(samples))

    # -- reading ---------------------------------------------------------------------------

    def history(self, *, step: int | None = None, sample_id: str | None = None) -> Iterator[TrainedStep]:
        with self._reading():
            earliest, latest = (0, 1 << 62) if step is None else (step, step)
            sql = "SELECT first, digest, content FROM archive WHERE last >= ? AND first <= ? ORDER BY first"
            wanted = None if sample_id is None else json.dumps(sample_id).encode()
            archived = step is None or step <= self._run().archived_step
            for first, digest, content in self._db.execute(sql, (earliest, latest)) if archived else ():
                for trained in self._steps_of(first, digest, content, wanted):
                    if step in (None, trained.step) and _names(trained, sample_id):
                        yield trained
            for trained in self._planned("step >= ? AND step <= ?", earliest, latest):
                if _names(trained, sample_id):
                    yield trained

    def _steps_of(
        self, first: int, digest: str, content: bytes, wanted: bytes | None
    ) -> Iterator[TrainedStep]:
        try:
            data = lzma.decompress(content)
        except lzma.LZMAError:
            data = b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise SchemaError(
                f"The archived steps from {first} on in {self.path} are damaged.",
                why="Part of the run's history cannot be read; samples in flight are not affected.",
                next="run `paceline fsck RUN`; restore the ledger from a backup to get the history back.",
            )
        if wanted is None or wanted in data:
            for step, rev, samples in json.loads(data):
                yield TrainedStep(
                    step, rev, tuple(TrainedSample(p, i, n, bool(finished)) for p, i, n, finished in samples)
                )

    def _archived_id(self, sample_id: str) -> bool:
        """Whether an archived step finished the sample. Searches the whole archive."""
        return sample_id in self._finished_in_archive(self.history(sample_id=sample_id))

    def _archived_among(self, sample_ids: Collection[str]) -> set[str]:
        """Those of the samples that an archived step finished. Reads the whole archive, once for all."""
        if not sample_ids or self._run().archived == 0:
            return set()
        return self._finished_in_archive(self.history()) & set(sample_ids)

    def _finished_in_archive(self, history: Iterator[TrainedStep]) -> set[str]:
        last = self._run().archived_step
        archived = takewhile(lambda trained: trained.step <= last, history)
        return {sample.sample_id for trained in archived for sample in trained.samples if sample.finished}

    def _is_archived(self, ref: SampleRef) -> bool:
        run = self._run()
        if run.place_order == "ordinal":
            return ref.ordinal is not None and ref.ordinal < run.archived_place
        has_row = self._value("SELECT 1 FROM sample WHERE sample_id = ?", ref.sample_id)
        return run.archived > 0 and has_row is None and self._archived_id(ref.sample_id)


def _names(trained: TrainedStep, sample_id: str | None) -> bool:
    return sample_id is None or any(sample.sample_id == sample_id for sample in trained.samples)
