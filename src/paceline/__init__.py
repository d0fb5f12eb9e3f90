"""Paceline: prompts -> target capture -> feature store -> committed log -> step -> checkpoint -> release.

Names that need torch are imported on first use, so that the control plane never loads it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paceline.ledger.channel import StreamingRefQueue
from paceline.ledger.controller import DataFlowController
from paceline.ledger.store import MetadataStore
from paceline.ledger.stores.memory import InMemoryMetadataStore
from paceline.ledger.stores.sqlite import SQLiteMetadataStore
from paceline.ledger.streaming_channel import StreamingRefChannel
from paceline.types import FeatureSpec, PromptTask, SampleRef, assert_no_tensors

if TYPE_CHECKING:
    from paceline.roles.wire import (
        build_disagg_online_consumer,
        build_disagg_online_producer,
        run_disagg_online,
    )

_NEED_TORCH = ("build_disagg_online_consumer", "build_disagg_online_producer", "run_disagg_online")

__all__ = [
    "DataFlowController",
    "FeatureSpec",
    "InMemoryMetadataStore",
    "MetadataStore",
    "PromptTask",
    "SQLiteMetadataStore",
    "SampleRef",
    "StreamingRefChannel",
    "StreamingRefQueue",
    "assert_no_tensors",
    "build_disagg_online_consumer",
    "build_disagg_online_producer",
    "run_disagg_online",
]


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(import_module("paceline.roles.wire"), name)
    raise AttributeError(f"module 'paceline' has no attribute {name!r}")
