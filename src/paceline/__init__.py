"""Paceline: prompts -> target capture -> feature store -> committed log -> step -> checkpoint -> release.

Names are imported on first use: the control plane never loads torch, and the checker nothing that it checks.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.ledger.channel import StreamingRefQueue
    from paceline.ledger.controller import DataFlowController
    from paceline.ledger.store import MetadataStore
    from paceline.ledger.stores.memory import InMemoryMetadataStore
    from paceline.ledger.stores.sqlite import SQLiteMetadataStore
    from paceline.ledger.streaming_channel import StreamingRefChannel
    from paceline.roles.wire import (
        build_disagg_online_consumer,
        build_disagg_online_producer,
        run_disagg_online,
    )
    from paceline.types import FeatureSpec, PromptTask, SampleRef, assert_no_tensors

_HOMES = {
    "paceline.ledger.channel": ("StreamingRefQueue",),
    "paceline.ledger.controller": ("DataFlowController",),
    "paceline.ledger.store": ("MetadataStore",),
    "paceline.ledger.stores.memory": ("InMemoryMetadataStore",),
    "paceline.ledger.stores.sqlite": ("SQLiteMetadataStore",),
    "paceline.ledger.streaming_channel": ("StreamingRefChannel",),
    "paceline.roles.wire": (
        "build_disagg_online_consumer",
        "build_disagg_online_producer",
        "run_disagg_online",
    ),
    "paceline.types": ("FeatureSpec", "PromptTask", "SampleRef", "assert_no_tensors"),
}

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
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'paceline' has no attribute {name!r}")
