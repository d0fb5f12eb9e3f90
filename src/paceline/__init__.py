"""Paceline: prompts -> target capture -> feature store -> committed log -> step -> checkpoint -> release.

Names are imported on first use, so the control plane never loads torch, and fsck loads no code that it
checks.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.compat.channel import StreamingRefQueue
    from paceline.compat.controller import DataFlowController
    from paceline.compat.redis_store import RedisMetadataStore
    from paceline.compat.stores import InMemoryMetadataStore, MetadataStore, SQLiteMetadataStore
    from paceline.compat.streaming_channel import StreamingRefChannel
    from paceline.roles.wire import (
        build_disagg_online_consumer,
        build_disagg_online_producer,
        run_disagg_online,
    )
    from paceline.types import FeatureSpec, PromptTask, SampleRef, assert_no_tensors

__version__ = "0.1.0"

_HOMES = {
    "paceline.compat.channel": ("StreamingRefQueue",),
    "paceline.compat.controller": ("DataFlowController",),
    "paceline.compat.redis_store": ("RedisMetadataStore",),
    "paceline.compat.stores": ("InMemoryMetadataStore", "MetadataStore", "SQLiteMetadataStore"),
    "paceline.compat.streaming_channel": ("StreamingRefChannel",),
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
    "RedisMetadataStore",
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
