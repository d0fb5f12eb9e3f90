"""Every export: the name of the server or format, and where its adapter is. One line per export."""

from __future__ import annotations

from paceline.table import Table

EXPORTS = Table(
    "export",
    "paceline.exports",
    {
        "vllm": "paceline.exports.eagle3:VLLM",
        "sglang": "paceline.exports.eagle3:SGLANG",
        "speculators": "paceline.exports.eagle3:SPECULATORS",
        "hf": "paceline.exports.eagle3:HF",
    },
)
