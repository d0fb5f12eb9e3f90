"""Narrowing is an engine whose samples come as they are stored: float8 where a feature says so.

Capture itself imports no torch: schedules of kills run producers without it by the hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.engines.engine import Captured, CaptureRequest, TargetEngine
from paceline.features.float8 import narrowed
from paceline.target.facts import TargetFacts
from paceline.types import Feature

if TYPE_CHECKING:  # it imports transformers, which a consumer does without
    from paceline.target.chat_encoder import ChatEncoder


class Narrowing:
    """A TargetEngine around one. What it probes are the states as they were before they were rounded."""

    def __init__(self, engine: TargetEngine) -> None:
        self._engine = engine

    @property
    def facts(self) -> TargetFacts:
        return self._engine.facts

    @property
    def chats(self) -> ChatEncoder:
        return self._engine.chats

    def encode(self, prompt: str) -> tuple[int, ...]:
        return self._engine.encode(prompt)

    def probe(self) -> None:
        self._engine.probe()

    def capture(self, group: Sequence[CaptureRequest], features: Sequence[Feature]) -> list[Captured]:
        captured = self._engine.capture(group, features)
        return [replace(one, tensors=narrowed(one.sample_id, one.tensors, features)) for one in captured]

    def close(self) -> None:
        self._engine.close()
