"""Every target engine: its name in run files, and where its section is. One line per engine."""

from __future__ import annotations

from paceline.table import Table

ENGINES = Table(
    "engine",
    "paceline.engines",
    {
        "sglang": "paceline.engines.sglang.settings:SglangSection",
        "transformers": "paceline.engines.settings:TransformersSection",
        "vllm": "paceline.engines.vllm.settings:VllmSection",
    },
)
